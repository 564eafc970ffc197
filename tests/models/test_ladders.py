"""The ladders of noise levels have the closed forms that their papers give them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from patchloom.models.noise import LADDERS, iddpm_sigmas, karras_sigmas, linear_sigmas, ve_sigmas, vp_sigmas

Ladder = Callable[..., Tensor]


def each_ladder(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("ladder", list(LADDERS.values()), ids=list(LADDERS))(function)


@each_ladder
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 50, 256, 992])
def test_a_ladder_falls_to_0_in_float64(ladder: Ladder, steps: int) -> None:
    sigmas = ladder(steps)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert torch.isfinite(sigmas).all()
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


@each_ladder
@pytest.mark.parametrize("steps", [0, -1])
def test_a_ladder_without_steps_is_refused(ladder: Ladder, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps: {steps} "):
        ladder(steps)


@each_ladder
def test_a_ladder_of_one_step_is_the_top_of_the_others(ladder: Ladder) -> None:
    assert ladder(1).tolist() == [float(ladder(18)[0]), 0]


@pytest.mark.parametrize(
    ("ladder", "top", "bottom"),
    [(karras_sigmas, 80, 0.002), (linear_sigmas, 80, 0.002), (ve_sigmas, 100, 0.02)],
    ids=["karras", "linear", "ve"],
)
def test_a_ladder_spans_the_levels_it_was_given(ladder: Ladder, top: float, bottom: float) -> None:
    assert ladder(18)[[0, -2]].tolist() == pytest.approx([top, bottom], rel=1e-12)
    assert ladder(18, sigma_min=0.1, sigma_max=7.0)[[0, -2]].tolist() == pytest.approx([7, 0.1], rel=1e-12)


def test_the_linear_ladder_has_equal_distances() -> None:
    np.testing.assert_allclose(linear_sigmas(40)[:-1].diff(), -(80 - 0.002) / 39, rtol=1e-11)
    np.testing.assert_allclose(linear_sigmas(6, 1.0, 2.0), [2, 1.8, 1.6, 1.4, 1.2, 1, 0], rtol=1e-14)
    np.testing.assert_allclose(linear_sigmas(40)[:-1], karras_sigmas(40, rho=1)[:-1], rtol=1e-12)


def test_the_ladder_of_ve_has_equal_ratios() -> None:
    sigmas = ve_sigmas(40)
    np.testing.assert_allclose(sigmas[1:-1] / sigmas[:-2], (0.02 / 100) ** (1 / 39), rtol=1e-12)
    np.testing.assert_allclose(ve_sigmas(4, 0.01, 10.0), [10, 1, 0.1, 0.01, 0], rtol=1e-12)


def test_the_ladder_of_ve_is_where_karras_ends_for_large_rho() -> None:
    np.testing.assert_allclose(karras_sigmas(18, 0.02, 100.0, rho=1e6)[:-1], ve_sigmas(18)[:-1], rtol=1e-4)


def test_the_ladder_of_vp_is_the_formula_of_its_times() -> None:
    t = np.linspace(1, 1e-3, 30)
    np.testing.assert_allclose(vp_sigmas(30)[:-1], np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), rtol=1e-10)
    t = np.linspace(1, 0.01, 5)
    wanted = np.sqrt(np.exp(2 * t**2 + 0.5 * t) - 1)
    np.testing.assert_allclose(vp_sigmas(5, beta_d=4.0, beta_min=0.5, end=0.01)[:-1], wanted, rtol=1e-12)


def test_the_ladder_of_vp_keeps_the_signal_that_its_rate_leaves() -> None:
    """Song et al. 2021b: alpha-bar(t) = exp(-integral of beta), with beta from 0.1 to 20."""
    kept = 1 / (1 + vp_sigmas(12)[:-1].numpy() ** 2)
    for time, share in zip(np.linspace(1, 1e-3, 12), kept, strict=True):
        lost, _ = integrate.quad(lambda t: 0.1 + (20 - 0.1) * t, 0, time)
        assert share == pytest.approx(math.exp(-lost), rel=1e-9)


def cosine_sigma(level: int) -> float:
    """Nichol & Dhariwal 2021, Eq. 17, at their time T - level of T = 1000."""

    def signal(time: int) -> float:
        return math.cos((time / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.sqrt(signal(0) / signal(1000 - level) - 1)


def test_the_ladder_of_iddpm_is_the_cosine_schedule() -> None:
    wanted = [cosine_sigma(level) for level in range(8, 1000)]
    np.testing.assert_allclose(iddpm_sigmas(992)[:-1], wanted, rtol=1e-9)


def test_the_ladder_of_iddpm_runs_from_about_80_to_0_006() -> None:
    sigmas = iddpm_sigmas(18)
    assert cosine_sigma(8) == pytest.approx(80.2, abs=0.1)
    assert float(sigmas[0]) == pytest.approx(cosine_sigma(8), rel=1e-10)
    assert float(sigmas[-2]) == pytest.approx(cosine_sigma(999), rel=1e-9)
    assert float(iddpm_sigmas(18, first=1)[0]) == pytest.approx(cosine_sigma(1), rel=1e-10)


def test_the_ladder_of_iddpm_takes_the_nearest_of_equally_distant_levels() -> None:
    """EDM, Table 1: floor(first + (M - 1 - first) / (N - 1) * i + 1/2)."""
    for steps in (2, 7, 18, 300):
        levels = [math.floor(8 + (1000 - 1 - 8) / (steps - 1) * i + 0.5) for i in range(steps)]
        np.testing.assert_allclose(iddpm_sigmas(steps)[:-1], [cosine_sigma(level) for level in levels], rtol=1e-9)


def test_the_ladder_of_iddpm_clips_the_first_ratio() -> None:
    """Without the clip the noisiest level would have no signal at all, and beta be 1 instead of 0.999."""
    top = math.sqrt((cosine_sigma(1) ** 2 + 1) / 0.001 - 1)
    assert float(iddpm_sigmas(1000, first=0)[0]) == pytest.approx(top, rel=1e-10)
    loose = iddpm_sigmas(1000, first=0, smallest_ratio=0.5)
    ratios = (1 + loose[1:-1] ** 2) / (1 + loose[:-2] ** 2)
    np.testing.assert_allclose(ratios[:2], 0.5, rtol=1e-10)  # of sin^2: 0, then about 1/4, then about 4/9
    assert float(ratios.min()) > 0.5 - 1e-12


@pytest.mark.parametrize(("options", "levels"), [({}, 992), ({"first": 0}, 1000), ({"levels": 100}, 92)], ids=str)
def test_the_ladder_of_iddpm_has_no_more_steps_than_levels(options: dict[str, int], levels: int) -> None:
    assert (iddpm_sigmas(levels, **options).diff() < 0).all()
    with pytest.raises(ValueError, match=rf"steps: {levels + 1} .*\b{levels}\b"):
        iddpm_sigmas(levels + 1, **options)
