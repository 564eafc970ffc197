"""On data known to the last digit the samplers and diffusers' schedulers make the same images."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from patchloom.models.noise import karras_sigmas, ve_sigmas
from patchloom.models.samplers import ancestral, ddim, dpmpp_2m, dpmpp_2m_sde, euler, heun, plms

SHAPE = (4, 3, 4, 4)
STEPS = [4, 18, 50]
POINTS = torch.randn(5, *SHAPE[1:], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SPREADS = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)[:, None, None]  # one a channel
SIGMA_DATA = 0.5


def ideal(x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of x0 given x = x0 + sigma * noise, where x0 is near one of five points, by SPREADS."""
    x, sigma = x.double(), sigma.double()
    total = SPREADS**2 + sigma**2
    distances = ((x[:, None] - POINTS) ** 2 / total).sum(dim=(2, 3, 4))
    weights = (-distances / 2).softmax(dim=1)[:, :, None, None, None]
    means = (x[:, None] * SPREADS**2 + POINTS * sigma**2) / total
    return (weights * means).sum(dim=1)


def predicted_noise(x: Tensor, sigma: Tensor) -> Tensor:
    return (x - ideal(x, sigma)) / sigma


def predicted_by_edm(x: Tensor, sigma: Tensor) -> Tensor:
    """What a network preconditioned as EDM's says, where its estimate is ideal."""
    total = sigma**2 + SIGMA_DATA**2
    return (ideal(x, sigma) - x * SIGMA_DATA**2 / total) / (sigma * SIGMA_DATA / total.sqrt())


def draws(number: int) -> list[Tensor]:
    """float64, of what a float32 can hold: some schedulers round to that."""
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(SHAPE, generator=generator).double() for _ in range(number + 1)]


def given(noises: list[Tensor]) -> Callable[[], Tensor]:
    rest: Iterator[Tensor] = iter(noises)
    return lambda: next(rest)


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """`tolerance` is relative to values of about 1."""
    assert found.dtype == torch.float64
    assert found.std() > 0.3
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=tolerance)


def test_the_data_draw_the_noise_to_different_points() -> None:
    made = euler(ideal, 80 * draws(1)[0], karras_sigmas(50))
    nearest = ((made[:, None] - POINTS) ** 2).sum(dim=(2, 3, 4)).argmin(dim=1)
    assert len(set(nearest.tolist())) > 1


# EDM's schedulers, on EDM's ladder: x is clean + sigma * noise, as here


@pytest.mark.parametrize("steps", STEPS)
def test_the_ladder_of_edm_is_diffusers(steps: int) -> None:
    for kind in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        scheduler = kind()  # its levels are rounded to float32
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(scheduler.sigmas.double(), karras_sigmas(steps), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_diffusers_edm_euler(steps: int) -> None:
    scheduler = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    start = draws(steps)[0] * sigmas[0]
    x = start
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, time)
        x = scheduler.step(predicted_by_edm(x, sigma), time, x).prev_sample
    assert_same(euler(ideal, start, sigmas), x)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmpp_2m_is_diffusers_edm_dpm_solver(steps: int, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # of 2nd order also in the last step but one; the last step, to 0, is of first order in both
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_data=SIGMA_DATA, algorithm_type=algorithm, solver_order=2, solver_type="midpoint"
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    start, *noises = draws(steps)
    theirs = given(noises)
    module = "diffusers.schedulers.scheduling_edm_dpmsolver_multistep.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: theirs())
    x = start = start * sigmas[0]
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(predicted_by_edm(x, sigma), time, x).prev_sample
    if algorithm == "dpmsolver++":
        assert_same(dpmpp_2m(ideal, start, sigmas), x)
    else:
        assert_same(dpmpp_2m_sde(ideal, start, sigmas, noise=given(noises)), x)


# EDM's Algorithm 2, with churn


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("churn", "churn_min", "churn_max"), [(3.0, 0.0, 1e9), (80.0, 0.05, 50.0)])
def test_heun_with_churn_is_diffusers_karras_ve(steps: int, churn: float, churn_min: float, churn_max: float) -> None:
    module = pytest.importorskip("diffusers.schedulers.deprecated.scheduling_karras_ve", reason="deprecated there")
    scheduler = module.KarrasVeScheduler(s_churn=churn, s_min=churn_min, s_max=churn_max, s_noise=1.007)
    scheduler.set_timesteps(steps)
    sigmas = ve_sigmas(steps)  # its steps are given their levels; its own schedule is of their squares
    torch.testing.assert_close(scheduler.schedule.double().flip(0), sigmas[:-1] ** 2, rtol=1e-5, atol=0)
    theirs, ours = (torch.Generator().manual_seed(3) for _ in range(2))
    x = start = draws(steps)[0] * sigmas[0]
    for sigma, lower in itertools.pairwise(sigmas):
        hat, raised = scheduler.add_noise_to_input(x, sigma, generator=theirs)
        step = scheduler.step(-predicted_noise(hat, raised), raised, lower, hat)
        x = step.prev_sample
        if lower > 0:
            correction = -predicted_noise(x, lower)
            x = scheduler.step_correct(correction, raised, lower, hat, x, step.derivative).prev_sample
    drawn = [torch.randn(SHAPE, generator=ours) for _ in range(steps)]  # theirs draws at every level
    noise = given([one for one, sigma in zip(drawn, sigmas, strict=False) if churn_min <= sigma <= churn_max])
    options = {"churn": churn, "churn_min": churn_min, "churn_max": churn_max, "churn_noise": 1.007}
    assert_same(heun(ideal, start, sigmas, noise=noise, **options), x)


# Schedulers of variance-exploding x, on the levels of a trained schedule of betas


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True])
def test_euler_is_diffusers_euler(steps: int, karras: bool) -> None:
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=karras)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    x = start = draws(steps)[0] * sigmas[0]
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, time)
        x = scheduler.step(predicted_noise(x, sigma), time, x).prev_sample
    assert_same(euler(ideal, start, sigmas), x)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True])
def test_heun_is_diffusers_heun(steps: int, karras: bool) -> None:
    scheduler = HeunDiscreteScheduler(use_karras_sigmas=karras)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.double()  # all but the first and the last are there twice
    sigmas = torch.cat([levels[:1], levels[1::2]])
    assert len(sigmas) == steps + 1
    x = start = draws(steps)[0] * sigmas[0]
    for number, time in enumerate(scheduler.timesteps):
        level = levels[number]  # the timestep repeats as the level does: first the step from it, then its correction
        x = scheduler.step(predicted_noise(x, level), time, x).prev_sample
    assert_same(heun(ideal, start, sigmas), x)


@pytest.mark.parametrize("steps", STEPS)
def test_ancestral_is_diffusers_euler_ancestral(steps: int) -> None:
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    x = start = draws(steps)[0] * sigmas[0]
    theirs, ours = (torch.Generator().manual_seed(3) for _ in range(2))
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, time)
        x = scheduler.step(predicted_noise(x, sigma), time, x, generator=theirs).prev_sample
    noise = lambda: torch.randn(SHAPE, generator=ours, dtype=torch.float64)  # noqa: E731
    assert_same(ancestral(ideal, start, sigmas, noise=noise), x)


# Schedulers of variance-preserving x, which is sqrt(alpha-bar) * x of here


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m_is_diffusers_dpm_solver(steps: int, algorithm: str, karras: bool) -> None:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=2, solver_type="midpoint", use_karras_sigmas=karras
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    start, *noises = draws(steps)
    start = start * sigmas[0]
    x = start / (1 + sigmas[0] ** 2).sqrt()
    for sigma, time, noise in zip(sigmas, scheduler.timesteps, noises, strict=False):
        output = predicted_noise(x * (1 + sigma**2).sqrt(), sigma)
        x = scheduler.step(output, time, x, variance_noise=noise).prev_sample
    if algorithm == "dpmsolver++":
        assert_same(dpmpp_2m(ideal, start, sigmas), x, 2e-5)  # theirs is in float32
    else:
        assert_same(dpmpp_2m_sde(ideal, start, sigmas, noise=given(noises)), x, 2e-5)


def levels_of(scheduler: DDIMScheduler | PNDMScheduler, times: Tensor) -> Tensor:
    """The ladder of these training steps, then 0 (as with set_alpha_to_one)."""
    kept = scheduler.alphas_cumprod.double()[times]
    return torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_is_diffusers_ddim(steps: int, eta: float, schedule: str) -> None:
    scheduler = DDIMScheduler(beta_schedule=schedule, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    sigmas = levels_of(scheduler, scheduler.timesteps)
    start, *noises = draws(steps)
    start = start * sigmas[0]
    x = start / (1 + sigmas[0] ** 2).sqrt()
    for sigma, time, noise in zip(sigmas, scheduler.timesteps, noises, strict=False):
        output = predicted_noise(x * (1 + sigma**2).sqrt(), sigma)
        x = scheduler.step(output, time, x, eta=eta, variance_noise=noise).prev_sample
    assert_same(ddim(ideal, start, sigmas, eta=eta, noise=given(noises)), x)


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_plms_is_diffusers_pndm(steps: int, schedule: str) -> None:
    scheduler = PNDMScheduler(beta_schedule=schedule, skip_prk_steps=True, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps + 1  # the second one twice, for the correction of the first step
    sigmas = levels_of(scheduler, torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]]))
    start = draws(steps)[0] * sigmas[0]
    x = start / (1 + sigmas[0] ** 2).sqrt()
    for time in scheduler.timesteps:
        sigma = levels_of(scheduler, time[None])[0]
        output = predicted_noise(x * (1 + sigma**2).sqrt(), sigma)
        x = scheduler.step(output, time, x).prev_sample
    assert_same(plms(ideal, start, sigmas), x)
