"""Datasets of benchmarks: shards that were just written, as a dataset without statistics."""

from pathlib import Path
from typing import Literal

from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.records.dataset import DatasetCard, ShardFile, SkippedInputs


def open_shards(
    folder: Path, kind: Literal["pixels", "latents"], shape: tuple[int, ...], shards: list[ShardFile]
) -> Dataset:
    """A dataset of these shards, without statistics or a card on disk.

    Args:
        folder: the folder of the dataset.
        kind: what the rows are.
        shape: (C, H, W) of a row.
        shards: what `write_shard` returned for each shard.
    """
    rows = sum(shard.rows for shard in shards)
    card = DatasetCard(
        format_version=1, kind=kind, resolution=shape[-1], channels=shape[0],
        dtype="uint8" if kind == "pixels" else "float16", rows=rows, inputs=rows,
        skipped=SkippedInputs(count=0, reasons={}), classes=[], mean=[], std=[], transform=None, autoencoder=None,
        source_sha256="", preparation="", shards=shards,
    )  # fmt: skip
    return Dataset(folder, card)
