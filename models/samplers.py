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
    """Heun's 2nd-order sampler (EDM, Algorithm 1), with `churn` its stochastic one (Algorithm 2).

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by 2 * steps - 1 calls on a ladder that ends in 0.
    churn, churn_min, churn_max, churn_noise: EDM's S_churn, S_tmin, S_tmax, S_noise; levels in units of the
    data. Raises ValueError for churn without `noise`.
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

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by one call a step.
    """
    x, sigmas = _begin(start, sigmas)
    for sigma, lower in pairwise(sigmas):
        x = x + (lower - sigma) * (x - _estimate(denoise, x, sigma)) / sigma
    return x


@torch.no_grad()
def ddim(denoise: Denoise, start: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (Song et al. 2021a, Eq. 12 and 16): keep the clean estimate, lower its noise, renew a part of it.

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by one call a step. eta: 0 renews none (then DDIM is
    Euler's step), 1 as much as ancestral sampling does. Raises ValueError for another eta, and for one above
    0 without `noise`.
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

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by one call a step. Raises ValueError without `noise`.
    """
    return ddim(denoise, start, sigmas, eta=1.0, noise=noise)


def dpmpp_2m(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): 2nd order from the estimate before this one.

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by one call a step.
    """
    return _multistep(denoise, start, sigmas, eta=0.0, noise=None)


def dpmpp_2m_sde(denoise: Denoise, start: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): the same along the reverse SDE, with noise renewed in every step.

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by one call a step. Raises ValueError without `noise`.
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
    """PLMS, the linear multistep of PNDM (Liu et al. 2022, Eq. 12 and 13), begun by one Heun step.

    (B, C, H, W) noise -> (B, C, H, W) clean, float64, by one call a step and one more. The slopes
    (predicted noise) of up to four levels are extrapolated as on equal distances, which holds on a linear ladder.
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
    """Unit noise for a batch in which each image draws from its own seed, whatever its neighbours are.

    Every call gives the next (B, C, H, W) float32; the first is what sampling starts from.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next noise of every image; drawn on the CPU, so that all devices start alike."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
