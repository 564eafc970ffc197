"""How many GPUs each worker reserves, decided from what the nodes have and what an autoscaler could start."""

import math
from types import SimpleNamespace

import pytest
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from patchloom.errors import UserError
from patchloom.platform.compute import supply
from patchloom.platform.compute.resources import AutoscalerState, Resources, worker_shape
from patchloom.platform.compute.supply import (
    NODE_TYPE_LABEL,
    NodeKind,
    Supply,
    chosen_gpus,
    node_types_of,
    session_shape,
    session_supply,
)

HEAD = NodeKind({"CPU": 4})
ONE = NodeKind({"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}, {"zone": "a"})
FOUR = NodeKind({"CPU": 16, "GPU": 4, "accelerator_type:A100": 1}, {"zone": "b"})
SPOT = NodeKind({"CPU": 8, "GPU": 1}, {NODE_TYPE_LABEL: "spot"}, 4)


def choice(nodes: Supply, workers: int = 1, cpus: float = 1, **given: object) -> float | None:
    return chosen_gpus(Resources(**given), cpus, workers, nodes)


def test_without_gpus_workers_use_cpus() -> None:
    assert choice(Supply((HEAD,))) == 0
    assert choice(Supply((HEAD,), startable=(NodeKind({"CPU": 8}, count=10),))) == 0


@pytest.mark.parametrize("gpus", [1, 0.25])
def test_gpus_that_cannot_be_had_are_an_error(gpus: float) -> None:
    with pytest.raises(UserError, match=r"0 of 1 worker .* --gpus 0"):
        choice(Supply((HEAD,)), gpus_per_worker=gpus)
    with pytest.raises(UserError, match=r"0 of 1 worker .* --gpus 0"):
        choice(Supply((HEAD,), startable=(HEAD,)), gpus_per_worker=gpus)


def test_each_worker_gets_a_gpu_where_there_are_enough() -> None:
    assert choice(Supply((HEAD, ONE))) == 1
    assert choice(Supply((FOUR,)), workers=4) == 1
    assert choice(Supply((HEAD, ONE, FOUR)), workers=5) == 1  # mixed nodes
    assert choice(Supply((HEAD, ONE, FOUR)), workers=20, gpus_per_worker=0.25) == 0.25
    assert choice(Supply((HEAD, ONE, FOUR)), workers=9, gpus_per_worker=0) == 0


@pytest.mark.parametrize("given", [{}, {"gpus_per_worker": 1}])
def test_too_few_gpus_are_an_error_and_never_lead_to_cpus(given: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"1 of 2 workers .* --workers 1, or --gpus 0 .* --wait"):
        choice(Supply((HEAD, ONE)), workers=2, **given)
    with pytest.raises(UserError, match="5 of 6 workers"):
        choice(Supply((ONE, FOUR)), workers=6, **given)
    assert choice(Supply((HEAD, ONE)), workers=2, wait_minutes=5, **given) == 1  # the user adds nodes


def test_cpus_of_a_node_limit_its_workers_too() -> None:
    with pytest.raises(UserError, match="1 of 2 workers with 10 CPU and 1 GPU each"):
        choice(Supply((FOUR,)), workers=2, cpus=10)


def test_labels_and_accelerators_choose_the_nodes() -> None:
    assert choice(Supply((ONE, FOUR)), workers=4, accelerator="A100") == 1
    assert choice(Supply((ONE, FOUR)), workers=4, labels={"zone": "b"}) == 1
    assert choice(Supply((HEAD, ONE)), labels={"zone": "c"}) == 0
    with pytest.raises(UserError, match="1 of 2 workers"):
        choice(Supply((ONE, FOUR)), workers=2, accelerator="T4")


def test_nodes_that_an_autoscaler_could_start_count() -> None:
    growing = Supply((HEAD,), startable=(SPOT,))
    assert choice(growing) == 1
    assert choice(growing, workers=4) == 1
    with pytest.raises(UserError, match="4 of 5 workers"):
        choice(growing, workers=5)
    with pytest.raises(UserError, match="4 of 5 workers"):
        choice(growing, workers=5, wait_minutes=5)
    assert choice(Supply((HEAD,), startable=(NodeKind(SPOT.resources, count=math.inf),)), workers=1000) == 1


def test_an_autoscaler_that_does_not_say_its_types_is_asked() -> None:
    unknown = Supply((HEAD,), startable=None)
    assert choice(unknown) is None
    assert choice(unknown, gpus_per_worker=1, workers=8) == 1  # it is asked for the nodes
    assert choice(unknown, gpus_per_worker=0) == 0
    assert choice(Supply((HEAD, ONE), startable=None), workers=2) == 1


def test_a_cluster_file_names_its_node_types() -> None:
    text = """
max_workers: 6
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, node_config: {}}
  spot: {resources: {CPU: 8, GPU: 1}, labels: {market: spot}, max_workers: 4}
  other: {resources: {CPU: 8}}
"""
    head, spot, other = node_types_of(text)
    assert (head.count, spot.count, other.count) == (1, 4, 6)
    assert spot.resources == {"CPU": 8, "GPU": 1} and spot.labels == {"market": "spot", NODE_TYPE_LABEL: "spot"}
    assert Supply((), (head, spot, other)).room(worker_shape(Resources(), 2, 1)) == 4


def test_running_nodes_of_a_type_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray._private.state

    config = ClusterConfig()
    config.node_group_configs.add(resources={"CPU": 8, "GPU": 1}, max_count=2, name="gpu")
    config.node_group_configs.add(resources={"CPU": 8}, max_count=-1, name="cpu")
    state = SimpleNamespace(get_cluster_config=lambda: config)
    monkeypatch.setattr(ray._private.state, "state", state)
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8, "GPU": 1}, "Labels": {NODE_TYPE_LABEL: "gpu"}},
        {"Alive": False, "Resources": {"CPU": 8, "GPU": 8}, "Labels": {}},
        {"Alive": True, "Resources": {"CPU": 2, "GPU": 1}, "Labels": {}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(supply, "autoscaler_state", lambda: AutoscalerState(True))
    assert session_supply().room(worker_shape(Resources(), 1, 1)) == 3
    assert session_supply().room(worker_shape(Resources(), 1)) == math.inf
    monkeypatch.setattr(supply, "autoscaler_state", lambda: AutoscalerState(False))
    assert session_supply().room(worker_shape(Resources(), 1, 1)) == 2


@pytest.mark.parametrize(
    ("is_ready", "state", "expected"),
    [
        (True, AutoscalerState(True), 1),
        (False, AutoscalerState(True), 1),  # it did not refuse
        (False, AutoscalerState(True, cannot=True), 0),
        (False, AutoscalerState(True, says_cannot=False), 0),
    ],
)
def test_the_answer_of_the_autoscaler(
    is_ready: bool, state: AutoscalerState, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    import ray.util

    asked, removed = [], []
    group = SimpleNamespace(id=SimpleNamespace(hex=lambda: "f0"), wait=lambda seconds: is_ready)
    monkeypatch.setattr(ray.util, "placement_group", lambda bundles, **_: asked.extend(bundles) or group)
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    monkeypatch.setattr(supply, "autoscaler_state", lambda group_id: state)
    monkeypatch.setattr(supply, "session_supply", lambda: Supply((HEAD,), startable=None))
    monkeypatch.setattr(supply, "ANSWER_S", 0)
    shape = session_shape(Resources(accelerator="A100"), 2, 3)
    assert shape.bundle.get("GPU", 0) == expected
    assert asked == [{"GPU": 1, "accelerator_type:A100": 0.001}] and removed == [group]


def test_work_without_gpus_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "session_supply", lambda: pytest.fail("was asked"))
    assert session_shape(Resources(), 2, uses_gpus=False).bundle == {"CPU": 2}
