"""Prepare: every input is a row or is listed, pixels are those of the source, and a kill loses nothing."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from helpers import run_python, shard_hashes
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.images import Transform
from patchloom.pipelines.prepare.preparing import PrepareJob
from patchloom.platform.dataset import open_dataset

pytestmark = pytest.mark.ray


def test_rows_and_skipped_add_up_to_the_inputs(images: Path, pixels: Path) -> None:
    card = open_dataset(pixels).card
    skipped = [json.loads(line) for line in (pixels / "skipped.jsonl").read_text().splitlines()]
    assert len(list(images.rglob("*.png"))) == card["inputs"] == 49
    assert card["rows"] + len(skipped) == card["inputs"]
    assert [entry["key"] for entry in skipped] == ["chelsea/note.png"]
    assert "UnidentifiedImageError" in skipped[0]["error"]
    assert str(images) not in (pixels / "skipped.jsonl").read_text()


def test_rows_have_the_order_of_the_file_names(images: Path, pixels: Path) -> None:
    rows = open_dataset(pixels).rows(range(48))
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("[0-9]*.png"))
    assert list(rows["key"]) == names
    for name, image, label in zip(names, rows["image"], rows["label"], strict=True):
        with Image.open(images / name) as file:
            assert np.array_equal(image, np.asarray(file).transpose(2, 0, 1))
        assert label == ("chelsea", "coffee").index(name.split("/")[0])


def test_card_has_the_statistics_of_numpy(pixels: Path) -> None:
    dataset = open_dataset(pixels)
    values = dataset.rows(range(48))["image"].astype(np.float64)
    np.testing.assert_allclose(dataset.card["mean"], values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.card["std"], values.std((0, 2, 3)), rtol=1e-12)
    assert dataset.card["classes"] == [{"name": "chelsea", "rows": 24}, {"name": "coffee", "rows": 24}]


def test_bytes_do_not_depend_on_the_number_of_workers(images: Path, pixels: Path, tmp_path: Path) -> None:
    prepare(str(images), str(tmp_path / "again"), resolution=16, shard_rows=20, workers=1)
    assert shard_hashes(tmp_path / "again") == shard_hashes(pixels)
    assert (tmp_path / "again" / "dataset.json").read_bytes() == (pixels / "dataset.json").read_bytes()


def test_short_preparation_does_not_start_ray(images: Path, pixels: Path, tmp_path: Path) -> None:
    out = tmp_path / "here"
    code = (
        "import sys; from patchloom.pipelines.prepare.preparing import prepare; "
        f"prepare({str(images)!r}, {str(out)!r}, resolution=16, shard_rows=20); print('ray' in sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
    assert shard_hashes(out) == shard_hashes(pixels)


def test_unfinished_preparation_continues_and_keeps_finished_shards(
    images: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:  # like a kill between the last shard and the card
        patch.setattr(PrepareJob, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(images), str(folder), resolution=16, shard_rows=20)
    with pytest.raises(UserError, match=str(folder)):
        open_dataset(folder)
    with pytest.raises(UserError, match=r"transform\.resolution.*16.*8.*shard_rows.*20.*30"):
        prepare(str(images), str(folder), resolution=8, shard_rows=30)
    (folder / ".work" / "notes" / "part-00001.json").unlink()  # as if this shard were unfinished
    kept = (folder / "shards" / "part-00000.arrow").stat().st_mtime_ns
    prepare(str(images), str(folder), resolution=16, shard_rows=20)
    assert (folder / "shards" / "part-00000.arrow").stat().st_mtime_ns == kept
    assert shard_hashes(folder) == shard_hashes(pixels)


def test_second_call_does_nothing_and_other_options_are_an_error(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = prepare(str(images), str(folder), resolution=8)
    written = (folder / "dataset.json").stat().st_mtime_ns
    assert len(prepare(str(images), str(folder), resolution=8)) == len(first)
    assert (folder / "dataset.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=str(folder)):
        prepare(str(images), str(folder), resolution=4)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_key_is_skipped(images: Path, ray_cluster: None, tmp_path: Path) -> None:
    picture = (images / "coffee" / "00.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("a.png", "b.png", "a.png", "a.png"):
            archive.writestr(name, picture)
    dataset = prepare(str(tmp_path / "two.zip"), str(tmp_path / "out"), resolution=16)
    assert list(dataset.rows([0, 1])["key"]) == ["a.png", "b.png"] and len(dataset) == 2
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [{"key": "a.png", "error": "duplicate key"}] * 2
    assert dataset.card["skipped"]["reasons"] == {"duplicate key": 2}


def test_source_without_usable_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*\.png"):
        prepare(str(tmp_path / "empty"), str(tmp_path / "out"), resolution=16)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("text")
    with pytest.raises(UserError, match=r"1 inputs.*UnidentifiedImageError"):
        prepare(str(tmp_path / "bad"), str(tmp_path / "out2"), resolution=16)
    assert not (tmp_path / "out2" / "dataset.json").exists()


def test_folder_with_other_files_is_not_changed(images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=str(tmp_path)):
        prepare(str(images), str(tmp_path), resolution=16)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_held_out_windows_share_no_pixel_with_training_windows(tmp_path: Path) -> None:
    source = tmp_path / "photos" / "cat"
    source.mkdir(parents=True)
    shutil.copy(Path(skimage.__file__).parent / "data" / "chelsea.png", source / "cat.png")
    options = {"resolution": 16, "crop": "windows", "stride": 8, "shard_rows": 40}
    dataset = prepare(str(tmp_path / "photos"), str(tmp_path / "data"), **options)
    prepare(str(tmp_path / "photos"), str(tmp_path / "again"), workers=1, **options)
    assert (tmp_path / "again" / "dataset.json").read_bytes() == (tmp_path / "data" / "dataset.json").read_bytes()
    keys = dataset.rows(range(len(dataset)))["key"]
    corners = [tuple(map(int, key.rsplit("#", 1)[1].split(","))) for key in keys]
    covered = {}
    for split in ("train", "held_out"):
        mask = np.zeros((64, 200), dtype=bool)
        for index in dataset.indices(split, 0.3):
            y, x = corners[index]
            mask[y : y + 16, x : x + 16] = True
        covered[split] = mask
    assert covered["train"].any() and covered["held_out"].any()
    assert not (covered["train"] & covered["held_out"]).any()
    skipped = (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()
    assert len(dataset) + len(skipped) == dataset.card["inputs"]


def test_center_crop() -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    cropped = Transform(4).apply(Image.fromarray(wide))
    assert np.array_equal(cropped, wide[:, 2:6])


def test_dhariwal_crop_halves_with_a_box_filter() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    boxes = pixels.reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    cropped = Transform(4, crop="dhariwal").apply(Image.fromarray(pixels))
    assert np.abs(cropped - boxes).max() <= 1  # Pillow rounds after the rows and after the columns


def test_latents_equal_those_of_diffusers(pixels: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    from patchloom.models.autoencoder import new_autoencoder, save_autoencoder

    torch.manual_seed(0)
    (tmp_path / "ae").mkdir()
    save_autoencoder(new_autoencoder((8, 16), 4), tmp_path / "ae")
    for name in ("model.json", "files.json"):  # as diffusers itself leaves the folder
        (tmp_path / "ae" / name).unlink()
    latents = prepare(str(pixels), str(tmp_path / "latents"), autoencoder=str(tmp_path / "ae"))
    reference = AutoencoderKL.from_pretrained(tmp_path / "ae").eval()
    images, rows = open_dataset(pixels).rows(range(48)), latents.rows(range(48))
    with torch.no_grad():
        posterior = reference.encode(torch.from_numpy(images["image"]) / 127.5 - 1).latent_dist
    np.testing.assert_allclose(rows["mean"], posterior.mean, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(rows["std"], posterior.std, atol=1e-3, rtol=1e-3)
    assert list(rows["key"]) == list(images["key"])
    assert list(rows["label"]) == list(images["label"])
    z = rows["mean"].astype(np.float64), rows["std"].astype(np.float64)
    variance = (z[0] ** 2 + z[1] ** 2).mean((0, 2, 3)) - z[0].mean((0, 2, 3)) ** 2
    np.testing.assert_allclose(latents.card["std"], np.sqrt(variance), rtol=1e-9)
    shutil.rmtree(tmp_path / "ae")
    assert (latents.path / "autoencoder" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": 8}, {"crop": "none"}, {"resize": "box"}, {"channels": 1}, {"min_side": 9}, {"labels": "a.csv"},
        {"image_member": "png"}, {"classes": "first"}, {"split": "train"}, {"short_side": 9}, {"stride": 2},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_images_are_refused_for_a_prepared_dataset(
    options: dict[str, Any], pixels: Path, tmp_path: Path
) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}"):
        prepare(str(pixels), str(tmp_path / "out"), autoencoder="no-such-autoencoder", workers=0, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"short_side": 32}, {"stride": 2}, {"image_member": "input.png"}, {"crop": "dhariwal", "resize": "box"}],
    ids=str,
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--"):
        prepare(str(images), str(tmp_path / "out"), resolution=8, workers=0, **options)
    assert not (tmp_path / "out").exists()


def test_card_has_the_most_common_reasons_and_counts_the_others(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(30):
        side = 10 + number
        Image.new("RGB", (side, side)).save(tmp_path / "images" / f"{number:02d}.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "images" / "last.png")  # the only reason of two images
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "large.png")
    card = prepare(str(tmp_path / "images"), str(tmp_path / "out"), resolution=8, min_side=50, workers=0).card
    reasons = list(card.skipped.reasons.values())
    assert card.skipped.count == 31 and len(reasons) == 21
    assert reasons == [2, *[1] * 19, 10] and card.rows == 1
