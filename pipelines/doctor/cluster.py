"""Doctor of a cluster: run the checks on every node, and report what fails and what differs between nodes."""

import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import patchloom
from patchloom.errors import UserError
from patchloom.pipelines.doctor.machine import versions_here
from patchloom.pipelines.launch.node import code_digest
from patchloom.platform.compute.nodes import NodeResult, ask_nodes
from patchloom.platform.compute.session import ray_session
from patchloom.platform.files.cache import cache_root
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import aligned
from patchloom.platform.tracking.client import connect, experiment_id, require_reachable
from patchloom.platform.tracking.store import database_path, shown_uri, tracking_uri

SAME = ("python", "torch", "ray", "mlflow", "patchloom", "code")  # what all nodes must have in the same version
CLOCK_TOLERANCE_S = 2.0
LEAST_FREE_GIB = 5.0


@dataclass(frozen=True)
class NodeChecks:
    """What to check on a node: the addresses of MLflow and, if given, of a store, which has a file named `marker`."""

    tracking_uri: str
    store: str | None
    marker: str


@dataclass(frozen=True)
class NodeState:
    """What a node has and what works there.

    Args:
        versions: by name; `code` is the start of the digest of Patchloom's code.
        cpus: cores of the machine.
        gpus: names of the GPUs that torch sees.
        ray_cpus: CPUs that Ray may use, such as 0 on a head node.
        ray_gpus: GPUs that Ray may use.
        cache_free_gib: free space where the cache is.
        problems: what does not work, one line each.
    """

    versions: dict[str, str]
    cpus: int
    gpus: list[str]
    ray_cpus: float
    ray_gpus: float
    cache_free_gib: float
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClusterHealth:
    """The result of a check of all nodes: the state of each that answered, and all problems by node.

    `store` is the address that was checked too, if one was given.
    """

    nodes: dict[str, NodeState]
    problems: dict[str, list[str]]
    store: str | None = None

    @property
    def works(self) -> bool:
        """Whether no node has a problem."""
        return not any(self.problems.values())

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {"works": self.works, **asdict(self)}


def check_nodes(store: str | None = None) -> ClusterHealth:
    """Check every node of the cluster at RAY_ADDRESS, or this machine as a cluster of one node.

    Args:
        store: an address, such as s3://bucket/folder, or a path on a shared file system: every node must be able to
            read and write there.

    Returns:
        What each node has, what fails there, and in what it differs from most nodes.

    Raises:
        UserError: no cluster answers, or the store cannot be written from here.
    """
    marker = f".patchloom-doctor-{os.getpid()}"
    if database_path() is not None:
        require_reachable()  # creates the file, so that nodes that share its folder find it
    if store:
        try:
            Folder.at(store).write(marker, "")
        except OSError as error:
            raise UserError(f"{store} cannot be written ({error.strerror}): choose another --store") from None
    try:
        with ray_session():
            results = ask_nodes(check_node, NodeChecks(tracking_uri(), store, marker))
    finally:
        if store:
            Folder.at(store).remove(marker)
    shown = str(Folder.at(store)) if store else None  # without keys
    states = {result.name: result.answer for result in results if result.answer is not None}
    return ClusterHealth(states, {result.name: _problems(result, states) for result in results}, shown)


def check_node(checks: NodeChecks) -> NodeState:
    """Check the node of this process."""
    import torch

    os.environ["MLFLOW_TRACKING_URI"] = checks.tracking_uri
    digest = code_digest(Path(patchloom.__file__).parent)
    versions = versions_here() | {"code": digest[:8]}
    cache = cache_root()
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free / 2**30
    problems = _failures([_check_tracking, lambda: _check_store(checks)])
    if free < LEAST_FREE_GIB:
        problems.append(f"the cache at {cache} has {free:.1f} GiB free: free space, or set PATCHLOOM_CACHE")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    offered = _ray_resources()
    return NodeState(versions, os.cpu_count() or 1, gpus, offered.get("CPU", 0), offered.get("GPU", 0), free, problems)


def _ray_resources() -> dict[str, float]:
    """What Ray may use of this node."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return next((dict(node["Resources"]) for node in ray.nodes() if node["NodeID"] == own), {})


def _failures(checks: list[Callable[[], None]]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except Exception as error:  # any failure of these libraries is a finding
            found.append(" ".join(str(error).split())[:300] or type(error).__name__)
    return found


def _check_tracking() -> None:
    """Write to the experiment, as a run does."""
    database = database_path()
    if database is not None and not database.is_file():
        raise UserError(f"{database} is not on this node: start `mlflow server`, and set MLFLOW_TRACKING_URI")
    require_reachable()
    client = connect()
    client.set_experiment_tag(experiment_id(client), "patchloom.doctor", socket.gethostname())


def _check_store(checks: NodeChecks) -> None:
    if checks.store is None:
        return
    folder, own = Folder.at(checks.store), f"{checks.marker}-{socket.gethostname()}-{os.getpid()}"
    if not folder.has(checks.marker):
        raise UserError(f"{checks.store} is not the same folder here: a file that was just written is missing")
    folder.write(own, "")
    folder.remove(own)


def _problems(result: NodeResult[NodeState], states: dict[str, NodeState]) -> list[str]:
    """What fails on a node, and what differs there from most nodes."""
    if result.answer is None:
        return [f"the check failed: {result.problem}"]
    found = list(result.answer.problems)
    for name in SAME:
        usual = Counter(state.versions[name] for state in states.values()).most_common(1)[0][0]
        if result.answer.versions[name] != usual:
            found.append(f"{name} is {result.answer.versions[name]}, and {usual} on most nodes: use one image")
    if result.clock_offset_s is not None and abs(result.clock_offset_s) > CLOCK_TOLERANCE_S:
        found.append(f"its clock differs by {result.clock_offset_s:.1f} s: synchronise the clocks (NTP)")
    return found


def nodes_text(health: ClusterHealth) -> str:
    """A table of the nodes, and the problems of each."""
    lines = [f"MLflow: {shown_uri()}", *([f"store: {health.store}"] if health.store else [])]
    rows = [["node", "cpus", "for Ray", "gpus", "for Ray", "cache free", *SAME]]
    for name, state in health.nodes.items():
        versions = [state.versions[what] for what in SAME]
        cpus, gpus = (str(state.cpus), f"{state.ray_cpus:g}"), (str(len(state.gpus)), f"{state.ray_gpus:g}")
        rows.append([name, *cpus, *gpus, f"{state.cache_free_gib:.0f} GiB", *versions])
    lines.append(aligned(rows))
    lines += [f"{name}: FAILED, {problem}" for name, problems in health.problems.items() for problem in problems]
    if health.works:
        lines.append(f"{len(health.nodes)} nodes: all checks passed")
    return "\n".join(lines)
