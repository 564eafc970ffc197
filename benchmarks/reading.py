"""Reading benchmarks: random rows of latents from memory-mapped shards, as training reads them."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from patchloom.benchmarks.datasets import open_shards
from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread, interleave
from patchloom.benchmarks.limits import copy_bytes_per_second
from patchloom.platform.dataset.prepared import Dataset, write_shard

SHAPE, SHARD_ROWS = (4, 32, 32), 512
BATCH, BATCHES = 64, 200
LATENTS_WANTED = 20_000.0


def random_rows(scale: Scale, say: Say) -> list[Finding]:
    """Latents per second (mean and std), compared with numpy indexing of one memory-mapped array per column."""
    shards = max(1, scale.images // SHARD_ROWS)
    batches = min(BATCHES, scale.images)
    with tempfile.TemporaryDirectory() as folder:
        dataset = latents_on_disk(Path(folder) / "dataset", shards)
        columns = mapped_columns(Path(folder), shards)
        generator = np.random.default_rng(0)

        def read_dataset() -> int:
            for _ in range(batches):
                dataset.rows(generator.integers(0, len(dataset), BATCH))
            return BATCH * batches

        def read_numpy() -> int:
            for _ in range(batches):
                rows = generator.integers(0, len(dataset), BATCH)
                _ = {name: column[rows] for name, column in columns.items()}
            return BATCH * batches

        dataset.verify()
        timings = interleave({"ours": read_dataset, "numpy": read_numpy}, 2 * scale.rounds, 1, say)
    row_bytes = sum(column[0].nbytes for column in columns.values())
    limit = copy_bytes_per_second(torch.device("cpu")) / row_bytes
    share = Spread.of([100 * rate / limit for rate in timings.wall_rates["ours"]])
    why = "a copy in memory"
    name = f"random reads of {SHAPE} latents, mean and std"
    return [
        Finding(name, timings.rate("ours"), "latents/s", limit, why, LATENTS_WANTED),
        Finding("  over numpy indexing of a memory-mapped file", timings.ratio("ours", "numpy"), "x"),
        Finding("  share of the limit", share, "%", 100.0, why),
        Finding("  bytes per latent", exact(float(row_bytes)), "bytes"),
    ]


def latents_on_disk(folder: Path, shards: int) -> Dataset:
    """A dataset of float16 noise, as `prepare` writes it."""
    (folder / "shards").mkdir(parents=True)
    described = []
    for number in range(shards):
        path = folder / "shards" / f"part-{number:05d}.arrow"
        keys = [f"{number}-{row}" for row in range(SHARD_ROWS)]
        described.append(write_shard(path, keys, [0] * SHARD_ROWS, _moments()))
    return open_shards(folder, "latents", _moments()["mean"].shape[1:], described)


def mapped_columns(folder: Path, shards: int) -> dict[str, np.ndarray]:
    """The same rows as one memory-mapped .npy file per column."""
    columns: dict[str, np.ndarray] = {"label": np.zeros(shards * SHARD_ROWS, np.int32)}
    for name, values in _moments().items():
        np.save(folder / f"{name}.npy", np.tile(values, (shards, 1, 1, 1)))
        columns[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return columns


def _moments() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal((SHARD_ROWS, *SHAPE)).astype(np.float16) for name in ("mean", "std")}
