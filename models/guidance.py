"""Guidance: estimates moved away from the unconditional one, and estimates with a fixed centre."""

from collections.abc import Callable

import torch
from torch import Tensor

from patchloom.models.samplers import Denoise

EVERYWHERE = (0.0, float("inf"))


def guided(
    denoiser: Callable[..., Tensor],
    labels: Tensor | None,
    guidance: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    coordinates: Tensor | None = None,
    *,
    in_one_batch: bool = False,
) -> Denoise:
    """The denoiser as a sampler calls it, with classifier-free guidance (Ho & Salimans 2022).

    D = D_none + guidance * (D_label - D_none) (Patch Diffusion, section 4.1).

    Args:
        denoiser: the network.
        labels: one-hot (B, K), or None for no class and no guidance.
        guidance: the strength. 1 is no guidance and one evaluation per call, any other value two.
        interval: guidance acts at noise levels above the first and up to the second (Kynkäänniemi et al. 2024).
        coordinates: (2, H, W). Default: the full grid of the input's size.
        in_one_batch: both evaluations are one batch of twice the size.
    """

    def evaluate(x: Tensor, sigma: Tensor, classes: Tensor | None) -> Tensor:
        grid = None if coordinates is None else coordinates.expand(len(x), -1, -1, -1)
        return denoiser(x, sigma, grid, classes)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if labels is None or not guides_at(float(sigma), guidance, interval):
            return evaluate(x, sigma, labels)
        if in_one_batch:
            pair = evaluate(torch.cat([x, x]), sigma, torch.cat([labels, torch.zeros_like(labels)]))
            estimate, unconditional = pair.chunk(2)
        else:
            estimate, unconditional = evaluate(x, sigma, labels), evaluate(x, sigma, None)
        return unconditional + guidance * (estimate - unconditional)

    return denoise


def guides_at(sigma: float, guidance: float, interval: tuple[float, float] = EVERYWHERE) -> bool:
    """Whether guidance acts at this noise level, which needs a second evaluation."""
    return guidance != 1 and interval[0] < sigma <= interval[1]


def keep_centre(denoise: Denoise, centre: Tensor) -> Denoise:
    """Fix the centre of the canvas and sample its surroundings (Patch Diffusion, section 4.5).

    The known values replace the estimate, so every sampler moves the noise there straight to them.

    Args:
        denoise: the denoiser, as a sampler calls it.
        centre: (B or 1, C, h, w) clean values of the network, not larger than the canvas.
    """
    height, width = centre.shape[2:]

    def with_centre(x: Tensor, sigma: Tensor) -> Tensor:
        estimate = denoise(x, sigma).clone()
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        estimate[:, :, top : top + height, left : left + width] = centre.to(estimate)
        return estimate

    return with_centre
