"""Guidance: moving the estimate away from what the model thinks of no class at all."""

from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.samplers import Denoise


def guided(denoiser: Denoiser, labels: Tensor | None, guidance: float = 1.0) -> Denoise:
    """The denoiser as a sampler calls it: for these labels, with classifier-free guidance (Ho & Salimans 2022).

    labels: one-hot (B, K) or None. guidance: 1 is none and costs one evaluation, else two:
    D = D_none + guidance * (D_label - D_none).
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        estimate: Tensor = denoiser(x, sigma, labels=labels)
        if guidance == 1 or labels is None:
            return estimate
        unconditional: Tensor = denoiser(x, sigma)
        return unconditional + guidance * (estimate - unconditional)

    return denoise
