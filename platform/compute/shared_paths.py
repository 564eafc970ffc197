"""Shared paths: whether all nodes of a cluster see a local path as this machine does."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.folder import is_remote

NODE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class UsedPaths:
    """The files and folders that the workers of a command use.

    Args:
        read: what they read: files, folders, remote addresses or references such as `models:/...`. A None is skipped.
        written: the folders that they write.
    """

    read: tuple[str | None, ...] = ()
    written: tuple[str | None, ...] = ()


NO_PATHS = UsedPaths()


def check_shared(paths: UsedPaths) -> None:
    """Check that the nodes of the session see local paths as this machine does, before any work.

    Remote addresses are skipped, and so are sessions of one node.

    Raises:
        UserError: a node does not see a path, or sees another file or folder there.
    """
    nodes = _other_nodes()
    read = [path for path in paths.read if path and not is_remote(path) and Path(path).exists()]
    written = [path for path in paths.written if path and not is_remote(path)]
    if not nodes or not (read or written):
        return
    with contextlib.ExitStack() as stack:
        probes = {str(Path(path).absolute()): path for path in read}
        probes |= {stack.enter_context(_marker(Path(path))): path for path in written}
        here = {probe: look(probe) for probe in probes}
        found = _looks(nodes, list(probes))
    for probe, path in probes.items():
        blind = [address for address, looks in found.items() if looks[probe] != here[probe]]
        if blind:
            raise UserError(
                f"{path} is on this machine, and {blind[0]} ({len(blind)} of {len(found)} nodes) does not see it: use "
                "an address such as s3://bucket/folder, or a folder that every node mounts"
            )


@contextlib.contextmanager
def _marker(folder: Path) -> Iterator[str]:
    """A file in a folder, or in the nearest one above it that exists, during the block."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    marker = folder / f".patchloom-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): change its permissions, or choose another"
        ) from None
    try:
        yield str(marker)
    finally:
        marker.unlink(missing_ok=True)


def look(path: str) -> str:
    """The size of a file or the number of entries of a folder, as text. A path that is not there looks like a dash."""
    try:
        there = Path(path)
        return f"{sum(1 for _ in there.iterdir())} entries" if there.is_dir() else f"{there.stat().st_size} bytes"
    except OSError:
        return "-"


def _other_nodes() -> dict[str, str]:
    """The addresses of the other nodes that can have workers, by id."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }


def _looks(nodes: dict[str, str], probes: list[str]) -> dict[str, dict[str, str]]:
    """What each node sees at the probes, by its address. Nodes that are lost meanwhile are skipped."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(lambda paths: {path: look(path) for path in paths})
    answers = {
        address: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(probes)
        for node, address in nodes.items()
    }
    found = {}
    for address, answer in answers.items():
        with contextlib.suppress(ray.exceptions.RayError):
            found[address] = ray.get(answer, timeout=NODE_TIMEOUT_S)
    return found
