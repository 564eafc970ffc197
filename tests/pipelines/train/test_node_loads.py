"""The load of several nodes in one progress line."""

from types import SimpleNamespace
from typing import Any

import psutil
import torch

from patchloom.pipelines.train.hooks.system import MOST_NODES, SystemHook
from patchloom.platform.compute.machine import LOAD_NAMES


def loads_of(nodes: list[tuple[int, int]]) -> list[Any]:
    """The field `system` of each worker, whose node and rank on it are given."""
    sent: list[torch.Tensor] = []
    worker = SimpleNamespace(count=len(nodes), reduce=lambda tensor: sent.append(tensor.clone()))
    hooks = [
        SystemHook(
            SimpleNamespace(
                worker=SimpleNamespace(rank=rank, node=node, rank_on_node=local, **vars(worker)), device="cpu"
            )
        )  # type: ignore[arg-type]
        for rank, (node, local) in enumerate(nodes)
    ]
    for hook in hooks:
        hook.line_fields()
    total = torch.stack(sent).sum(0)
    worker.reduce = lambda tensor: tensor.copy_(total)
    for hook in hooks:
        hook.run.worker.reduce = worker.reduce
    return [hook.line_fields().get("system") for hook in hooks]


def test_one_node_has_plain_names() -> None:
    first, second = loads_of([(0, 0), (0, 1)])
    assert second is None and "cpu_utilization_percentage" in first
    assert abs(first["system_memory_usage_percentage"] - psutil.virtual_memory().percent) < 20  # once, not twice


def test_two_nodes_have_numbers() -> None:
    first, *others = loads_of([(0, 0), (1, 0), (0, 1)])
    assert others == [None, None]
    assert {name.split("/")[0] for name in first} == {"node_0", "node_1"}
    assert {name.split("/")[1] for name in first} <= set(LOAD_NAMES)


def test_many_nodes_are_bounded() -> None:
    first, *_ = loads_of([(node, 0) for node in range(40)])
    assert {name.split("/")[0] for name in first} == {f"node_{number}" for number in range(MOST_NODES)}
    assert MOST_NODES * len(LOAD_NAMES) < 900  # MLflow takes 1000 metrics at once
