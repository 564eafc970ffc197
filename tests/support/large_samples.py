"""Large folders of samples and datasets, written directly, with few different images."""

import json
from pathlib import Path

import numpy as np

from patchloom.pipelines.sample.formats import FORMATS, EncodedImage, content_sha256
from patchloom.pipelines.sample.sampling import sample
from patchloom.platform.dataset.prepared import write_shard
from patchloom.platform.records.samples import ManifestEntry

DIFFERENT = 64
SHARD_IMAGES, SHARD_ROWS = 1000, 8192


def some_images(side: int) -> np.ndarray:
    """(64, 3, side, side) different images."""
    return np.random.default_rng(0).integers(0, 256, (DIFFERENT, 3, side, side), dtype=np.uint8)


def write_samples(model: Path, folder: Path, count: int, format: str = "zip", side: int = 8) -> Path:
    """A folder with seeds 0 to count - 1, whose card is that of a call of `sample`. Classes take turns."""
    sample(str(model), str(folder), "0", format=format, steps=1, workers=0)
    images = [FORMATS[format].encode(image) for image in some_images(side)]
    digests = [content_sha256(image) for image in images]
    with (folder / "manifest.jsonl").open("w") as manifest:
        for first in range(0, count, SHARD_IMAGES):
            seeds = range(first, min(first + SHARD_IMAGES, count))
            packed = [EncodedImage(seed, seed % 2, images[seed % DIFFERENT]) for seed in seeds]
            file = FORMATS[format].file_of(first, SHARD_IMAGES)
            pack = FORMATS[format].pack
            assert pack is not None
            (folder / file).write_bytes(pack(packed))
            for seed in seeds:
                entry = ManifestEntry(seed=seed, label=seed % 2, file=file, sha256=digests[seed % DIFFERENT])
                manifest.write(json.dumps(entry.to_dict()) + "\n")
    return folder


def write_dataset(pixels: Path, folder: Path, rows: int, side: int = 8) -> Path:
    """A dataset with the card of another one, but for its rows, shards and statistics."""
    (folder / "shards").mkdir(parents=True)
    images, shards = some_images(side), list[dict[str, object]]()
    counts = np.bincount(np.arange(rows) % DIFFERENT, minlength=DIFFERENT)
    for first in range(0, rows, SHARD_ROWS):
        numbers = np.arange(first, min(first + SHARD_ROWS, rows))
        path = folder / "shards" / f"part-{len(shards):05d}.arrow"
        keys = [f"{number:09d}" for number in numbers]
        shard = write_shard(path, keys, [-1] * len(numbers), {"image": images[numbers % DIFFERENT]})
        shards.append(shard.to_dict())
    weighted = images.astype(np.float64) * counts[:, None, None, None]
    mean = weighted.sum((0, 2, 3)) / (rows * side * side)
    squares = (images.astype(np.float64) ** 2 * counts[:, None, None, None]).sum((0, 2, 3)) / (rows * side * side)
    card = json.loads((pixels / "dataset.json").read_text())
    card |= {"rows": rows, "inputs": rows, "resolution": side, "shards": shards, "classes": [], "mean": mean.tolist(),
             "std": np.sqrt(squares - mean**2).tolist(), "skipped": {"count": 0, "reasons": {}}}  # fmt: skip
    (folder / "skipped.jsonl").write_text("")
    (folder / "dataset.json").write_text(json.dumps(card))
    return folder
