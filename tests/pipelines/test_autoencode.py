"""Autoencoders: trained through Ray Train, measured on held-out images, registered, and usable by diffusers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.models.autoencoder import load_autoencoder
from patchloom.pipelines.autoencode import AutoencoderSettings, reconstruct, reconstruction_quality, train_autoencoder
from patchloom.platform.dataset import open_dataset
from patchloom.platform.errors import UserError
from patchloom.platform.registry import fetch_model
from patchloom.platform.storage import read_json, read_json_lines

pytestmark = pytest.mark.ray
SETTINGS = AutoencoderSettings(widths=(8, 16), images=400, batch_size=4, patch=16, held_out_fraction=0.2)


def test_an_autoencoder_learns_is_measured_and_registered(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ae"
    result = train_autoencoder(str(pixels), str(folder), SETTINGS, workers=2, register="tiny-ae")
    lines = read_json_lines(folder / "progress.jsonl")
    assert lines[-1]["images_seen"] == 400
    assert lines[-1]["loss"] < lines[0]["loss"]

    dataset = open_dataset(pixels)
    images = dataset.rows(dataset.indices("held_out", 0.2))["image"]
    decoded = reconstruct(load_autoencoder(result.model), images)
    errors = ((images.astype(float) - decoded) ** 2).mean((1, 2, 3))
    assert result.psnr_db == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-6)
    assert result.psnr_db > 12  # a flat grey image of these windows has less
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.height == 2 * (2 * 18 - 2)

    assert result.reference is not None
    fetched = fetch_model(result.reference)
    assert read_json(fetched.folder / "model.json") == read_json(result.model / "model.json")
    again = train_autoencoder(str(pixels), str(folder), SETTINGS, workers=2, register="tiny-ae")
    assert again == result
    with pytest.raises(UserError, match="another run"):
        train_autoencoder(str(pixels), str(folder), AutoencoderSettings(images=8, patch=16), workers=0)


def test_the_scale_gives_latents_unit_variance(pixels: Path, tmp_path: Path) -> None:
    result = train_autoencoder(str(pixels), str(tmp_path / "ae"), SETTINGS, workers=0)
    autoencoder = load_autoencoder(result.model)
    import torch

    images = open_dataset(pixels).rows(range(48))["image"]
    mean, std = autoencoder.encode(torch.from_numpy(images))
    variance = float((mean.var() + std.square().mean()) * autoencoder.scale**2)
    assert variance == pytest.approx(1, rel=0.1)


def test_quality_of_known_pairs() -> None:
    images = np.full((2, 3, 16, 16), 100, np.uint8)
    assert reconstruction_quality(images, images + 10)["psnr_db"] == pytest.approx(10 * np.log10(255**2 / 100))
    noise = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16), dtype=np.uint8)
    assert reconstruction_quality(noise, noise + 1)["ssim"] > 0.99
    assert reconstruction_quality(noise, noise[::-1])["ssim"] < 0.3


def test_a_patch_that_does_not_halve_is_refused(pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--patch 10 does not fit"):
        train_autoencoder(str(pixels), str(tmp_path / "ae"), AutoencoderSettings(patch=10), workers=0)
