"""The cache of a node: what `patchloom cache` lists, and what it never removes."""

import fcntl
import os
import time
from pathlib import Path

import pytest

from patchloom.pipelines.cache import CacheWish, cache_json, cache_text, clear_cache, cleared_text, list_cache
from patchloom.platform.files.cache import cached_copy


def fill(name: str, size: int, kind: str = "datasets") -> int:
    """Make an entry; returns the descriptor that keeps it."""
    return cached_copy(kind, name, size, lambda folder: (folder / "data").write_bytes(b"x" * size) and None)[0]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_clear_removes_what_no_process_uses(own_cache: Path) -> None:
    used = fill("used", 3 << 20)
    os.close(fill("free", 5 << 20))
    os.close(fill("other", 7 << 20, "features"))
    (found,) = list_cache(CacheWish())
    sizes = {f"{entry.kind}/{entry.name}": entry.size_bytes >> 20 for entry in found.entries}
    assert sizes == {"datasets/used": 3, "datasets/free": 5, "features/other": 7}
    assert [entry.name for entry in found.entries if entry.in_use] == ["used"]
    assert "15.0 MiB" in cache_text([found])

    (cleared,) = clear_cache(CacheWish("datasets"))
    assert cache_json([cleared])[0]["removed"] == ["datasets/free"]
    assert "datasets/used" in cleared_text([cleared])
    assert (own_cache / "datasets" / "used" / "data").is_file() and not (own_cache / "datasets" / "free").exists()
    assert (own_cache / "features" / "other").is_dir()
    fcntl.flock(used, fcntl.LOCK_UN)
    os.close(used)
    assert clear_cache(CacheWish())[0].removed == 2


def test_only_what_was_not_used_for_days_is_removed(own_cache: Path) -> None:
    for name, days in (("old", 40), ("new", 2)):
        os.close(fill(name, 1))
        then = time.time() - days * 86_400
        os.utime(own_cache / "datasets" / f"{name}.lock", (then, then))
    (cleared,) = clear_cache(CacheWish(older_than_days=30))
    assert [entry.name for entry in cleared.entries] == ["old"] and cleared.removed == 1
    assert [entry.name for entry in list_cache(CacheWish())[0].entries] == ["new"]


@pytest.mark.ray
def test_cache_of_every_node_is_listed() -> None:
    (found,) = list_cache(CacheWish(), cluster=True)
    assert found.node and found.problem is None
