"""The denoiser: what it takes, what it refuses, and what it is without noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser

OPTIONS = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.0}
BASE = DenoiserConfig(network="song", network_options=OPTIONS, resolution=8, channels=2, classes=0,
                      coordinates="linear", sigma_data=0.5)  # fmt: skip


def small(**changes: Any) -> Denoiser:
    torch.manual_seed(0)
    denoiser = build_denoiser(replace(BASE, **changes)).eval().requires_grad_(False)
    for parameter in denoiser.parameters():  # nothing stays near zero, so that every input counts
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    return denoiser


def test_a_denoiser_takes_any_float_and_gives_float32() -> None:
    denoiser, x = small(), torch.randn(3, 2, 8, 8)
    wanted = denoiser(x, torch.full((3,), 0.7))
    for noisy in (x, x.double()):
        for sigma in (0.7, torch.tensor(0.7, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64)):
            got = denoiser(noisy, sigma)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted)


def test_defaults_are_the_full_grid_and_no_class() -> None:
    from patchloom.models.patches import coordinate_grid

    denoiser, x = small(classes=3), torch.randn(2, 2, 8, 8)
    grid = coordinate_grid(8, 8)[None].expand(2, -1, -1, -1)
    torch.testing.assert_close(denoiser(x, 1.0), denoiser(x, 1.0, grid, torch.zeros(2, 3)))
    assert not torch.allclose(denoiser(x, 1.0), denoiser(x, 1.0, -grid))
    assert not torch.allclose(denoiser(x, 1.0), denoiser(x, 1.0, labels=torch.eye(3)[:2]))


def test_inputs_without_channels_in_the_network_are_refused() -> None:
    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="coordinate"):
        small(coordinates="none")(x, 1.0, torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="classes"):
        small()(x, 1.0, labels=torch.ones(1, 3))


def test_without_noise_the_denoiser_is_the_identity() -> None:
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(small()(x, 1e-6), x, atol=1e-4, rtol=0)
