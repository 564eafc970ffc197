"""Datasets of benchmarks: shards that were just written, as a dataset without statistics, or as one on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from patchloom.platform.dataset.index import INDEX_FILE, unit_hashes, write_hashes
from patchloom.platform.dataset.prepared import CARD, Dataset, write_shard
from patchloom.platform.dataset.shard_table import shard_name
from patchloom.platform.files.storage import file_sha256, write_json
from patchloom.platform.records.dataset import DatasetCard, IndexFile, ShardFile, SkippedInputs

NOISE_MEAN, NOISE_STD = 127.5, 73.9  # of uniformly distributed pixels


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


def write_dataset(folder: Path, shape: tuple[int, int, int], rows_of_shards: Sequence[int]) -> None:
    """Write a dataset of noise with an index, as `prepare` does. All shards have the same pixels and other keys.

    Args:
        folder: a new folder.
        shape: (C, H, W) of a row; H = W.
        rows_of_shards: the number of rows of each shard.
    """
    (folder / "shards").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (max(rows_of_shards), *shape), np.uint8)
    shards: list[ShardFile] = []
    with (folder / INDEX_FILE).open("wb") as index:

        def parts() -> Iterator[np.ndarray]:
            for number, rows in enumerate(rows_of_shards):
                keys = [f"{number}-{row}" for row in range(rows)]
                shards.append(write_shard(folder / shard_name(number), keys, [-1] * rows, {"image": pixels[:rows]}))
                yield unit_hashes(keys, "key")

        indexed = write_hashes(index, parts())
    index_bytes, sha256 = (folder / INDEX_FILE).stat().st_size, file_sha256(folder / INDEX_FILE)
    card = open_shards(folder, "pixels", shape, shards).card
    described = IndexFile(file=INDEX_FILE, rows=indexed, bytes=index_bytes, sha256=sha256)
    card = card.model_copy(update={"mean": [NOISE_MEAN] * shape[0], "std": [NOISE_STD] * shape[0], "index": described})
    write_json(folder / CARD, card.to_dict())
