"""Samplers: from noise to images, along decreasing noise levels.

All samplers use EDM's variables, x = clean + sigma * noise. Their common arguments:

    denoise: denoise(x, sigma) -> clean estimate, called with (B, C, H, W) float64 x and a 0-dim float64 sigma,
        which is on the CPU.
    start: (B, C, H, W) noise, already scaled by sigmas[0].
    sigmas: (steps + 1,) decreasing noise levels; the last one is usually 0.
    noise: noise() -> (B, C, H, W) standard normal, for the samplers that add noise.

All samplers return (B, C, H, W) float64. What depends only on the noise levels is computed on the CPU before the first
step, as Python numbers, so that no step waits for a GPU.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from patchloom.models.random_draws import sampling_generator

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]


@torch.no_grad()
def heun(
    denoise: Denoise,
    start: Tensor,
    sigmas: Tensor,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
    noise: Noise | None = None,
) -> Tensor:
    """Heun's 2nd-order sampler (EDM, Algorithm 1); with `churn` the stochastic sampler (Algorithm 2).

    It evaluates the network 2 * steps - 1 times if the last level is 0.

    Args:
        denoise: denoise(x, sigma) -> clean estimate.
        start: (B, C, H, W) noise, already scaled by sigmas[0].
        sigmas: (steps + 1,) decreasing noise levels.
        churn: EDM's S_churn. Default: 0, no added noise.
        churn_min: EDM's S_tmin, the lowest level at which noise is added.
        churn_max: EDM's S_tmax, the highest level at which noise is added.
        churn_noise: EDM's S_noise, the standard deviation of the added noise.
        noise: noise() -> (B, C, H, W) standard normal; required for churn.

    Returns:
        (B, C, H, W) float64.

    Raises:
        ValueError: churn without `noise`.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.heun(denoise, noise() * sigmas[0], sigmas)
    """
    x, ladder = start.to(torch.float64), _on_cpu(sigmas)
    gamma = min(churn / (len(ladder) - 1), 2**0.5 - 1)
    raised = ladder * (1 + gamma)
    added = (raised**2 - ladder**2).sqrt() * churn_noise
    for sigma, lower, higher, spread in _steps(ladder[:-1], ladder[1:], raised, added):
        if gamma and churn_min <= sigma <= churn_max:
            x = x + spread * _drawn(noise, x)
            sigma = higher
        slope = (x - _estimate(denoise, x, sigma)) / sigma
        predicted = x + (lower - sigma) * slope
        if lower > 0:
            lower_slope = (predicted - _estimate(denoise, predicted, lower)) / lower
            predicted = x + (lower - sigma) * (slope + lower_slope) / 2
        x = predicted
    return x


@torch.no_grad()
def euler(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's 1st-order sampler for dx/dsigma = (x - D(x; sigma)) / sigma (EDM, Eq. 1 and 3).

    (B, C, H, W) noise -> (B, C, H, W) float64, with one evaluation per step.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.euler(denoise, noise() * sigmas[0], sigmas)
    """
    x = start.to(torch.float64)
    for sigma, lower in pairwise(_on_cpu(sigmas).tolist()):
        x = x + (lower - sigma) * (x - _estimate(denoise, x, sigma)) / sigma
    return x


@torch.no_grad()
def ddim(denoise: Denoise, start: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (Song et al. 2021a, Eq. 12 and 16), with one evaluation per step.

    Args:
        denoise: denoise(x, sigma) -> clean estimate.
        start: (B, C, H, W) noise, already scaled by sigmas[0].
        sigmas: (steps + 1,) decreasing noise levels.
        eta: share of the noise that each step renews: 0 gives Euler's steps, 1 ancestral sampling.
        noise: noise() -> (B, C, H, W) standard normal; required for eta above 0.

    Returns:
        (B, C, H, W) float64.

    Raises:
        ValueError: eta is not between 0 and 1, or eta above 0 without `noise`.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.ddim(denoise, noise() * sigmas[0], sigmas)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta:g} is not between 0 and 1")
    x, ladder = start.to(torch.float64), _on_cpu(sigmas)
    lower = ladder[1:]
    renewed = eta * lower * (1 - (lower / ladder[:-1]) ** 2).sqrt()
    kept = (lower**2 - renewed**2).sqrt()
    for sigma, remaining, added in _steps(ladder[:-1], kept, renewed):
        clean = _estimate(denoise, x, sigma)
        x = clean + remaining * (x - clean) / sigma
        if added > 0:
            x = x + added * _drawn(noise, x)
    return x


def ancestral(denoise: Denoise, start: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Tensor:
    """DDPM's ancestral sampler (Ho et al. 2020, Algorithm 2).

    (B, C, H, W) noise -> (B, C, H, W) float64, with one evaluation per step.

    Raises:
        ValueError: `noise` is missing.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.ancestral(denoise, noise() * sigmas[0], sigmas, noise=noise)
    """
    return ddim(denoise, start, sigmas, eta=1.0, noise=noise)


def dpmpp_2m(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): 2nd order, from the last two estimates.

    (B, C, H, W) noise -> (B, C, H, W) float64, with one evaluation per step.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.dpmpp_2m(denoise, noise() * sigmas[0], sigmas)
    """
    return _multistep(denoise, start, sigmas, eta=0.0, noise=None)


def dpmpp_2m_sde(denoise: Denoise, start: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): DPM-Solver++(2M) along the reverse SDE, with new noise in every step.

    (B, C, H, W) noise -> (B, C, H, W) float64, with one evaluation per step.

    Raises:
        ValueError: `noise` is missing.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.dpmpp_2m_sde(denoise, noise() * sigmas[0], sigmas, noise=noise)
    """
    return _multistep(denoise, start, sigmas, eta=1.0, noise=noise)


@torch.no_grad()
def _multistep(denoise: Denoise, start: Tensor, sigmas: Tensor, eta: float, noise: Noise | None) -> Tensor:
    """Exponential integrator in -ln(sigma), with linear extrapolation of the clean estimate (Lu et al. 2022)."""
    x, ladder = start.to(torch.float64), _on_cpu(sigmas)
    widths = (ladder[:-1] / ladder[1:]).log()
    factors = ladder[1:] / ladder[:-1] * (-eta * widths).exp()
    shares = 1 - (-(1 + eta) * widths).exp()
    added = ladder[1:] * (-torch.expm1(-2 * eta * widths)).sqrt()
    previous: Tensor | None = None
    previous_width = 0.0
    for sigma, lower, width, factor, share, spread in _steps(ladder[:-1], ladder[1:], widths, factors, shares, added):
        clean = _estimate(denoise, x, sigma)
        if lower == 0:
            return clean
        middle = clean
        if previous is not None:  # extrapolate to the middle of the step
            middle = clean + (clean - previous) * width / (2 * previous_width)
        x = factor * x + share * middle
        if eta:
            x = x + spread * _drawn(noise, x)
        previous, previous_width = clean, width
    return x


# Adams-Bashforth weights of the slopes, newest first.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def plms(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """PLMS, the linear multistep sampler of PNDM (Liu et al. 2022, Eq. 12 and 13), with a Heun step first.

    (B, C, H, W) noise -> (B, C, H, W) float64, with one evaluation per step and one more. The weights of the
    slopes assume equal steps, and those of `karras_sigmas` are equal enough. Do not use `linear_sigmas`: almost all of
    its levels are high ones, where images do not take shape.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.plms(denoise, noise() * sigmas[0], sigmas)
    """
    x = start.to(torch.float64)
    slopes: deque[Tensor] = deque(maxlen=4)
    for number, (sigma, lower) in enumerate(pairwise(_on_cpu(sigmas).tolist())):
        slopes.appendleft((x - _estimate(denoise, x, sigma)) / sigma)
        slope = _weighted(slopes, ADAMS_BASHFORTH[len(slopes) - 1])
        if number == 0 and lower > 0:
            predicted = x + (lower - sigma) * slope
            slope = (slope + (predicted - _estimate(denoise, predicted, lower)) / lower) / 2
        x = x + (lower - sigma) * slope
    return x


def resampled(
    sampler: Callable[[Denoise, Tensor, Tensor], Tensor],
    denoise: Denoise,
    start: Tensor,
    sigmas: Tensor,
    noise: Noise,
    repeats: int,
) -> Tensor:
    """Every step of a sampler several times, each time from new noise (RePaint: Lugmayr et al. 2022, Algorithm 1).

    For estimates with known values: after a step, the noise of the higher level is added again, so that the unknown
    values get further steps to fit the known ones. Samplers of several steps forget their earlier steps.

    Args:
        sampler: a sampler, called with the two noise levels of each step.
        denoise: denoise(x, sigma) -> clean estimate, such as one of `keep_known`.
        start: (B, C, H, W) noise, already scaled by sigmas[0].
        sigmas: (steps + 1,) decreasing noise levels.
        noise: noise() -> (B, C, H, W) standard normal.
        repeats: how often each step is made; 1 is plain sampling.

    Returns:
        (B, C, H, W) float64.
    """
    x = start.to(torch.float64)
    for sigma, lower in pairwise(_on_cpu(sigmas)):
        for further in reversed(range(repeats)):
            x = sampler(denoise, x, torch.stack([sigma, lower]))
            if further:
                x = x + float((sigma**2 - lower**2).sqrt()) * _drawn(noise, x)
    return x


def _weighted(slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for slope, weight in zip(slopes, weights, strict=True):
        total += weight * slope
    return total


def _on_cpu(sigmas: Tensor) -> Tensor:
    return sigmas.to("cpu", torch.float64)


def _steps(*columns: Tensor) -> Iterator[tuple[float, ...]]:
    """The numbers of one step after the other, as long as every column has one."""
    return zip(*(column.tolist() for column in columns), strict=False)


def _estimate(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, torch.tensor(sigma, dtype=torch.float64)).to(torch.float64)


def _drawn(noise: Noise | None, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("noise: missing, and this sampler adds noise; pass SeededNoise(seeds, shape)")
    return noise().to(x, non_blocking=True)


class SeededNoise:
    """Unit normal noise for a batch in which each image has its own seed, whatever the other images are.

    Each call returns the next (B, C, H, W) float32 noise. The first one is what sampling starts from.

    Args:
        seeds: one seed per image, below 2^64; the noise depends on all of its bits.
        shape: (C, H, W) of an image.

    Example:
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        start = noise() * 80.0
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.generators = [sampling_generator(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next noise, (B, C, H, W); it is drawn on the CPU, so that it is the same for all devices."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
