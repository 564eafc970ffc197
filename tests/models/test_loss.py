"""The loss weighs every noise level alike, and has its known value where the data is Gaussian."""

from collections.abc import Callable

import pytest
import torch

from patchloom.models.denoiser import Denoiser
from patchloom.models.loss import denoising_loss, edm_weight, held_out_loss


def test_the_weight_has_its_closed_form() -> None:
    found = edm_weight(torch.tensor([0.5, 1.0, 2.0]), sigma_data=0.5)
    assert found.tolist() == pytest.approx([(0.25 + 0.25) / 0.0625, (1 + 0.25) / 0.25, (4 + 0.25) / 1])


def test_the_weight_undoes_the_scale_of_the_networks_output() -> None:
    sigma, sigma_data = torch.logspace(-3, 2, 50, dtype=torch.float64), 0.7
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(edm_weight(sigma, sigma_data) * c_out**2, torch.ones_like(sigma))


def test_the_ideal_denoiser_of_gaussian_data_has_loss_1_at_every_noise_level(linear_denoiser: Denoiser) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(60, 3, 16, 16, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.tensor([0.01, 0.3, 5.0]).repeat_interleave(20)
    with torch.no_grad():
        losses = denoising_loss(linear_denoiser, clean, noise, sigma)
    for level in losses.view(3, 20):  # 15360 values: a standard error of 0.011
        assert float(level.mean()) == pytest.approx(1, abs=0.05)


def test_the_loss_of_a_patch_is_its_weighted_squared_error(linear_denoiser: Denoiser) -> None:
    clean, noise = torch.full((2, 3, 8, 8), 0.4), torch.full((2, 3, 8, 8), -1.0)
    sigma = torch.tensor([0.5, 1.5])
    with torch.no_grad():
        found = denoising_loss(linear_denoiser, clean, noise, sigma)
    # D = c_skip (clean - sigma), by hand
    wanted = [(0.5 * -0.1 - 0.4) ** 2 * 8, (0.1 * -1.1 - 0.4) ** 2 * 2.5 / 0.5625]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_sum_is_the_mean_times_channels_and_pixels(tiny_denoiser: Callable[..., Denoiser]) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0])
    with torch.no_grad():
        mean, total = (denoising_loss(tiny_denoiser(), clean, noise, sigma, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total, mean * 3 * 8 * 8)


def test_the_held_out_loss_of_the_ideal_denoiser_is_1_at_every_noise_level(linear_denoiser: Denoiser) -> None:
    clean = 0.5 * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(99))  # not the noise of its seed 0
    losses = held_out_loss(linear_denoiser, clean, None)
    assert list(losses) == [0.1, 0.3, 1.0, 3.0]
    assert list(losses.values()) == pytest.approx([1] * 4, abs=0.03)


def test_the_held_out_loss_does_not_depend_on_the_batch_size_and_repeats(
    tiny_denoiser: Callable[..., Denoiser],
) -> None:
    denoiser = tiny_denoiser(classes=2)
    clean = 0.5 * torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(2)[[0, 1, 1, 0, 1, 0, 0]]
    whole, pieces, again, other = (
        held_out_loss(denoiser, clean, labels, seed=seed, batch_size=size)
        for seed, size in ((0, 7), (0, 3), (0, 7), (1, 7))
    )
    assert whole == again
    assert list(pieces.values()) == pytest.approx(list(whole.values()), rel=1e-5)
    assert whole != other
