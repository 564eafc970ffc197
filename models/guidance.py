"""Guidance: moving the estimate away from what the model thinks of no class at all."""

from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.samplers import Denoise

EVERYWHERE = (0.0, float("inf"))


def guided(
    denoiser: Denoiser,
    labels: Tensor | None,
    guidance: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    coordinates: Tensor | None = None,
) -> Denoise:
    """The denoiser as a sampler calls it: for these labels, with classifier-free guidance (Ho & Salimans 2022).

    labels: one-hot (B, K) or None. guidance: 1 is none and costs one evaluation, else two:
    D = D_none + guidance * (D_label - D_none) (Patch Diffusion, section 4.1). interval: the noise levels
    (above, up to) at which it acts (Kynkäänniemi et al. 2024). coordinates: (2, H, W), or None for the
    full grid of the input's own size.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        where = None if coordinates is None else coordinates.expand(len(x), -1, -1, -1)
        estimate: Tensor = denoiser(x, sigma, where, labels)
        if labels is None or not guides_at(float(sigma), guidance, interval):
            return estimate
        unconditional: Tensor = denoiser(x, sigma, where)
        return unconditional + guidance * (estimate - unconditional)

    return denoise


def guides_at(sigma: float, guidance: float, interval: tuple[float, float] = EVERYWHERE) -> bool:
    """Whether guidance acts, and costs a second evaluation, at this noise level."""
    return guidance != 1 and interval[0] < sigma <= interval[1]


def keep_centre(denoise: Denoise, centre: Tensor) -> Denoise:
    """Out-painting: the middle of the canvas is known, and all around it is sampled (Patch Diffusion, section 4.5).

    centre: (B or 1, C, h, w) clean values, no larger than the canvas. Where they are known they replace the
    estimate, so that every sampler leads the noise there straight to them and no further.
    """
    height, width = centre.shape[2:]

    def with_centre(x: Tensor, sigma: Tensor) -> Tensor:
        estimate = denoise(x, sigma).clone()
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        estimate[:, :, top : top + height, left : left + width] = centre.to(estimate)
        return estimate

    return with_centre
