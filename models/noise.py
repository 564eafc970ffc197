"""Noise levels: the distribution for training, and the decreasing ladders for sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from patchloom.models.sampling_options import LADDER_NAMES


def training_sigmas(normals: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Noise levels with ln(sigma) ~ N(mean, std^2), from standard normals of any shape (EDM, Table 1)."""
    return (normals * std + mean).exp()


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The noise levels of EDM, Eq. 5.

    Args:
        steps: number of levels without the final 0.
        sigma_min: lowest level above 0, in units of the data.
        sigma_max: highest level.
        rho: exponent; larger values give more levels at low noise.

    Returns:
        (steps + 1,) float64, from sigma_max down to sigma_min, then 0.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        sigmas = patchloom.karras_sigmas(steps=18)
    """
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _with_zero((top + _ramp(steps) * (bottom - top)) ** rho)


def linear_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels at equal distances.

    Args:
        steps: number of levels without the final 0.
        sigma_min: lowest level above 0, in units of the data.
        sigma_max: highest level.

    Returns:
        (steps + 1,) float64, from sigma_max down to sigma_min, then 0.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        sigmas = patchloom.linear_sigmas(steps=18)
    """
    return _with_zero(sigma_max + _ramp(steps) * (sigma_min - sigma_max))


def ve_sigmas(steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Tensor:
    """Noise levels of variance-exploding diffusion, in equal ratios (EDM, Table 1).

    Args:
        steps: number of levels without the final 0.
        sigma_min: lowest level above 0, in units of the data.
        sigma_max: highest level.

    Returns:
        (steps + 1,) float64, from sigma_max down to sigma_min, then 0.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        sigmas = patchloom.ve_sigmas(steps=18)
    """
    return _with_zero(sigma_max * (sigma_min / sigma_max) ** _ramp(steps))


def vp_sigmas(steps: int, beta_d: float = 19.9, beta_min: float = 0.1, end: float = 1e-3) -> Tensor:
    """Noise levels of variance-preserving diffusion (EDM, Table 1).

    sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), for t at equal distances from 1 down to `end`.

    Args:
        steps: number of levels without the final 0.
        beta_d: see the formula.
        beta_min: see the formula.
        end: last time above 0.

    Returns:
        (steps + 1,) float64, decreasing, then 0.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        sigmas = patchloom.vp_sigmas(steps=18)
    """
    t = 1 + _ramp(steps) * (end - 1)
    return _with_zero(torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt())


def iddpm_sigmas(
    steps: int, first: int = 8, levels: int = 1000, smallest_ratio: float = 0.001, shift: float = 0.008
) -> Tensor:
    """Noise levels of improved DDPM's cosine schedule (EDM, Table 1).

    Args:
        steps: number of levels without the final 0.
        first: first level j of the schedule that is used; 8 is sigma = 80.2.
        levels: number of levels of the schedule.
        smallest_ratio: lower bound of the ratio of neighbouring signal shares.
        shift: offset of the cosine.

    Returns:
        (steps + 1,) float64, the levels at equal distances of j, then 0.

    Raises:
        ValueError: `steps` is below 1 or above `levels - first`.

    Example:
        sigmas = patchloom.iddpm_sigmas(steps=18)
    """
    if steps > levels - first:
        raise ValueError(f"steps: {steps} is above the {levels - first} levels of the ladder iddpm")
    j = torch.arange(levels + 1, dtype=torch.float64)
    signal = (math.pi / 2 * j / (levels * (shift + 1))).sin() ** 2  # the signal's share of the variance at level j
    u = torch.zeros(levels + 1, dtype=torch.float64)
    for number in range(levels, 0, -1):
        ratio = (signal[number - 1] / signal[number]).clamp(min=smallest_ratio)
        u[number - 1] = ((u[number] ** 2 + 1) / ratio - 1).sqrt()
    chosen = (first + _ramp(steps) * (levels - 1 - first) + 0.5).floor().long()
    return _with_zero(u[chosen])


LADDERS: dict[str, Callable[..., Tensor]] = {name: globals()[f"{name}_sigmas"] for name in LADDER_NAMES}


def _ramp(steps: int) -> Tensor:
    """(steps,) float64 from 0 to 1."""
    if steps < 1:
        raise ValueError(f"steps: {steps} is below 1")
    return torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
