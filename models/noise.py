"""Noise: the levels that training draws and the ladder that sampling climbs down."""

import torch
from torch import Tensor


def training_sigmas(luck: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Noise levels with ln(sigma) ~ N(mean, std^2) from standard normals of any shape (EDM, Table 1)."""
    return (luck * std + mean).exp()


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The (steps + 1,) float64 noise levels of EDM, Eq. 5, from sigma_max down to sigma_min, then 0."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: sampling takes at least 1")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])
