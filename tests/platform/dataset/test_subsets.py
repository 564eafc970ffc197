"""Subsets: exactly so many of the rows for training, the same ones for every run, and fewer as a part of more."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import dataset_card

from patchloom.errors import UserError
from patchloom.platform.dataset.index import highest_ranked
from patchloom.platform.dataset.prepared import Dataset, open_dataset, write_shard
from patchloom.platform.files.storage import write_json

FRACTION = 0.2


def hash_of(unit: str) -> int:
    return int(hashlib.sha256(unit.encode()).hexdigest()[:16], 16)


def dataset_of(folder: Path, keys: list[str], **card: object) -> Dataset:
    """A dataset of 1 x 1 images in shards of 50 rows."""
    (folder / "shards").mkdir(parents=True)
    entries = []
    for number, first in enumerate(range(0, len(keys), 50)):
        part = keys[first : first + 50]
        images = np.zeros((len(part), 1, 1, 1), np.uint8)
        path = folder / "shards" / f"part-{number:05d}.arrow"
        entries.append(write_shard(path, part, [0] * len(part), {"image": images}).to_dict())
    write_json(folder / "dataset.json", dataset_card(entries, resolution=1, channels=1, **card))
    return open_dataset(folder)


def chosen(dataset: Dataset, images: int) -> list[int]:
    found: list[int] = dataset.split("train", FRACTION, images).indices().tolist()
    return found


def test_the_images_are_those_with_the_highest_hashes(tmp_path: Path) -> None:
    keys = [f"{number:04d}" for number in range(730)]
    dataset = dataset_of(tmp_path / "data", keys)
    train = [row for row, key in enumerate(keys) if hash_of(key) >= FRACTION * 2**64]
    by_hash = sorted(train, key=lambda row: -hash_of(keys[row]))
    held_out = dataset.indices("held_out", FRACTION).tolist()
    for images in (1, 2, 50, 300, len(train) - 1, len(train)):
        split = dataset.split("train", FRACTION, images)
        assert chosen(dataset, images) == sorted(by_hash[:images]) and len(split) == images
        assert split.rows(range(images)).tolist() == chosen(dataset, images)
        assert split.starts.tolist() == [
            sum(row < start for row in by_hash[:images]) for start in [*range(0, 730, 50), 730]
        ]
        assert dataset.split("held_out", FRACTION, images).indices().tolist() == held_out
    assert set(chosen(dataset, 300)) == set(dataset.split("train", 0.5, 300).indices())  # with more rows held out
    with pytest.raises(UserError, match=rf"data\.images.*{len(train)}") as refused:
        dataset.split("train", FRACTION, len(train) + 1)
    assert re.search(r"\n", str(refused.value)) is None


def test_a_mirror_image_is_chosen_with_its_image(tmp_path: Path) -> None:
    keys = [f"{number:04d}{end}" for number in range(200) for end in ("", "#mirror")]
    images = dataset_of(tmp_path / "images", keys[::2])
    for split_by in ("key", "region"):
        mirrored = dataset_of(tmp_path / split_by, keys, mirror=True, split_by=split_by)
        for count in (2, 60, 61):
            pairs = Counter(row // 2 for row in chosen(mirrored, count))
            assert sum(pairs.values()) == count and list(pairs.values()).count(1) == count % 2
    for count in (1, 30):  # the same images as without mirror images
        same = [row for image in chosen(images, count) for row in (2 * image, 2 * image + 1)]
        assert chosen(open_dataset(tmp_path / "key"), 2 * count) == same


def test_windows_are_chosen_from_all_regions(tmp_path: Path) -> None:
    keys = [f"photo@{region:02d}#{window:02d}" for region in range(40) for window in range(25)]
    dataset = dataset_of(tmp_path / "data", keys, split_by="region")
    train = set(dataset.indices("train", FRACTION))
    regions = {row // 25 for row in train}
    assert len(train) == 25 * len(regions) < 1000
    for fewer, more in pairwise((1, 10, 100, 400, len(train))):
        assert (
            len(chosen(dataset, fewer)) == fewer and set(chosen(dataset, fewer)) < set(chosen(dataset, more)) <= train
        )
    of_region = Counter(row // 25 for row in chosen(dataset, 400))
    assert of_region.keys() == regions  # about 12 each
    assert max(of_region.values()) < 22


@pytest.mark.parametrize("count", [1, 7, 40, 299, 300])
def test_rows_with_equal_ranks_are_chosen_in_their_order(count: int) -> None:
    generator = np.random.default_rng(0)
    ranks = generator.choice(np.array([0, 1, 2**47, 2**48 - 1, 2**48, 2**63, 2**64 - 1], np.uint64), 500)
    allowed = np.zeros(500, bool)
    allowed[generator.permutation(500)[:300]] = True

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from zip(np.split(allowed, [3, 320]), np.split(ranks, [3, 320]), strict=True)

    order = sorted(np.flatnonzero(allowed).tolist(), key=lambda row: (-int(ranks[row]), row))
    assert np.flatnonzero(np.concatenate(list(highest_ranked(parts, count)))).tolist() == sorted(order[:count])
    with pytest.raises(ValueError, match="300"):
        list(highest_ranked(parts, 301))
