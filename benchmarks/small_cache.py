"""The small-cache benchmark: two epochs on a dataset at a store through a cache that holds a quarter of it."""

import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patchloom.benchmarks.datasets import write_dataset
from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.growth import DELAY_S, upload
from patchloom.benchmarks.slow_store import slow_store
from patchloom.benchmarks.startup import HELD_OUT, Workspace, patchloom, small_recipe
from patchloom.platform.dataset.prepared import DATASETS, open_dataset
from patchloom.platform.files.cache import CACHE, CACHE_GIB
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe.run_recipe import with_values
from patchloom.platform.records.run import ProgressLine, read_progress, training_seconds

SHARDS, WINDOW_SHARDS = 64, 4
CACHE_SHARE, EPOCHS = 0.25, 2
WAITING_WANTED = 5.0
LOOK_EVERY_S = 0.02


def two_epochs(scale: Scale, say: Say) -> list[Finding]:
    """The share of time that training waits for rows. The store delays each request, and has a core of its own."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    of_store, of_run = (cores[-1:], cores[:-1]) if len(cores) > 1 else ([], cores)
    scale = replace(scale, width=8, blocks=1)  # a fast network, which needs many rows
    shard_rows = max(2, scale.images // SHARDS)
    with tempfile.TemporaryDirectory() as scratch, slow_store(DELAY_S, of_store) as store:
        workspace = Workspace(Path(scratch))
        say("writing the dataset")
        write_dataset(Path(workspace.dataset), (3, scale.side, scale.side), [shard_rows] * SHARDS)
        address = upload(Path(workspace.dataset), f"{store.address}/dataset")
        size_bytes = sum(Folder(workspace.dataset).files().values())
        window, rows = WINDOW_SHARDS * shard_rows, len(open_dataset(workspace.dataset).split("train", HELD_OUT))
        recipe = with_values(
            small_recipe(scale, images=EPOCHS * rows), {"data.order": "windowed", "data.window_rows": window}
        )
        run, cache = workspace.folder / "run", workspace.folder / "cache"
        environment = {CACHE: str(cache), CACHE_GIB: str(CACHE_SHARE * size_bytes / 2**30)}
        arguments = ("train", workspace.write_recipe("recipe", recipe), "--data", address, "--out", str(run))
        before = store.requests()
        with (
            LargestSize(cache / DATASETS) as largest,
            workspace.running(*patchloom(*arguments, "--workers", "0"), **environment) as process,
        ):
            if of_store:
                os.sched_setaffinity(process.pid, of_run)
            say("two epochs")
            process.wait()
        requests = store.requests() - before
        lines = read_progress(run)
    return [
        Finding("waiting for rows, after the first window", exact(100 * waiting_share(lines, window)), "%",
                wanted=WAITING_WANTED, is_cost=True),
        Finding("waiting for rows, from the start", exact(100 * waiting_share(lines, 0)), "%", is_cost=True),
        Finding("largest size of the cache", exact(100 * largest.bytes / (CACHE_SHARE * size_bytes)), "%",
                100.0, "PATCHLOOM_CACHE_GIB, a quarter of the dataset", 100.0, is_cost=True),
        Finding("requests per shard and epoch", exact(requests / SHARDS / EPOCHS), "requests", is_cost=True),
        Finding("rate of training", exact(lines[-1].images_seen / training_seconds(lines)[-1]), "images/s"),
        Finding("read from the store", exact(EPOCHS * size_bytes / 1e6 / training_seconds(lines)[-1]), "MB/s"),
    ]  # fmt: skip


def waiting_share(lines: Sequence[ProgressLine], first_image: int) -> float:
    """The share of the time of these lines, from a counted image on, that training spent waiting for rows."""
    seconds, before, waited, total = 0.0, 0, 0.0, 0.0
    for line in lines:
        seconds = (line.images_seen - before) / line.images_per_second
        if before >= first_image:
            waited, total = waited + line.data_wait_share * seconds, total + seconds
        before = line.images_seen
    return waited / total


class LargestSize:
    """Looks at the size of a folder during a block; `bytes` is the largest size that it saw."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self._is_done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "LargestSize":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._is_done.wait(LOOK_EVERY_S):
            self.bytes = max(self.bytes, sum(max(0, size) for size in Folder(str(self.path)).files().values()))
