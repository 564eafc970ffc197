"""Transforms: images are cropped and resized as the card says, without aliasing; small images are skipped."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.images import Transform

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def applied(pixels: np.ndarray, transform: Transform) -> np.ndarray:
    return transform.apply(Image.fromarray(pixels))


def test_box_filter_is_the_mean_of_its_box() -> None:
    middle = PIXELS[:, 4:16]
    wanted = middle.reshape(4, 3, 4, 3, 3).mean((1, 3), dtype=np.float64)
    assert np.abs(applied(PIXELS, Transform(4, resize="box")) - wanted).max() <= 1  # rounded after rows and columns


@pytest.mark.parametrize("resize", ["lanczos", "box", "bicubic", "bilinear"])
def test_no_filter_aliases(resize: str) -> None:
    board = np.indices((96, 96)).sum(0) % 2 * 255
    small = applied(board.astype(np.uint8), Transform(24, resize=resize))
    assert small.shape == (24, 24, 1)
    assert np.abs(small.astype(int) - 127.5).max() < 8  # every fourth pixel alone would be black or white


def test_dhariwal_crop_of_a_wide_image_is_its_center() -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    assert (applied(wide, Transform(8, crop="dhariwal"))[:, 1:7] == 200).all()
    assert np.array_equal(applied(PIXELS[:8], Transform(8, crop="dhariwal")), PIXELS[:8, 6:14])


def test_crop_none_needs_images_of_the_resolution() -> None:
    assert np.array_equal(applied(PIXELS[:, :12], Transform(12, crop="none")), PIXELS[:, :12])
    with pytest.raises(ValueError, match=r"20x12.*12x12"):
        applied(PIXELS, Transform(12, crop="none"))


@pytest.mark.ray
def test_small_images_are_skipped_and_the_card_has_the_transform(ray_cluster: None, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for name, side in (("large.png", 12), ("small.png", 7), ("just.png", 8)):
            file = io.BytesIO()
            Image.fromarray(PIXELS[:side]).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    dataset = prepare(
        str(tmp_path / "some.zip"), str(tmp_path / "out"), resolution=4, resize="box", min_side=8, channels=1
    )
    assert list(dataset.rows([0, 1])["key"]) == ["large.png", "just.png"]
    assert dataset.card["skipped"]["reasons"] == {"is 20x7, smaller than --min-side 8": 1}
    expected = {"resolution": 4, "crop": "center", "resize": "box", "antialias": True, "channels": 1, "min_side": 8}
    assert expected.items() <= dataset.card.transform.to_dict().items()
    grey = PIXELS[:, 4:16] @ np.array([0.299, 0.587, 0.114])
    wanted = grey.reshape(4, 3, 4, 3).mean((1, 3))
    assert np.abs(dataset.rows([0])["image"][0, 0] - wanted).max() <= 2
    assert (dataset.card["channels"], dataset.card["resolution"]) == (1, 4)
