"""Supply: the nodes that a session has and could start, and how many GPUs each worker of a command reserves there."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from patchloom.errors import UserError
from patchloom.platform.compute.resources import (
    POLL_S,
    Resources,
    WorkerShape,
    autoscaler_state,
    worker_shape,
)
from patchloom.platform.progress import say

BOOTSTRAP_FILE = Path("~/ray_bootstrap_config.yaml")  # on the head node of a cluster that `ray up` started
NODE_TYPE_LABEL = "ray.io/node-group"  # Ray's label for the type of a node that an autoscaler started
ANSWER_S = 15.0  # the second version of Ray's autoscaler decides every five seconds


@dataclass(frozen=True)
class NodeKind:
    """Equal nodes.

    Args:
        resources: amounts on one node by the names of Ray's resources, such as `{"CPU": 8, "GPU": 4}`.
        labels: labels of the node.
        count: how many nodes exist, or the most that can exist; infinite if nothing limits them.
    """

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    count: float = 1


@dataclass(frozen=True)
class Supply:
    """What a session offers.

    Args:
        nodes: the nodes that run.
        startable: nodes that an autoscaler can start; empty without one. None: it does not say which.
    """

    nodes: tuple[NodeKind, ...]
    startable: tuple[NodeKind, ...] | None = ()

    def room(self, shape: WorkerShape) -> float:
        """The most workers of a shape that can ever run at once on the nodes that are known."""
        kinds = [*self.nodes, *(self.startable or ())]
        fitting = [kind for kind in kinds if shape.labels.items() <= kind.labels.items()]
        return sum(kind.count * fit for kind in fitting if (fit := shape.fits(kind.resources)))


def chosen_gpus(resources: Resources, cpus: float, workers: int, supply: Supply) -> float | None:
    """How many GPUs each worker reserves.

    Args:
        resources: what the user chose. Without `gpus_per_worker`, one GPU if a node has or can have one, else none.
        cpus: the CPUs that each worker reserves.
        workers: number of workers that must run at once.
        supply: the nodes.

    Returns:
        The GPUs of each worker. None: only the autoscaler knows whether it can start a node with a GPU.

    Raises:
        UserError: the nodes can never have that many GPUs.
    """
    gpus = resources.gpus_per_worker
    if gpus is None:
        if supply.room(worker_shape(resources, 0, 1)):
            gpus = 1
        elif supply.startable is None:
            return None
        else:
            return 0
    user_adds_nodes = not supply.startable and resources.wait_minutes is not None
    if gpus and supply.startable is not None and not user_adds_nodes:
        _check_room(worker_shape(resources, cpus, gpus), workers, supply)
    return gpus


def _check_room(shape: WorkerShape, workers: int, supply: Supply) -> None:
    if (room := supply.room(shape)) < workers:
        fewer = f"--workers {room:g}, or " if room else ""
        wait = "" if supply.startable else ", or wait for nodes that you add with --wait MINUTES"
        raise UserError(
            f"the nodes can have {room:g} of {workers} worker{'s' if workers > 1 else ''} with {shape} each: choose "
            f"{fewer}--gpus 0 to compute on CPUs{wait}"
        )


def session_shape(resources: Resources, cpus: float, workers: int = 1, uses_gpus: bool = True) -> WorkerShape:
    """What a worker of the session reserves.

    Args:
        resources: what the user chose.
        cpus: the CPUs of a worker.
        workers: number of workers that must run at once.
        uses_gpus: whether the work can use GPUs.

    Raises:
        UserError: the nodes can never have that many GPUs.
    """
    if not uses_gpus:
        return worker_shape(resources, cpus)
    gpus = chosen_gpus(resources, cpus, workers, session_supply())
    return worker_shape(resources, cpus, float(_can_start_gpu(resources)) if gpus is None else gpus)


def session_supply() -> Supply:
    """The nodes of the session, and those that its autoscaler can start."""
    import ray

    startable = _startable() if autoscaler_state().exists else ()
    nodes = [NodeKind(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
    types = {kind.labels.get(NODE_TYPE_LABEL) for kind in startable or ()}
    others = [node for node in nodes if node.labels.get(NODE_TYPE_LABEL) not in types - {None}]
    return Supply(tuple(others), startable)  # a type's limit counts the nodes of the type that run


def may_need_session(resources: Resources) -> bool:
    """Whether a session on this machine may lack GPUs that its workers would reserve."""
    import torch

    return bool(resources.gpus_per_worker) or (resources.gpus_per_worker is None and torch.cuda.is_available())


def _startable() -> tuple[NodeKind, ...] | None:
    """The node types of the autoscaler, if it or this node says what they are."""
    import ray._private.state

    config = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return tuple(_kind_of_group(group) for group in config.node_group_configs)
    path = BOOTSTRAP_FILE.expanduser()
    return node_types_of(path.read_text()) if path.is_file() else None


def _kind_of_group(group: Any) -> NodeKind:
    count = math.inf if group.max_count < 0 else group.max_count
    return NodeKind(dict(group.resources), {NODE_TYPE_LABEL: group.name}, count)


def node_types_of(text: str) -> tuple[NodeKind, ...]:
    """The node types of a cluster file of Ray whose resources are complete, as on a head node."""
    config = yaml.safe_load(text)
    most = config.get("max_workers", math.inf)

    def kinds() -> Iterable[NodeKind]:
        for name, values in config["available_node_types"].items():
            count = 1 if name == config.get("head_node_type") else min(values.get("max_workers", most), most)
            yield NodeKind(values.get("resources", {}), values.get("labels", {}) | {NODE_TYPE_LABEL: name}, count)

    return tuple(kinds())


def _can_start_gpu(resources: Resources) -> bool:
    """Ask the autoscaler whether it can start a node with a GPU, which it begins to do."""
    import ray.util

    shape = worker_shape(resources, 0, 1)
    group = ray.util.placement_group([shape.bundle], bundle_label_selector=[shape.labels])
    deadline = time.monotonic() + ANSWER_S
    try:
        while not group.wait(POLL_S):
            state = autoscaler_state(group.id.hex())
            if state.cannot:
                return False
            if not state.says_cannot:
                say("  no node has a GPU: the workers use CPUs; if the autoscaler can start GPUs, use --gpus 1")
                return False
            if time.monotonic() > deadline:
                return True
    finally:
        ray.util.remove_placement_group(group)
    return True
