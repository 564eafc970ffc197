"""Guidance: estimates moved away from the unconditional one."""

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
    condition: Tensor | None = None,
) -> Denoise:
    """The denoiser as a sampler calls it, with classifier-free guidance (Ho & Salimans 2022).

    D = D_none + guidance * (D_label - D_none) (Patch Diffusion, section 4.2). D_none has neither label nor condition.

    Args:
        denoiser: the network.
        labels: one-hot (B, K), or None for no class. Without label and condition there is no guidance.
        guidance: the strength. 1 is no guidance and one evaluation per call, any other value two.
        interval: guidance acts at noise levels above the first and up to the second (Kynkäänniemi et al. 2024).
        coordinates: (2, H, W). Default: the full grid of the input's size.
        in_one_batch: both evaluations are one batch of twice the size.
        condition: (B, K, H, W) values of the network, or None for no condition.
    """

    def evaluate(x: Tensor, sigma: Tensor, classes: Tensor | None, shown: Tensor | None) -> Tensor:
        grid = None if coordinates is None else coordinates.expand(len(x), -1, -1, -1)
        further = () if condition is None else (shown,)
        return denoiser(x, sigma, grid, classes, *further)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        has_nothing = labels is None and condition is None
        if has_nothing or not guides_at(float(sigma), guidance, interval):
            return evaluate(x, sigma, labels, condition)
        if in_one_batch:
            pair = evaluate(torch.cat([x, x]), sigma, _then_zeros(labels), _then_zeros(condition))
            estimate, unconditional = pair.chunk(2)
        else:
            estimate, unconditional = evaluate(x, sigma, labels, condition), evaluate(x, sigma, None, None)
        return unconditional + guidance * (estimate - unconditional)

    return denoise


def _then_zeros(given: Tensor | None) -> Tensor | None:
    return None if given is None else torch.cat([given, torch.zeros_like(given)])


def guides_at(sigma: float, guidance: float, interval: tuple[float, float] = EVERYWHERE) -> bool:
    """Whether guidance acts at this noise level, which needs a second evaluation."""
    return guidance != 1 and interval[0] < sigma <= interval[1]
