"""Conditions of a dataset: matched by key, cropped and resized like the image, never silently missing."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import photograph, shard_hashes
from PIL import Image
from skimage.feature import canny

from patchloom.errors import UserError
from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.conditions import depth_to_space
from patchloom.pipelines.inspect import inspect
from patchloom.pipelines.prepare import prepare
from patchloom.platform.dataset.condition_source import condition_key
from patchloom.platform.files.folder import Folder

SIDE = 16


def write_photographs(folder: Path, count: int = 8, size: tuple[int, int] = (48, 32), ending: str = "png") -> None:
    folder.mkdir(parents=True)
    pixels = photograph("chelsea.png")
    for number in range(count):
        x, y = 40 + 20 * number, 30 + 12 * number
        image = Image.fromarray(pixels[y : y + 2 * size[1] : 2, x : x + 2 * size[0] : 2])
        image.save(folder / f"{number:02d}.{ending}", quality=95)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditions") / "photographs"
    write_photographs(folder)
    return folder


def make(source: Path, out: Path, **options: Any) -> Any:
    return prepare(str(source), str(out), workers=0, **{"resolution": SIDE, **options})


@pytest.mark.parametrize("crop", ["center", "dhariwal", "windows"])
def test_a_condition_that_is_the_image_is_cropped_and_resized_like_it(
    photographs: Path, tmp_path: Path, crop: str
) -> None:
    (tmp_path / "same").mkdir()
    for path in photographs.iterdir():
        (tmp_path / "same" / path.name).write_bytes(path.read_bytes())
    options: dict[str, Any] = {"short_side": 24, "stride": 5} if crop == "windows" else {}
    made = make(photographs, tmp_path / "out", crop=crop, condition=str(tmp_path / "same"), shard_rows=3, **options)
    rows = made.rows(range(len(made)))
    assert rows["condition"].dtype == np.uint8 and np.array_equal(rows["condition"], rows["image"])
    plain = make(photographs, tmp_path / "plain", crop=crop, shard_rows=3, **options)
    assert np.array_equal(plain.rows(range(len(plain)))["image"], rows["image"])
    assert plain.card.condition is None and "condition" not in plain.card.to_dict()
    condition = made.card["condition"]
    assert condition["channels"] == 3 and condition["downscale"] == 1
    np.testing.assert_allclose(condition["mean"], made.card["mean"])
    np.testing.assert_allclose(condition["std"], made.card["std"])
    inspect(str(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "bool"])
@pytest.mark.parametrize("packed", [False, True])
def test_arrays_of_any_number_of_channels(tmp_path: Path, dtype: str, packed: bool) -> None:
    write_photographs(tmp_path / "images", 6, (SIDE, SIDE))
    random, folder = np.random.default_rng(0), tmp_path / "fields"
    folder.mkdir()
    values = (random.normal(280, 20, (6, SIDE, SIDE, 5))).clip(0, 500)
    values = values > 280 if dtype == "bool" else (values / 4 if dtype == "uint8" else values).astype(dtype)
    for number in range(6):
        np.save(folder / f"{number:02d}.npy", values[number])
    address = folder
    if packed:
        address = tmp_path / "fields.zip"
        with zipfile.ZipFile(address, "w") as archive:
            for path in sorted(folder.iterdir(), reverse=True):
                archive.write(path, path.name)
    made = make(tmp_path / "images", tmp_path / "out", crop="none", condition=str(address), shard_rows=4)
    stored = {"float64": "float32", "bool": "uint8"}.get(dtype, dtype)
    wanted = (values * np.uint8(255) if dtype == "bool" else values).astype(stored).transpose(0, 3, 1, 2)
    found = made.rows(range(6))["condition"]
    assert found.dtype == stored and np.array_equal(found, wanted)
    assert made.card["condition"]["dtype"] == stored
    np.testing.assert_allclose(made.card["condition"]["mean"], wanted.astype(np.float64).mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(made.card["condition"]["std"], wanted.astype(np.float64).std((0, 2, 3)), rtol=1e-9)
    inspect(str(tmp_path / "out"))


def test_float_fields_are_averaged_like_pixels(tmp_path: Path) -> None:
    """A box filter that halves the resolution takes the mean of 2 x 2 values, of arrays too."""
    write_photographs(tmp_path / "images", 3, (2 * SIDE, 2 * SIDE))
    values = np.random.default_rng(0).normal(size=(3, 2 * SIDE, 2 * SIDE, 2)).astype(np.float32)
    (tmp_path / "fields").mkdir()
    for number in range(3):
        np.save(tmp_path / "fields" / f"{number:02d}.npy", values[number])
    made = make(tmp_path / "images", tmp_path / "out", resize="box", condition=str(tmp_path / "fields"))
    wanted = values.reshape(3, SIDE, 2, SIDE, 2, 2).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(made.rows(range(3))["condition"], wanted, atol=1e-6)


def test_inputs_without_a_condition_that_fits_are_counted_as_skipped(photographs: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(8):
        Image.new("L", (48, 32), 20 * number).save(masks / f"{number:02d}.png")
    (masks / "01.png").unlink()
    (masks / "02.png").write_bytes(b"damaged")
    Image.new("L", (32, 32)).save(masks / "03.png")  # of another part of the image
    Image.new("RGB", (48, 32)).save(masks / "04.png")
    np.save(masks / "05.npy", np.zeros((48, 32, 1), np.uint8))
    Image.new("L", (24, 16), 120).save(masks / "06.png")  # half of the size
    Image.new("L", (48, 32)).save(masks / "unused.png")
    made = make(photographs, tmp_path / "out", condition=str(masks), min_side=32)  # of images, not of masks
    assert [made.rows([row])["key"][0] for row in range(len(made))] == ["00.png", "05.png", "06.png", "07.png"]
    assert np.array_equal(made.rows(range(4))["condition"][:, 0, 0, 0], [0, 100, 120, 140])
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in skipped] == ["01.png", "02.png", "03.png", "04.png"]
    assert made.card.rows + made.card.skipped.count == made.card.inputs == 8
    assert str(tmp_path) not in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_a_source_without_conditions_is_refused(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images or"):
        make(photographs, tmp_path / "out", condition=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="does not exist"):
        make(photographs, tmp_path / "out", condition=str(tmp_path / "nowhere"))
    write_photographs(tmp_path / "others", 1)
    (tmp_path / "others" / "00.png").rename(tmp_path / "others" / "other.png")
    with pytest.raises(UserError, match="has no condition"):
        make(photographs, tmp_path / "out", condition=str(tmp_path / "others"))
    assert not (tmp_path / "out" / "dataset.json").exists()
    for option in ("low-res", "low-res:3", "low-res:1"):
        with pytest.raises(UserError, match="low-res"):
            make(photographs, tmp_path / "out", condition=option)


@pytest.mark.parametrize("channels", [1, 3])
def test_edges_are_those_of_canny_of_the_prepared_image(photographs: Path, tmp_path: Path, channels: int) -> None:
    made = make(photographs, tmp_path / "out", resolution=32, channels=channels, condition="edges")
    rows = made.rows(range(8))
    for image, found in zip(rows["image"], rows["condition"], strict=True):
        picture = Image.fromarray(image.transpose(1, 2, 0).squeeze()).convert("L")
        wanted = canny(np.asarray(picture) / 255, sigma=1.0)
        assert found.shape == (1, 32, 32) and np.array_equal(found[0] > 0, wanted)
    assert set(np.unique(rows["condition"])) == {0, 255}


def test_low_resolution_images_keep_what_is_coarse_and_lose_what_is_fine(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    checks = np.indices((32, 32)).sum(0) % 2 * 255
    coarse = np.kron([[0, 255], [255, 0]], np.ones((16, 16))).astype(np.uint8)
    for name, values in (("a", np.full((32, 32), 77)), ("b", checks), ("c", coarse)):
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "images" / f"{name}.png")
    made = make(tmp_path / "images", tmp_path / "out", resolution=32, channels=1, condition="low-res:4")
    flat, checked, halves = made.rows(range(3))["condition"][:, 0].astype(int)
    assert (flat == 77).all() and abs(checked[8:-8, 8:-8] - 127.5).max() < 8
    assert abs(halves[2:6, 2:6]).max() < 16 and abs(halves[2:6, -6:-2] - 255).max() < 16
    assert made.card["condition"]["factor"] == 4


def test_shards_do_not_depend_on_what_was_made_before(photographs: Path, tmp_path: Path) -> None:
    whole = make(photographs, tmp_path / "whole", condition="edges", shard_rows=3)
    again = make(photographs, tmp_path / "again", condition="edges", shard_rows=3)
    assert shard_hashes(tmp_path / "whole") == shard_hashes(tmp_path / "again")
    assert whole.fingerprint == again.fingerprint
    for option in ("low-res:2", None):
        with pytest.raises(UserError, match="another dataset"):
            make(photographs, tmp_path / "whole", condition=option, shard_rows=3)


def test_conditions_of_latents_are_those_of_the_pixels_and_mirrored_with_them(
    photographs: Path, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (tmp_path / "ae").mkdir()
        save_autoencoder(new_autoencoder((8, 8, 8), 2), tmp_path / "ae")
    pixels = make(photographs, tmp_path / "pixels", condition="edges")
    options: dict[str, Any] = {"autoencoder": str(tmp_path / "ae"), "mirror": True}
    latents = make(photographs, tmp_path / "latents", condition="edges", **options)
    encoded = prepare(str(pixels.path), str(tmp_path / "encoded"), workers=0, **options)
    downscale = latents.card["autoencoder"]["downscale"]
    shown = pixels.rows(range(8))["condition"]
    for made in (latents, encoded):
        found = made.rows(range(16))["condition"]
        assert found.shape == (16, downscale**2, SIDE // downscale, SIDE // downscale)
        assert np.array_equal(depth_to_space(found[::2], downscale), shown)
        assert np.array_equal(depth_to_space(found[1::2], downscale), shown[..., ::-1])
        assert made.card["condition"]["downscale"] == downscale and made.card["condition"]["channels"] == 1
        np.testing.assert_allclose(made.card["condition"]["mean"], pixels.card["condition"]["mean"])
    with pytest.raises(UserError, match="leave --condition out"):
        prepare(str(pixels.path), str(tmp_path / "other"), condition="edges", workers=0, **options)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("a/b.png", "a/b"), ("./a/b.JPG", "a/b"), ("a\\b.npy", "a/b"), ("b.tar.png", "b.tar"), ("7", "7"), ("x.y", "x.y")],
)
def test_keys_match_without_the_ending_of_the_file(key: str, wanted: str) -> None:
    assert condition_key(key) == wanted


@pytest.mark.ray
def test_workers_make_the_same_bytes(photographs: Path, tmp_path: Path) -> None:
    for name, workers in (("alone", 0), ("workers", 2)):
        options: dict[str, Any] = {"condition": str(photographs), "shard_rows": 3, "workers": workers}
        prepare(str(photographs), str(tmp_path / name), resolution=SIDE, **options)
    assert shard_hashes(tmp_path / "alone") == shard_hashes(tmp_path / "workers")
    assert (tmp_path / "alone" / "dataset.json").read_bytes() == (tmp_path / "workers" / "dataset.json").read_bytes()


def test_conditions_in_a_store_are_those_of_a_folder(photographs: Path, s3: str, tmp_path: Path) -> None:
    remote = Folder(f"{s3}/conditions")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(photographs.iterdir()):
            remote.write(f"files/{path.name}", path.read_bytes())
            archive.write(path, path.name)
    remote.put(tmp_path / "all.zip", "all.zip")
    wanted = make(photographs, tmp_path / "local", condition=str(photographs)).rows(range(8))["condition"]
    for name in ("files", "all.zip"):
        made = make(photographs, tmp_path / f"from {name}", condition=f"{s3}/conditions/{name}")
        assert np.array_equal(made.rows(range(8))["condition"], wanted)
