"""Cache: what this node, or every node of a cluster, keeps of remote files, and how to free it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from patchloom.platform.compute.nodes import ask_nodes
from patchloom.platform.compute.session import ray_session
from patchloom.platform.files.cache import CacheEntry, cache_entries, remove_entry
from patchloom.platform.progress import clock

DAY_S = 86_400


@dataclass(frozen=True)
class CacheWish:
    """Which entries are meant: of one kind, and not used for some days; by default all."""

    kind: str = "*"
    older_than_days: float = 0.0


@dataclass(frozen=True)
class NodeCache:
    """Entries of the cache of one node.

    Args:
        node: its name; empty for this machine.
        entries: the entries that were asked for.
        removed: how many of them, from the first on, were removed.
        problem: why the node did not answer.
    """

    node: str
    entries: list[CacheEntry]
    removed: int = 0
    problem: str | None = None


def list_cache(wish: CacheWish, cluster: bool = False) -> list[NodeCache]:
    """The entries of the cache of this machine, or with `cluster` of every node of the cluster at RAY_ADDRESS."""
    return _ask(entries_here, wish, cluster)


def clear_cache(wish: CacheWish, cluster: bool = False) -> list[NodeCache]:
    """Remove entries of the cache, as `list_cache` lists them. What a process uses, or what is not sent yet, stays."""
    return _ask(clear_here, wish, cluster)


def entries_here(wish: CacheWish) -> NodeCache:
    """The entries of the cache of this process's node."""
    before = time.time() - DAY_S * wish.older_than_days
    return NodeCache("", [entry for entry in cache_entries(wish.kind) if entry.used_unix_s <= before])


def clear_here(wish: CacheWish) -> NodeCache:
    """Remove entries of the cache of this process's node. The removed ones come first in the result."""
    removed: list[CacheEntry] = []
    kept: list[CacheEntry] = []
    for entry in entries_here(wish).entries:
        (removed if remove_entry(entry) else kept).append(entry)
    return NodeCache("", removed + kept, len(removed))


def _ask(function: Callable[[CacheWish], NodeCache], wish: CacheWish, cluster: bool) -> list[NodeCache]:
    if not cluster:
        return [function(wish)]
    with ray_session():
        results = ask_nodes(function, wish)
    return [
        replace(result.answer, node=result.name) if result.answer else NodeCache(result.name, [], 0, result.problem)
        for result in results
    ]


def cache_text(nodes: list[NodeCache]) -> str:
    """The entries as a table, and their sum."""
    lines = []
    for found in nodes:
        if found.node:
            lines.append(f"{found.node}:" + (f" FAILED, {found.problem}" if found.problem else ""))
        width = max((len(f"{entry.kind}/{entry.name}") for entry in found.entries), default=0)
        for entry in found.entries:
            age = clock(max(0.0, time.time() - entry.used_unix_s))
            state = "in use" if entry.in_use else "not sent yet" if entry.is_unsent else ""
            name = f"{entry.kind}/{entry.name}".ljust(width)
            lines.append(f"{name}  {_size(entry.size_bytes):>9}  used {age} ago  {state}".rstrip())
    total = _size(sum(entry.size_bytes for found in nodes for entry in found.entries))
    return "\n".join([*lines, f"{total} in all"])


def cleared_text(nodes: list[NodeCache]) -> str:
    """What was removed, and what stays and why."""
    lines = []
    for found in nodes:
        name = f"{found.node}: " if found.node else ""
        removed, kept = found.entries[: found.removed], found.entries[found.removed :]
        freed = _size(sum(entry.size_bytes for entry in removed))
        removal = f"removed {len(removed)} entries, {freed}"
        lines.append(f"{name}FAILED, {found.problem}" if found.problem else f"{name}{removal}")
        for entry in kept:
            why = "has work that is not sent yet" if entry.is_unsent else "is in use"
            lines.append(f"{name}kept {entry.kind}/{entry.name}, which {why}")
    return "\n".join(lines)


def cache_json(nodes: list[NodeCache]) -> list[dict[str, Any]]:
    """The nodes and their entries as JSON."""
    return [
        {
            "node": found.node,
            "problem": found.problem,
            "removed": [f"{entry.kind}/{entry.name}" for entry in found.entries[: found.removed]],
            "entries": [{**vars(entry), "path": str(entry.path)} for entry in found.entries[found.removed :]],
        }
        for found in nodes
    ]


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
