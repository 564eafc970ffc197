"""Samplers: from noise to images, down a ladder of noise levels.

All are written for x = clean + sigma * noise (EDM's variables), whatever their papers use; with
denoise(x, sigma) -> clean estimate, called with float64 x (B, C, H, W) and a 0-dim float64 sigma; start
(B, C, H, W), already scaled by sigmas[0]; sigmas (steps + 1,) falling, the last one usually 0; and, where
a sampler adds noise of its own, noise() -> unit normal (B, C, H, W). All return (B, C, H, W) float64.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

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
    """Heun's 2nd-order sampler (EDM, Algorithm 1); with `churn`, its stochastic version (Algorithm 2).

    It calls `denoise` 2 * steps - 1 times if the last noise level is 0.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.
        churn: total noise added during sampling (EDM's S_churn).
        churn_min: lowest noise level at which noise is added (S_tmin), in units of the data.
        churn_max: highest noise level at which noise is added (S_tmax).
        churn_noise: scale of the added noise (S_noise).
        noise: `noise()` returns (B, C, H, W) unit normal noise, such as `SeededNoise`. Needed with churn.

    Returns:
        (B, C, H, W) float64 clean images.

    Raises:
        ValueError: `churn` without `noise`.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.heun(denoise, noise() * sigmas[0], sigmas)
    """
    x, sigmas = _begin(start, sigmas)
    gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1)
    for sigma, lower in pairwise(sigmas):
        if gamma and churn_min <= sigma <= churn_max:
            raised = sigma * (1 + gamma)
            x = x + (raised**2 - sigma**2).sqrt() * churn_noise * _drawn(noise, x)
            sigma = raised
        slope = (x - _estimate(denoise, x, sigma)) / sigma
        ahead = x + (lower - sigma) * slope
        if lower > 0:
            lower_slope = (ahead - _estimate(denoise, ahead, lower)) / lower
            ahead = x + (lower - sigma) * (slope + lower_slope) / 2
        x = ahead
    return x


@torch.no_grad()
def euler(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's 1st-order steps along dx/dsigma = (x - D(x; sigma)) / sigma (EDM, Eq. 1 and 3).

    It calls `denoise` once per step.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.

    Returns:
        (B, C, H, W) float64 clean images.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.euler(denoise, noise() * sigmas[0], sigmas)
    """
    x, sigmas = _begin(start, sigmas)
    for sigma, lower in pairwise(sigmas):
        x = x + (lower - sigma) * (x - _estimate(denoise, x, sigma)) / sigma
    return x


@torch.no_grad()
def ddim(denoise: Denoise, start: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (Song et al. 2021a, Eq. 12 and 16): keep the clean estimate, lower its noise, and renew a share of it.

    It calls `denoise` once per step.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.
        eta: share of the noise that is renewed, between 0 and 1. 0 is Euler's step, 1 is ancestral sampling.
        noise: `noise()` returns (B, C, H, W) unit normal noise, such as `SeededNoise`. Needed if eta is above 0.

    Returns:
        (B, C, H, W) float64 clean images.

    Raises:
        ValueError: eta is not between 0 and 1, or above 0 without `noise`.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.ddim(denoise, noise() * sigmas[0], sigmas)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta:g}: the share of the noise that is renewed lies between 0 and 1")
    x, sigmas = _begin(start, sigmas)
    for sigma, lower in pairwise(sigmas):
        clean = _estimate(denoise, x, sigma)
        renewed = eta * lower * (1 - (lower / sigma) ** 2).sqrt()
        x = clean + (lower**2 - renewed**2).sqrt() * (x - clean) / sigma
        if renewed > 0:
            x = x + renewed * _drawn(noise, x)
    return x


def ancestral(denoise: Denoise, start: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, Algorithm 2): each level from its posterior.

    It calls `denoise` once per step.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.
        noise: `noise()` returns (B, C, H, W) unit normal noise, such as `SeededNoise`.

    Returns:
        (B, C, H, W) float64 clean images.

    Raises:
        ValueError: `noise` is None.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.ancestral(denoise, noise() * sigmas[0], sigmas, noise=noise)
    """
    return ddim(denoise, start, sigmas, eta=1.0, noise=noise)


def dpmpp_2m(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): 2nd order, from this estimate and the previous one.

    It calls `denoise` once per step.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.

    Returns:
        (B, C, H, W) float64 clean images.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.karras_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.dpmpp_2m(denoise, noise() * sigmas[0], sigmas)
    """
    return _multistep(denoise, start, sigmas, eta=0.0, noise=None)


def dpmpp_2m_sde(denoise: Denoise, start: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): the same along the reverse SDE, with noise renewed in every step.

    It calls `denoise` once per step.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.
        noise: `noise()` returns (B, C, H, W) unit normal noise, such as `SeededNoise`.

    Returns:
        (B, C, H, W) float64 clean images.

    Raises:
        ValueError: `noise` is None.

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
    """Exponential integrator in l = -ln(sigma), with a linear extrapolation of the clean estimate."""
    x, sigmas = _begin(start, sigmas)
    before: Tensor | None = None
    width_before = sigmas.new_zeros(())
    for sigma, lower in pairwise(sigmas):
        clean = _estimate(denoise, x, sigma)
        if lower == 0:
            return clean
        width = (sigma / lower).log()
        ahead = clean
        if before is not None:  # the estimate in the middle of the step
            ahead = clean + (clean - before) * width / (2 * width_before)
        kept = (-(1 + eta) * width).exp()
        x = lower / sigma * (-eta * width).exp() * x + (1 - kept) * ahead
        if eta:
            x = x + lower * (-torch.expm1(-2 * eta * width)).sqrt() * _drawn(noise, x)
        before, width_before = clean, width
    return x


# Adams-Bashforth's weights of the newest slope, the one before, ...
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def plms(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """PLMS, the linear multistep method of PNDM (Liu et al. 2022, Eq. 12 and 13), started by one Heun step.

    It calls `denoise` once per step, and once more. The slopes (predicted noise) of up to four levels are extrapolated
    as if the levels had equal distances, which holds for `linear_sigmas`.

    Args:
        denoise: `denoise(x, sigma)`, called with x (B, C, H, W) float64 and a 0-dim float64 sigma; returns the clean
            estimate (B, C, H, W). A `Denoiser` is one.
        start: (B, C, H, W) noise with standard deviation `sigmas[0]`.
        sigmas: (steps + 1,) falling noise levels; the last one is usually 0.

    Returns:
        (B, C, H, W) float64 clean images.

    Example:
        def denoise(x, sigma):  # the ideal denoiser of standard normal data
            return x / (1 + sigma**2)

        sigmas = patchloom.linear_sigmas(steps=18)
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        images = patchloom.plms(denoise, noise() * sigmas[0], sigmas)
    """
    x, sigmas = _begin(start, sigmas)
    slopes: deque[Tensor] = deque(maxlen=4)
    for number, (sigma, lower) in enumerate(pairwise(sigmas)):
        slopes.appendleft((x - _estimate(denoise, x, sigma)) / sigma)
        slope = _weighted(slopes, ADAMS_BASHFORTH[len(slopes) - 1])
        if number == 0 and lower > 0:
            ahead = x + (lower - sigma) * slope
            slope = (slope + (ahead - _estimate(denoise, ahead, lower)) / lower) / 2
        x = x + (lower - sigma) * slope
    return x


def _weighted(slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for slope, weight in zip(slopes, weights, strict=True):
        total += weight * slope
    return total


def _begin(start: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    return start.to(torch.float64), sigmas.to(device=start.device, dtype=torch.float64)


def _estimate(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return denoise(x, sigma).to(torch.float64)


def _drawn(noise: Noise | None, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("this sampler adds noise while it samples: give `noise`, such as SeededNoise(seeds, shape)")
    return noise().to(x)


class SeededNoise:
    """Unit normal noise for a batch in which each image has its own seed, whatever the other images are.

    Each call returns the next (B, C, H, W) float32 noise. The first one is what sampling starts from.

    Args:
        seeds: one seed per image.
        shape: (C, H, W) of an image.

    Example:
        noise = patchloom.SeededNoise(seeds=[0, 1], shape=(3, 8, 8))
        start = noise() * 80.0
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next noise of every image; drawn on the CPU, so that all devices start alike."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
