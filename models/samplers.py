"""Samplers: from noise to images, down a ladder of noise levels."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def heun(denoise: Denoise, start: Tensor, sigmas: Tensor) -> Tensor:
    """Heun's 2nd-order deterministic sampler (EDM, Algorithm 1).

    denoise: (x, sigma) -> clean estimate, called with float64 x (B, C, H, W) and a 0-dim float64 sigma;
    start: (B, C, H, W) noise, already scaled by sigmas[0]; sigmas: (steps + 1,) falling, ending in 0.
    Returns (B, C, H, W) float64, after 2 * steps - 1 calls of `denoise`.
    """
    sigmas = sigmas.to(device=start.device, dtype=torch.float64)
    x = start.to(torch.float64)
    for sigma, lower in pairwise(sigmas):
        slope = (x - denoise(x, sigma).to(torch.float64)) / sigma
        euler = x + (lower - sigma) * slope
        if lower > 0:
            lower_slope = (euler - denoise(euler, lower).to(torch.float64)) / lower
            euler = x + (lower - sigma) * (slope + lower_slope) / 2
        x = euler
    return x


def seeded_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Unit noise (B, C, H, W) float32, each image from its own seed and whatever its neighbours are."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
