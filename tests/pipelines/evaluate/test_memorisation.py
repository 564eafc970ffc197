"""Memorisation: copies of training images are found, and held-out images are the chance level."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import dataset_card
from scipy.spatial.distance import cdist

from patchloom.models.metrics import colour_layout
from patchloom.pipelines.evaluate.memorisation import memorised_shares
from patchloom.platform.dataset.prepared import Dataset, open_dataset, write_shard
from patchloom.platform.files.storage import write_json

IMAGES = np.random.default_rng(5).integers(0, 256, (120, 3, 16, 16), dtype=np.uint8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "shards").mkdir(parents=True)
    path = folder / "shards" / "part-00000.arrow"
    entry = write_shard(path, [f"{row:03d}" for row in range(120)], [0] * 120, {"image": IMAGES})
    write_json(folder / "dataset.json", dataset_card([entry.to_dict()], resolution=16))
    return open_dataset(folder)


def npz_of(path: Path, images: np.ndarray) -> str:
    np.savez(path, images=images.transpose(0, 2, 3, 1))
    return str(path)


def share_of(images: np.ndarray, train: np.ndarray) -> float:
    """The share of images whose nearest training image has no other training image as near, from all distances."""
    features, real = (colour_layout(torch.from_numpy(part)).double().numpy() for part in (images, train))
    among = cdist(real, real) + np.diag(np.full(len(real), np.inf))
    distances = cdist(features, real)
    nearest = distances.argmin(1)
    return float((distances.min(1) <= among.min(1)[nearest]).mean())


@pytest.mark.parametrize("images", [10, 40, None])
def test_shares_are_those_among_the_training_images(dataset: Dataset, images: int | None, tmp_path: Path) -> None:
    train, held_out = dataset.split("train", 0.3, images), dataset.split("held_out", 0.3)
    used, unseen = IMAGES[train.indices()], IMAGES[held_out.indices()]
    others = np.random.default_rng(6).integers(0, 256, (50, 3, 16, 16), dtype=np.uint8)
    for name, samples in {"copies": used[:8], "unseen": unseen, "others": others}.items():
        path = npz_of(tmp_path / f"{name}.npz", samples)
        found = memorised_shares(path, dataset.address, train, held_out, "colours")
        assert found is not None
        assert found.samples == pytest.approx(share_of(samples, used))
        assert found.held_out == pytest.approx(share_of(unseen, used))
        if name == "copies":
            assert found.samples == 1
        if name == "unseen":
            assert found.samples == found.held_out


def test_what_cannot_be_measured_has_no_share(dataset: Dataset, tmp_path: Path) -> None:
    path = npz_of(tmp_path / "images.npz", IMAGES[:5])
    held_out = dataset.split("held_out", 0.3)
    assert memorised_shares(path, dataset.address, dataset.split("train", 0.3, 1), held_out, "colours") is None
    found = memorised_shares(path, dataset.address, dataset.split("train", 0), dataset.split("held_out", 0), "colours")
    assert found is not None and found.samples == 1 and found.held_out is None
