"""Noise levels have their closed form, and Heun's sampler follows the exact path where the data is Gaussian."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gaussian_worlds import ideal, marginal
from scipy import stats
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.guidance import guided
from patchloom.models.noise import karras_sigmas, training_sigmas
from patchloom.models.samplers import SeededNoise, heun


def exact(start: Tensor, sigma_max: float, sigma: float) -> Tensor:
    """The probability-flow path: dx/dsigma = x sigma / (SPREAD^2 + sigma^2), so x grows as sqrt(SPREAD^2 + sigma^2)."""
    return start * (marginal(sigma) / marginal(sigma_max)) ** 0.5


@pytest.mark.parametrize("steps", [2, 18, 256])
def test_the_ladder_falls_from_80_to_0_002_and_then_0(steps: int) -> None:
    sigmas = karras_sigmas(steps)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(80, rel=1e-12)
    assert sigmas[-2].item() == pytest.approx(0.002, rel=1e-12)
    assert sigmas[-1] == 0


def test_the_ladder_is_equation_5_of_edm() -> None:
    ramp = np.linspace(0, 1, 18)
    wanted = (10 ** (1 / 5) + ramp * (0.01 ** (1 / 5) - 10 ** (1 / 5))) ** 5
    np.testing.assert_allclose(karras_sigmas(18, sigma_min=0.01, sigma_max=10, rho=5)[:-1], wanted, rtol=1e-12)


def test_one_step_starts_at_sigma_max_and_zero_steps_are_refused() -> None:
    assert karras_sigmas(1).tolist() == pytest.approx([80, 0])
    with pytest.raises(ValueError, match="steps: 0 "):
        karras_sigmas(0)


def test_training_noise_is_log_normal() -> None:
    probability = np.linspace(0.001, 0.999, 999)
    found = training_sigmas(torch.from_numpy(stats.norm.ppf(probability)), mean=-1.2, std=1.2)
    np.testing.assert_allclose(found, stats.lognorm.ppf(probability, s=1.2, scale=np.exp(-1.2)), rtol=1e-9)


def test_training_noise_has_the_moments_of_its_logarithm() -> None:
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    logarithm = training_sigmas(normal, mean=-0.4, std=1.0).log()
    assert logarithm.mean().item() == pytest.approx(-0.4, abs=4 / 200_000**0.5)
    assert logarithm.std().item() == pytest.approx(1.0, abs=4 / 400_000**0.5)


def test_heun_converges_at_second_order_to_the_exact_path() -> None:
    start = 80 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = exact(start, 80, 0.002)
    errors = [
        float((heun(ideal, start, karras_sigmas(steps)[:-1]) - wanted).abs().max()) for steps in (100, 200, 400, 800)
    ]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 2, atol=0.1)
    assert errors[-1] < 1e-4


def test_heun_ends_at_the_ideal_estimate_of_the_last_level() -> None:
    start = 80 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = heun(ideal, start, karras_sigmas(400))
    wanted = ideal(exact(start, 80, 0.002), torch.tensor(0.002))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_heun_evaluates_twice_a_step_but_once_in_the_last(steps: int) -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def recorded(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x, sigma))
        return ideal(x, sigma).float()

    made = heun(recorded, torch.ones(2, 1, 4, 4) * 80, karras_sigmas(steps))
    assert made.shape == (2, 1, 4, 4)
    assert len(calls) == 2 * steps - 1
    for x, sigma in calls:
        assert x.dtype == torch.float64
        assert sigma.dtype == torch.float64
        assert sigma.shape == ()
    assert [float(sigma) for _, sigma in calls[::2]] == karras_sigmas(steps)[:-1].tolist()


def test_a_seeds_noise_is_unit_and_does_not_depend_on_its_neighbours() -> None:
    noise = SeededNoise([5, 9, 5], (3, 64, 64))()
    assert noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1], SeededNoise([9], (3, 64, 64))()[0])
    assert abs(float(torch.corrcoef(noise[:2].flatten(1))[0, 1])) < 0.05
    assert float(noise[0].mean()) == pytest.approx(0, abs=0.04)
    assert float(noise[0].std()) == pytest.approx(1, abs=0.03)


@pytest.fixture
def conditional(tiny_denoiser: Callable[..., Denoiser]) -> Denoiser:
    return tiny_denoiser(classes=3)


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 1), (1.3, 2), (0.0, 2)])
def test_guidance_of_1_costs_one_evaluation_and_any_other_two(
    conditional: Denoiser, guidance: float, evaluations: int
) -> None:
    images_evaluated: list[int] = []
    hook = conditional.model.register_forward_hook(lambda _, inputs, __: images_evaluated.append(len(inputs[0])))
    guided(conditional, torch.eye(3), guidance)(torch.randn(3, 3, 16, 16), torch.tensor(1.0))
    hook.remove()
    assert sum(images_evaluated) == 3 * evaluations


@torch.no_grad()
def test_guidance_moves_away_from_the_estimate_without_a_class(conditional: Denoiser) -> None:
    x, sigma, labels = torch.randn(3, 3, 16, 16), torch.tensor(0.7), torch.eye(3)
    with_class = conditional(x, sigma, labels=labels)
    without = conditional(x, sigma, labels=torch.zeros(3, 3))
    assert (with_class - without).abs().max() > 1e-3
    torch.testing.assert_close(guided(conditional, labels, 1.3)(x, sigma), 1.3 * with_class - 0.3 * without)
    torch.testing.assert_close(guided(conditional, labels, 0.0)(x, sigma), without)
    assert torch.equal(guided(conditional, labels, 1.0)(x, sigma), with_class)
