"""What the tests of the method share: small networks with every weight at work, and images that fit them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.pipelines.pages.pictures import contact_sheet, save_png


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., DenoiserConfig]:
    """The description of a 16 x 16 DDPM++ that runs in milliseconds; `changes` replace its fields."""

    def config(**changes: Any) -> DenoiserConfig:
        options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
        base = DenoiserConfig(network="song", network_options=options, resolution=16, channels=3, classes=0,
                              coordinates="linear", sigma_data=0.5)  # fmt: skip
        return replace(base, **changes)

    return config


@pytest.fixture(scope="session")
def tiny_denoiser(tiny_config: Callable[..., DenoiserConfig]) -> Callable[..., Denoiser]:
    """Builds that network with weights that are all far from zero (fresh ones end in a layer that is silent)."""

    def build(seed: int = 0, **changes: Any) -> Denoiser:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            denoiser = build_denoiser(tiny_config(**changes)).eval()
            for parameter in denoiser.parameters():
                nn.init.normal_(parameter, 0.0, 0.15)
        return denoiser

    return build


@pytest.fixture(scope="session")
def linear_denoiser(tiny_config: Callable[..., DenoiserConfig]) -> Denoiser:
    """A fresh ADM: its last layer is zero, so D = c_skip x, which is ideal where the data is N(0, sigma_data^2)."""
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
    return build_denoiser(tiny_config(network="dhariwal", network_options=options)).eval()


@pytest.fixture
def artefacts(pytestconfig: pytest.Config) -> Callable[[str, Tensor], Path]:
    """Keeps (N, 3, H, W) uint8 images as a picture in `artefacts/`, to be looked at."""

    def keep(name: str, images: Tensor) -> Path:
        path = pytestconfig.rootpath / "artefacts" / f"{name}.png"
        save_png(contact_sheet(images.numpy(), scale=4), path)
        return path

    return keep
