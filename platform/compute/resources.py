"""Resources: where the workers of a command run, and waiting until the cluster has room for them."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from patchloom.errors import UserError
from patchloom.platform.files.storage import existing_file
from patchloom.platform.progress import clock, say
from patchloom.platform.recipe.sections import Count, Positive, Section, checked, parse_value, read_yaml, set_key

AUTOSCALER_WAIT_MINUTES = 30.0  # a cloud may need this long for a node with a GPU
COLLECTIVE_MINUTES = 30.0  # torch's own limit
POLL_S = 1.0
SAY_EVERY_S = 60.0
AUTOSCALER_TIMEOUT_S = 10
FIXED_NODE_TYPE = "node_"  # how Ray names the type of a node that no autoscaler started, followed by the node's id


class Resources(Section):
    """Where the workers of a command run. It never changes what they compute, so it is not part of a recipe.

    Args:
        workers: number of workers, unless the command line gives it.
        min_workers: continue a training run with at least this many workers after a node is lost.
        cpus_per_worker: CPUs of each worker. By default one on a cluster; on this machine, the CPUs are divided.
        gpus_per_worker: GPUs of each worker, or of each trial without workers: 0, 1, or a fraction with which several
            processes share one. By default 1 if a node has a GPU or an autoscaler can start one with a GPU, else 0.
        accelerator: type of accelerator that the nodes must have, as Ray names it, such as `A100`.
        labels: labels that the nodes must have, such as `{region: eu}`.
        placement: `pack` puts workers on few nodes, `spread` on many.
        wait_minutes: how long to wait for nodes. By default 30 minutes if the cluster has an autoscaler, otherwise 0.
        collective_minutes: how long a worker of a training run waits for another one before it fails.
        object_store_gib: size of Ray's object store, for a session on this machine.
        address: the Ray cluster, unless RAY_ADDRESS is set.
        mlflow: the MLflow server, unless MLFLOW_TRACKING_URI is set.
    """

    workers: Annotated[int, Field(ge=0)] | None = None
    min_workers: Count | None = None
    cpus_per_worker: Count | None = None
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] | None = None
    accelerator: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    placement: Literal["pack", "spread"] = "pack"
    wait_minutes: Annotated[float, Field(ge=0)] | None = None
    collective_minutes: Positive = COLLECTIVE_MINUTES
    object_store_gib: Positive | None = None
    address: str | None = None
    mlflow: str | None = None

    @model_validator(mode="after")
    def _check_min_workers(self) -> "Resources":
        if self.min_workers and self.workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self

    def with_values(self, **changes: object) -> "Resources":
        """A copy with some values changed, checked."""
        return checked(Resources, self.model_dump() | changes)

    def set_environment(self) -> None:
        """Set RAY_ADDRESS and MLFLOW_TRACKING_URI to the addresses that this names, unless they are set."""
        for name, value in (("RAY_ADDRESS", self.address), ("MLFLOW_TRACKING_URI", self.mlflow)):
            if value is not None:
                os.environ.setdefault(name, value)


DEFAULT_RESOURCES = Resources()


def load_resources(settings: Sequence[str]) -> Resources:
    """Resources from the values of `--resources`: files and `KEY=VALUE`; later ones override earlier ones.

    Raises:
        UserError: a file cannot be read, or a key or value is wrong.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, mark, text = setting.partition("=")
        if mark and existing_file(setting) is None:
            set_key(values, key, parse_value(text, key))
            continue
        if existing_file(setting) is None:
            raise UserError(f"--resources {setting}: there is no such file; give a YAML file, or KEY=VALUE")
        values |= read_yaml(Path(setting))
    return checked(Resources, values)


@dataclass(frozen=True)
class WorkerShape:
    """What one worker reserves.

    Args:
        bundle: amounts by the names of Ray's resources, such as `{"CPU": 1, "GPU": 1}`.
        labels: labels of the node.
        placement: Ray's placement strategy, `PACK` or `SPREAD`.
    """

    bundle: dict[str, float]
    labels: dict[str, str]
    placement: str = "PACK"

    @property
    def other_resources(self) -> dict[str, float]:
        """The amounts other than of CPUs and GPUs."""
        return {name: amount for name, amount in self.bundle.items() if name not in ("CPU", "GPU")}

    def __str__(self) -> str:
        amounts = [f"{amount:g} {name}" for name, amount in self.bundle.items() if not name.startswith("accelerator")]
        types = [name.partition(":")[2] for name in self.bundle if name.startswith("accelerator")]
        labels = [f"{key}={value}" for key, value in self.labels.items()]
        return ", ".join([" and ".join(amounts), *types, *labels])

    def fits(self, resources: dict[str, float]) -> int:
        """How many such workers fit into the resources of one node."""
        rooms = [int(resources.get(name, 0) / amount) for name, amount in self.bundle.items() if amount > 0]
        return min(rooms, default=0)


def worker_shape(resources: Resources, cpus: float, gpus: float = 0) -> WorkerShape:
    """The shape of a worker with so many CPUs and GPUs on the nodes that `resources` names."""
    bundle = ({"CPU": cpus} if cpus else {}) | ({"GPU": gpus} if gpus else {})
    if resources.accelerator:
        bundle[f"accelerator_type:{resources.accelerator}"] = 0.001  # as Ray reserves a type
    return WorkerShape(bundle, dict(resources.labels), resources.placement.upper())


def wait_for_workers(workers: int, shape: WorkerShape, wait_minutes: float | None) -> None:
    """Wait until the session has room for workers. An autoscaler is asked for nodes; a message says what is missing.

    Args:
        workers: number of workers that must fit at the same time.
        shape: what each one reserves.
        wait_minutes: the longest wait. None: 30 if the cluster has an autoscaler, otherwise 0.

    Raises:
        UserError: the cluster cannot have that much, or did not within the time.
    """
    if sum(map(shape.fits, _nodes(shape, "available"))) >= workers:
        return
    import ray.util

    group = ray.util.placement_group(
        [shape.bundle] * workers, strategy=shape.placement, bundle_label_selector=[shape.labels] * workers
    )
    try:
        _wait_for_group(group, workers, shape, wait_minutes)
    finally:
        ray.util.remove_placement_group(group)


def _wait_for_group(group: Any, workers: int, shape: WorkerShape, wait_minutes: float | None) -> None:
    started, since, spoke = time.monotonic(), datetime.now().strftime("%H:%M:%S"), -SAY_EVERY_S
    while not group.wait(POLL_S):
        fit, waited = workers_that_fit(shape), time.monotonic() - started
        wanted = f"{workers} worker{'s' if workers > 1 else ''} with {shape} each"
        autoscaler = autoscaler_state(group.id.hex())
        if autoscaler.cannot and autoscaler.exists:
            raise UserError(f"no node type of this cluster can provide {wanted}: ask for less, or add a node type")
        if fit < workers and not autoscaler.exists and wait_minutes is None:
            raise UserError(
                f"this cluster has room for {fit} of {wanted}, and it has no autoscaler: choose --workers {max(fit, 1)}"
                f" or fewer{', or --gpus 0' if 'GPU' in shape.bundle else ''}, add nodes, or wait for them with --wait "
                "MINUTES"
            )
        if waited > 60 * (AUTOSCALER_WAIT_MINUTES if wait_minutes is None else wait_minutes):
            raise UserError(
                f"the cluster had no room for {wanted} within {clock(waited)} ({_state(fit, workers, autoscaler)}): "
                "wait longer with --wait MINUTES, or choose fewer workers"
            )
        if waited - spoke >= SAY_EVERY_S:
            say(f"  waiting since {since} for {wanted}: {_state(fit, workers, autoscaler)}")
            spoke = waited


def _state(fit: int, workers: int, autoscaler: "AutoscalerState") -> str:
    """What the cluster does about missing room."""
    if fit >= workers:
        return "its nodes are busy"
    launching = ", ".join(f"{count} {name}" for name, count in autoscaler.launching.items())
    return f"its nodes can have {fit}" + (f"; it starts {launching}" if launching else "")


def workers_that_fit(shape: WorkerShape) -> int:
    """How many workers of a shape fit on the nodes that run, busy or not."""
    return sum(map(shape.fits, _nodes(shape, "total")))


def _nodes(shape: WorkerShape, amounts: Literal["total", "available"]) -> list[dict[str, float]]:
    """The resources of the nodes with the labels of a shape."""
    import ray
    import ray._private.state

    nodes = [node for node in ray.nodes() if node["Alive"] and shape.labels.items() <= node.get("Labels", {}).items()]
    if amounts == "total":
        return [node["Resources"] for node in nodes]
    available = ray._private.state.available_resources_per_node()
    return [available.get(node["NodeID"], {}) for node in nodes]


@dataclass(frozen=True)
class AutoscalerState:
    """What the autoscaler of the cluster does.

    Args:
        exists: whether the cluster has an autoscaler that starts nodes.
        cannot: whether it said that no node type provides the workers that are waited for.
        launching: the nodes that it starts, by type.
        says_cannot: whether it says what it cannot provide.
    """

    exists: bool
    cannot: bool = False
    launching: dict[str, int] = field(default_factory=dict)
    says_cannot: bool = True


def autoscaler_state(group_id: str | None = None) -> AutoscalerState:
    """The state of the autoscaler of the session, with regard to a placement group."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = GcsClient(ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=AUTOSCALER_TIMEOUT_S))
    state = reply.autoscaling_state
    if state.autoscaler_state_version:  # the second version of Ray's autoscaler
        launching: dict[str, int] = {}
        for request in state.pending_instance_requests:
            launching[request.ray_node_type_name] = launching.get(request.ray_node_type_name, 0) + request.count
        cannot = any(group_id in request.details for request in state.infeasible_gang_resource_requests if group_id)
        nodes = [*reply.cluster_resource_state.node_states, *state.pending_instances, *state.pending_instance_requests]
        return AutoscalerState(_starts_nodes(node.ray_node_type_name for node in nodes), cannot, launching)
    return _first_autoscaler_state()


def _first_autoscaler_state() -> AutoscalerState:
    """The state of the first version of Ray's autoscaler. It does not say what it cannot do."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = (json.loads(text).get("autoscaler_report") or {}) if text else {}
    types = (report.get("node_type_mapping") or {}).values()
    return AutoscalerState(_starts_nodes(types), False, report.get("pending_launches") or {}, says_cannot=False)


def _starts_nodes(node_types: Iterable[str]) -> bool:
    """Whether the types of nodes are those of an autoscaler. Other nodes have the type `node_...`, or none."""
    return any(name and not name.startswith(FIXED_NODE_TYPE) for name in node_types)
