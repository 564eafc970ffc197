"""Real data: CIFAR-10 in an array and photographs in a zip are prepared bit for bit."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED_DATA
from PIL import Image

from patchloom.pipelines.prepare import prepare
from patchloom.platform.dataset import Dataset

pytestmark = pytest.mark.ray
SHARED = SHARED_DATA


def real(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"no {name} in {SHARED}: real images are not tested")
    return SHARED / name


def assert_holds(dataset: Dataset, images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    """Every pixel and label in their order, (N, H, W, C) and (N,); the card's statistics are numpy's."""
    rows = dataset.rows(range(len(images)))
    assert len(dataset) == dataset.card["inputs"] == len(images)
    assert np.array_equal(rows["image"].transpose(0, 2, 3, 1), images)
    assert np.array_equal(rows["label"], labels)
    counts = Counter(labels.tolist())
    wanted = [{"name": name, "rows": counts[number]} for number, name in enumerate(class_names)]
    assert dataset.card["classes"] == wanted
    np.testing.assert_allclose(dataset.card["mean"], images.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(dataset.card["std"], images.std((0, 1, 2), dtype=np.float64), rtol=1e-6)


def test_cifar_pixels_are_unchanged(ray_cluster: None, tmp_path: Path) -> None:
    path = real("cifar10_lossless_19k.npz")
    dataset = prepare(str(path), str(tmp_path / "out"), resolution=32)
    with np.load(path) as arrays:
        assert_holds(dataset, arrays["images"], arrays["labels"], arrays["class_names"].tolist())
    assert [entry["rows"] for entry in dataset.card["classes"]] == [1900] * 10


def test_photographs_in_a_zip_are_unchanged(ray_cluster: None, tmp_path: Path) -> None:
    path = real("caltech101_64.zip")
    dataset = prepare(str(path), str(tmp_path / "out"), resolution=64)
    with zipfile.ZipFile(path) as archive:
        card = json.loads(archive.read("dataset.json"))
        names = [name for name in archive.namelist() if name.endswith(".png")]
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names])
    labels = dict(card["labels"])
    assert len(names) == 7426 and len(card["classes"]) == 99
    assert_holds(dataset, images, np.array([labels[name] for name in names]), card["classes"])
