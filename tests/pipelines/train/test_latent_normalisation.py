"""Latents enter a network as the configuration of their autoencoder says, and constant channels divide nothing by 0."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_recipe

from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.normalisation import Normalisation
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.platform.dataset import open_dataset
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.files.storage import read_json, write_json

MEAN, STD = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 4.0, 1.0]


def encoded(pixels: Path, folder: Path, **config: Any) -> Dataset:
    torch.manual_seed(0)
    network = new_autoencoder((8, 8, 16), 4)
    network.register_to_config(**config)
    (folder / "ae").mkdir()
    save_autoencoder(network, folder / "ae")
    return prepare(str(pixels), str(folder / "latents"), autoencoder=str(folder / "ae"), workers=0)


def normalisation_of(latents: Dataset, whiten: bool) -> Normalisation:
    recipe = tiny_recipe(data__whiten=whiten, patches__p=1.0, patches__sizes=[], model__attention=[])
    return new_model_card(recipe, latents).normalisation


def test_statistics_of_the_autoencoder_are_used(pixels: Path, tmp_path: Path) -> None:
    latents = encoded(pixels, tmp_path, scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
    found = normalisation_of(latents, whiten=False)
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(found.normalise(z), (z - mean) * 0.5 / std)
    torch.testing.assert_close(found.restore(found.normalise(z)), z)
    white = normalisation_of(latents, whiten=True)  # the statistics of the dataset itself
    np.testing.assert_allclose(white.mean, latents.card.mean)


def test_card_without_statistics_is_as_before(pixels: Path, tmp_path: Path) -> None:
    latents = encoded(pixels, tmp_path, scaling_factor=0.5, shift_factor=0.25)
    assert "latents_mean" not in read_json(latents.path / "dataset.json")["autoencoder"]
    assert "latents_std" not in read_json(tmp_path / "ae" / "model.json")
    assert normalisation_of(latents, whiten=False) == Normalisation("latents", (0.25,) * 4, (0.5,) * 4)


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_constant_channel_is_only_centred(pixels: Path, tmp_path: Path, mean: float) -> None:
    path = encoded(pixels, tmp_path, scaling_factor=0.5).path / "dataset.json"
    card = read_json(path)
    card["mean"][1], card["std"][1] = mean, mean * 1e-8  # the rounding error of a difference of squares
    write_json(path, card)
    found = normalisation_of(open_dataset(path.parent), whiten=True)
    sigma_data = tiny_recipe().model.sigma_data
    assert found.scale == (sigma_data / card["std"][0], sigma_data, *(sigma_data / std for std in card["std"][2:]))
    assert found.normalise(torch.full((1, 4, 1, 1), mean))[0, 1].item() == 0
