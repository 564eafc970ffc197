"""In Gaussian fields the distribution of patches, the least loss of a size and the value of coordinates are known.

The exact denoiser takes the place of the network. Everything else is the code of a training step: draws, crops,
normalisation, noise levels, coordinate channels, preconditioning and loss.
"""

import math

import numpy as np
import pytest
import torch
from gaussian_worlds import (
    SPREAD,
    ExactDenoise,
    GaussianField,
    NormalMixture,
    at_all_positions,
    by_position,
    exact_denoiser,
    knowing_position,
)
from scipy import stats
from torch import Tensor

from patchloom.models.loss import edm_weight
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.random_draws import CropBatch
from patchloom.models.step import StoredRows, crop_losses
from patchloom.models.step_plan import StepSettings

R, BLOCK = 8, 8
SIZES = (8, 4, 2, 1)
STEP = 0.25  # of the brightness per pixel
STORED = Normalisation("latents", (0.3,), (2.0,))
DEVIATIONS = 4.0  # of a sampling distribution; exceeded with probability 6e-5


def stationary() -> GaussianField:
    """Pixels of variance SPREAD^2. The covariance differs along x, y and both diagonals: no flip or turn keeps it."""
    place = torch.arange(R, dtype=torch.float64)
    y, x = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    dx, dy = x[:, None] - x, y[:, None] - y
    smooth = (-(0.06 * dx**2 + 0.2 * dy**2 - 0.12 * dx * dy)).exp()
    return GaussianField(torch.zeros(R**2).double(), SPREAD**2 * (0.9 * smooth + 0.1 * torch.eye(R**2)))


def contrast_rising() -> GaussianField:
    """The stationary field, with a standard deviation that rises along y and, less, along x."""
    field, place = stationary(), torch.linspace(-1, 1, R).double()
    scale = ((0.9 * place[:, None] + 0.4 * place) * 1.2).exp().flatten()
    return GaussianField(field.mean, scale[:, None] * field.covariance * scale)


def bright_side() -> GaussianField:
    """Independent pixels of variance SPREAD^2; their mean rises along x by STEP per pixel."""
    mean = STEP * (torch.arange(R).double() - (R - 1) / 2).expand(R, R).flatten()
    return GaussianField(mean, SPREAD**2 * torch.eye(R**2).double())


def settings(**changes: object) -> StepSettings:
    options = {"seed": 11, "schedule": patch_schedule(R, 0.5), "updates": 1, "batch_size": BLOCK, "block_size": BLOCK,
               "lr": 1e-3, "lr_rampup_images": 0}  # fmt: skip
    return StepSettings(**{**options, **changes})  # type: ignore[arg-type]


def at_level(sigma: float, reduction: str = "mean") -> StepSettings:
    """All crops have this noise level."""
    return settings(noise_mean=math.log(sigma), noise_std=0.0, reduction=reduction)


def losses_of(
    field: GaussianField,
    denoise: ExactDenoise,
    size: int,
    method: StepSettings,
    count: int,
    coordinates: str = "linear",
) -> tuple[Tensor, Tensor]:
    """The losses and noise levels of one crop of each of `count` images, as a training step computes them."""
    rows = StoredRows(STORED.restore(field.draw(count, seed=size)), torch.full((count,), -1))
    batch = CropBatch(0, range(count // BLOCK), BLOCK, 1, R, size, False, torch.device("cpu"))
    denoiser = exact_denoiser(denoise, R, coordinates)
    losses, sigma = crop_losses(denoiser, rows, method.random.crops(batch), size, method, STORED)
    return losses.double(), sigma.double()


# Marginals of patches (Patch Diffusion, Eq. 9)


def assert_standard_normal(rows: Tensor) -> None:
    """(n, d) rows have mean 0 and covariance 1: each z below is N(0, 1), and they are uncorrelated."""
    n, d = rows.shape
    second = rows.T @ rows / n
    of_pairs = second[torch.triu_indices(d, d, 1).unbind()] * n**0.5
    of_squares = (second.diagonal() - 1) * (n / 2) ** 0.5
    for z in (rows.mean(0) * n**0.5, of_pairs, of_squares):
        if len(z):
            assert 1e-4 < stats.chi2.sf(float(z.square().sum()), len(z)) < 1 - 1e-4
            assert float(z.abs().max()) < stats.norm.isf(0.5e-4 / len(z))


def noisy_crops(field: GaussianField, size: int, sigma: float, count: int) -> tuple[Tensor, Tensor]:
    """What the network gets: noisy patches (count, d) and their coordinates (count, 2, s, s)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(noisy: Tensor, _: Tensor, coordinates: Tensor) -> Tensor:
        seen.append((noisy, coordinates))
        return noisy

    losses_of(field, keep, size, at_level(sigma), count)
    return seen[0]


@pytest.mark.parametrize("size", SIZES)
def test_patches_of_a_stationary_field_have_one_distribution_wherever_they_are(size: int) -> None:
    field = stationary()
    noisy, _ = noisy_crops(field, size, 0.2, 20_000)
    assert_standard_normal(field.patch(0, 0, size).whiten(noisy, 0.2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("field", [contrast_rising(), bright_side()], ids=["contrast", "brightness"])
def test_patches_have_the_marginal_of_the_position_that_their_coordinates_name(field: GaussianField, size: int) -> None:
    noisy, coordinates = noisy_crops(field, size, 0.2, 20_000)
    rows = [patch.whiten(noisy[rows], 0.2) for patch, rows in by_position(field, coordinates)]
    assert len(rows) == (R - size + 1) ** 2
    assert_standard_normal(torch.cat(rows))


# The least loss of each patch size


def least_error(field: GaussianField, sigma: float) -> float:
    """E|D - y|^2 of the ideal denoiser, trace(K - K (K + sigma^2)^-1 K)."""
    k = field.covariance
    return float((k - k @ torch.linalg.solve(k + sigma**2 * torch.eye(len(k)), k)).trace())


def weight_at(sigma: float) -> float:
    """EDM's weight, for data of deviation SPREAD."""
    return float((sigma**2 + SPREAD**2) / (sigma * SPREAD) ** 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_the_loss_of_the_ideal_denoiser_has_its_closed_form_and_falls_with_patch_size(
    sigma: float, reduction: str
) -> None:
    field, count = stationary(), 4000
    method = at_level(sigma, reduction)
    measured, exact = [], []  # per pixel
    for size in SIZES:
        losses, _ = losses_of(field, knowing_position(field), size, method, count)
        losses = losses if reduction == "mean" else losses / size**2
        patch, weight = field.patch(0, 0, size), weight_at(sigma) / size**2
        measured.append(float(losses.mean()))
        exact.append(weight * least_error(patch, sigma))
        # |e|^2 of e ~ N(0, C) has the variance 2 tr C^2
        deviation = weight * float(2 * (patch.error_variances(torch.tensor([sigma]).double()) ** 2).sum()) ** 0.5
        assert abs(measured[-1] - exact[-1]) < DEVIATIONS * deviation / count**0.5
        assert float(losses.std()) == pytest.approx(deviation, rel=0.12)
    assert exact == sorted(exact) and measured == sorted(measured)  # from the largest patch to the smallest


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_of_the_ideal_denoiser_is_right_at_the_noise_levels_of_training(size: int) -> None:
    field, count = stationary(), 4000
    losses, sigma = losses_of(field, knowing_position(field), size, settings(), count)
    assert float(sigma.min()) < 0.02 and float(sigma.max()) > 4
    variances = field.patch(0, 0, size).error_variances(sigma)
    weight = edm_weight(sigma, SPREAD) / size**2
    error = (losses - weight * variances.sum(1)).sum() / (2 * (weight[:, None] * variances) ** 2).sum().sqrt()
    assert abs(float(error)) < DEVIATIONS


def test_patches_of_independent_pixels_lose_nothing_by_being_small() -> None:
    field = GaussianField(torch.zeros(R**2).double(), SPREAD**2 * torch.eye(R**2).double())
    for size in SIZES:
        losses, _ = losses_of(field, knowing_position(field), size, settings(), 8000)
        assert abs(float(losses.mean()) - 1) < DEVIATIONS * (2 / size**2 / 8000) ** 0.5


# The value of coordinates


def measured_gap(
    field: GaussianField, without_position: GaussianField | NormalMixture, size: int, sigma: float, count: int
) -> tuple[float, float]:
    """The loss without the position less that with it, before EDM's weight, and its standard error."""

    def blind(noisy: Tensor, sigma: Tensor, coordinates: Tensor) -> Tensor:
        assert coordinates.shape[1] == 0
        return without_position.denoise(noisy, sigma)

    method = at_level(sigma, reduction="sum")
    known, _ = losses_of(field, knowing_position(field), size, method, count)
    unknown, _ = losses_of(field, blind, size, method, count, "none")
    gaps = (unknown - known) / weight_at(sigma)
    return float(gaps.mean()), float(gaps.std()) / count**0.5


@pytest.mark.parametrize("size", SIZES)
def test_coordinates_have_no_value_where_the_field_is_stationary(size: int) -> None:
    field = stationary()
    gap, _ = measured_gap(field, at_all_positions(field, size), size, 0.5, 400)
    assert abs(gap) < 1e-6  # float32


def one_dimensional_error(means: np.ndarray, variance: float, sigma: float) -> float:
    """E(D - y)^2 of the ideal denoiser of a mixture in one dimension: sigma^2 - sigma^4 E(d log p / dx)^2 (Tweedie)."""
    total = variance + sigma**2
    x = np.linspace(means.min() - 12 * total**0.5, means.max() + 12 * total**0.5, 20_001)
    each = stats.norm.pdf(x[:, None], means, total**0.5) / len(means)
    density, slope = each.sum(1), (each * (means - x[:, None]) / total).sum(1)
    return sigma**2 - sigma**4 * float(np.trapezoid(slope**2 / np.maximum(density, 1e-300), x))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_the_value_of_coordinates_where_the_mean_changes(size: int, sigma: float) -> None:
    # the means of the positions differ along (1, ..., 1) only; there, a patch is a mixture in one dimension
    means = size * STEP * np.arange(R - size + 1)
    wanted = one_dimensional_error(means, SPREAD**2, sigma) - one_dimensional_error(means[:1], SPREAD**2, sigma)
    field = bright_side()
    gap, error = measured_gap(field, at_all_positions(field, size), size, sigma, 8000)
    assert abs(gap - wanted) < DEVIATIONS * error + 1e-6
    assert (wanted > 10 * error) == (size < R)  # the full image has one position


@pytest.mark.parametrize("size", SIZES)
def test_the_value_of_coordinates_to_linear_denoisers_where_the_contrast_changes(size: int) -> None:
    field, sigma = contrast_rising(), 0.5
    patches = at_all_positions(field, size)
    known = [
        least_error(GaussianField(mean, k), sigma) for mean, k in zip(patches.means, patches.covariances, strict=True)
    ]
    # the best linear denoiser depends on the first two moments only
    wanted = least_error(patches.moments, sigma) - float(np.mean(known))
    gap, error = measured_gap(field, patches.moments, size, sigma, 8000)
    assert abs(gap - wanted) < DEVIATIONS * error + 1e-6
    if size == R:
        assert abs(wanted) < 1e-9
    else:  # the ideal denoiser without coordinates is between the two
        assert wanted > 10 * error
        assert 0 < measured_gap(field, patches, size, sigma, 8000)[0] < gap
