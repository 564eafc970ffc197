"""Encoding: latents equal those of the autoencoder itself, for diffusers' classes and for classes of other packages."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import SHARED_DATA, tiny_recipe
from own_codec import TinyPretrained, save_pretrained

from patchloom.errors import UserError
from patchloom.models.autoencoder import load_autoencoder, new_autoencoder, save_autoencoder
from patchloom.pipelines.inspect import inspect
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.pipelines.train.training import train
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe import with_values

pytestmark = pytest.mark.ray
SHARED = SHARED_DATA


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_ALLOW_BACKBONE", "own_codec")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: real images and a real autoencoder were not tried")
    folder = tmp_path_factory.mktemp("photographs") / "some.zip"
    import zipfile

    with zipfile.ZipFile(SHARED / "caltech101_64.zip") as whole, zipfile.ZipFile(folder, "w") as part:
        for name in whole.namelist()[:7000:140]:
            part.writestr(name, whole.read(name))
    return folder


def test_autoencoder_of_another_package(ray_cluster: None, allowed: None, photographs: Path, tmp_path: Path) -> None:
    encoder = save_pretrained(SHARED / "taef2", tmp_path / "taef2")
    pixels = prepare(str(photographs), str(tmp_path / "pixels"), resolution=64)
    latents = prepare(str(photographs), str(tmp_path / "latents"), resolution=64, autoencoder=str(encoder))
    images, rows = (dataset.rows(range(50)) for dataset in (pixels, latents))
    reference = TinyPretrained.load(encoder, "cpu", torch.float32)
    wanted, _ = reference.encode(torch.from_numpy(images["image"]))
    np.testing.assert_allclose(rows["mean"], wanted, atol=1e-3, rtol=1e-3)
    assert "std" not in rows and rows["mean"].shape == (50, 32, 8, 8)
    np.testing.assert_allclose(latents.card["std"], rows["mean"].astype(np.float64).std((0, 2, 3)), rtol=1e-9)
    decoded = load_autoencoder(latents.path / "autoencoder").decode(torch.from_numpy(rows["mean"]).float())
    errors = (decoded.double() - torch.from_numpy(images["image"])).square().mean((1, 2, 3))
    assert float((10 * torch.log10(255**2 / errors)).mean()) > 22  # dB: they are the photographs
    shutil.rmtree(encoder)
    run = train(tiny_recipe(train__images=100), str(latents.path), str(tmp_path / "run"), workers=0)
    made = sample(str(run.folder), str(tmp_path / "samples"), "0-1", steps=2)
    assert json.loads(Path(made.folder, "manifest.jsonl").read_text().splitlines()[0])["seed"] == 0


def test_package_that_is_not_allowed_is_not_imported(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHLOOM_ALLOW_BACKBONE", "")
    (tmp_path / "ae").mkdir()
    (tmp_path / "ae" / "model.json").write_text('{"format_version": 1, "class": "own_codec:Fragile"}')
    with pytest.raises(ValueError, match="--allow-backbone own_codec"):
        prepare(str(images), str(tmp_path / "out"), resolution=16, autoencoder=str(tmp_path / "ae"))


def test_image_with_a_latent_that_is_not_finite_is_skipped(ray_cluster: None, allowed: None, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    pictures[[3, 17]] = 240
    np.savez(tmp_path / "some.npz", images=pictures)
    (tmp_path / "ae").mkdir()
    (tmp_path / "ae" / "model.json").write_text('{"format_version": 1, "class": "own_codec:Fragile"}')
    dataset = prepare(
        str(tmp_path / "some.npz"), str(tmp_path / "out"), resolution=16, autoencoder=str(tmp_path / "ae"), shard_rows=9
    )
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in skipped] == ["03", "17"]
    assert all("not finite" in entry["error"] for entry in skipped)
    kept = np.delete(pictures, [3, 17], axis=0).reshape(18, 4, 4, 4, 4, 3).mean((2, 4), dtype=np.float64)
    np.testing.assert_allclose(dataset.rows(range(18))["mean"].transpose(0, 2, 3, 1), kept, rtol=1e-3)
    assert inspect(str(tmp_path / "out")).card["rows"] == 18


def tiny_diffusers(kind: str) -> Any:
    """A small network of the kind with random weights."""
    if kind == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.5,
        )  # fmt: skip
    if kind == "AutoencoderDC":
        return diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.25,
        )  # fmt: skip
    network = new_autoencoder((8, 8, 16), 4)
    network.register_to_config(scaling_factor=0.36, shift_factor=0.12)
    return network


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_latents_equal_those_of_diffusers_for_every_class(
    ray_cluster: None, images: Path, pixels: Path, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    network = tiny_diffusers(kind).eval()
    network.save_pretrained(tmp_path / "ae", safe_serialization=True)
    latents = prepare(str(images), str(tmp_path / "latents"), resolution=16, autoencoder=str(tmp_path / "ae"))
    rows = latents.rows(range(48))
    given = torch.from_numpy(open_dataset(pixels).rows(range(48))["image"]) / 127.5 - 1
    with torch.no_grad():
        found = network.encode(given)
    if kind == "AutoencoderKL":
        wanted = found.latent_dist.mean
        np.testing.assert_allclose(rows["std"], found.latent_dist.std, atol=1e-3, rtol=1e-3)
    else:
        wanted = found[0]
        assert "std" not in rows
    np.testing.assert_allclose(rows["mean"], wanted, atol=1e-3, rtol=1e-3)
    assert latents.card["autoencoder"]["class"] == kind
    assert (latents.card["resolution"], latents.card["autoencoder"]["downscale"]) == (4, 4)
    recipe = tiny_recipe(data__whiten=False, patches__p=1.0, patches__sizes=[], model__attention=[])
    normalisation = new_model_card(recipe, latents).normalisation
    assert normalisation.scale == (network.config.scaling_factor,) * 4
    assert normalisation.mean == (0.12 if kind == "AutoencoderKL" else 0.0,) * 4
    white = new_model_card(with_values(recipe, {"data.whiten": True}), latents).normalisation
    mean, scale = (np.array(values)[:, None, None] for values in (white.mean, white.scale))
    drawn, spread = (rows["mean"] - mean) * scale, rows.get("std", np.float64(0)) * scale  # z ~ N(mean, std^2)
    np.testing.assert_allclose(drawn.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose((drawn**2 + spread**2).mean((0, 2, 3)), recipe.model.sigma_data**2, rtol=1e-6)
    with torch.no_grad():
        reference = network.decode(wanted[:2]).sample
    ours = load_autoencoder(latents.path / "autoencoder").decode(wanted[:2])
    np.testing.assert_array_equal(ours, (reference * 127.5 + 128).clamp(0, 255).to(torch.uint8))


def test_bf16_latents_are_close_to_fp32(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "ae").mkdir()
    save_autoencoder(new_autoencoder((8, 16), 4), tmp_path / "ae")
    made = {
        precision: prepare(
            str(pixels), str(tmp_path / precision), autoencoder=str(tmp_path / "ae"), precision=precision
        ).rows(range(48))["mean"].astype(np.float64)
        for precision in ("fp32", "bf16")
    }  # fmt: skip
    difference = np.abs(made["bf16"] - made["fp32"]).mean() / np.abs(made["fp32"]).mean()
    assert 0 < difference < 0.02  # bfloat16 has 8 bits, 0.4 % an operation


def test_mirror_images_are_in_the_split_of_their_image(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "ae").mkdir()
    network = new_autoencoder((8, 16), 4).eval()
    save_autoencoder(network, tmp_path / "ae")
    latents = prepare(str(pixels), str(tmp_path / "out"), autoencoder=str(tmp_path / "ae"), mirror=True)
    assert len(latents) == latents.card["inputs"] == 96
    rows, images = latents.rows(range(96)), open_dataset(pixels).rows(range(48))
    assert list(rows["key"][0::2]) == list(images["key"])
    assert list(rows["key"][1::2]) == [f"{key}#mirror" for key in images["key"]]
    turned = torch.from_numpy(images["image"][..., ::-1].copy()) / 127.5 - 1
    with torch.no_grad():
        wanted = network.encode(turned).latent_dist.mean
    np.testing.assert_allclose(rows["mean"][1::2], wanted, atol=1e-3, rtol=1e-3)
    held_out = set(latents.indices("held_out", 0.3))
    assert held_out and all((row ^ 1) in held_out for row in held_out)
    with pytest.raises(UserError, match=r"data\.mirror"):
        prepare(str(pixels), str(tmp_path / "more"), autoencoder="none", mirror=True)


def test_autoencoder_that_cannot_be_fetched_is_an_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"nobody/nothing.*none"):
        prepare(str(images), str(tmp_path / "out"), resolution=16, autoencoder="nobody/nothing")
    with pytest.raises(UserError, match=r"stabilityai/sd-vae-ft-mse.*none"):
        prepare(str(images), str(tmp_path / "out"), resolution=256)
    assert not (tmp_path / "out").exists()
