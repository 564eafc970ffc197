"""Losses: how far the denoiser is from the clean patch, weighed so that every noise level counts."""

import torch
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.random_draws import derive_seed

SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0)  # of the noise levels that losses are told apart by
HELD_OUT_SIGMAS = (0.1, 0.3, 1.0, 3.0)  # fixed noise levels of the held-out loss
SIGMA_BINS = ("0-0.1", "0.1-0.3", "0.3-1", "1-3", "3-inf")


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The weight that makes every noise level matter equally at initialisation (EDM, Table 1); elementwise.

    sigma: noise levels of any shape; sigma_data: the data's standard deviation, in the same units.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(
    denoiser: Denoiser,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    coordinates: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    augmentation: Tensor | None = None,
) -> Tensor:
    """The weighted squared error of each patch, (B,) (Patch Diffusion, Eq. 4; EDM, Eq. 8).

    clean, noise: (B, C, s, s), noise of unit variance; sigma: (B,); coordinates: (B, 2, s, s); labels:
    (B, K); augmentation: (B, A). `reduction` runs over a patch's channels and pixels: "mean", or "sum" as
    the paper's released code does.
    """
    spread = sigma[:, None, None, None]
    estimate = denoiser(clean + spread * noise, sigma, coordinates, labels, augmentation=augmentation)
    error = (estimate - clean).square().flatten(1)
    error = error.sum(1) if reduction == "sum" else error.mean(1)
    weighted: Tensor = edm_weight(sigma, denoiser.sigma_data) * error
    return weighted


def losses_by_sigma(losses: Tensor, sigma: Tensor) -> Tensor:
    """(B,) losses and their (B,) noise levels -> (5, 2): sum and count in each of `SIGMA_BINS`.

    A loss that is no number is left out of both, so that one bad crop does not hide all the others.
    """
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES, device=sigma.device))
    good = losses.isfinite()
    sums = torch.zeros(len(SIGMA_BINS), 2, device=losses.device)
    return sums.index_add_(0, bins, torch.stack([losses.detach().where(good, 0), good.float()], dim=1))


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    clean: Tensor,
    labels: Tensor | None,
    sigmas: tuple[float, ...] = HELD_OUT_SIGMAS,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[float, float]:
    """The mean weighted loss on full-size images at fixed noise levels and fixed noise, by sigma.

    clean: (N, C, R, R); labels: (N, K) or None. The same images, seed and sigmas give the same luck, so
    that models are compared and not draws.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "held out"))
    losses: dict[float, float] = {}
    for sigma in sigmas:
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        total = 0.0
        for start in range(0, len(clean), batch_size):
            rows = slice(start, start + batch_size)
            images = clean[rows]
            level = torch.full((len(images),), sigma, device=clean.device)
            chosen = None if labels is None else labels[rows]
            total += float(denoising_loss(denoiser, images, noise[rows], level, labels=chosen).double().sum())
        losses[sigma] = total / len(clean)
    return losses
