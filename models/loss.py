"""Losses: the weighted squared error of the denoiser on patches, and on held-out full images."""

import torch
from torch import Tensor

from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import Denoiser
from patchloom.models.random_draws import derive_seed

SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0)  # borders between `SIGMA_BINS`
HELD_OUT_SIGMAS = SIGMA_EDGES  # noise levels of the held-out loss: the same, so that pages compare them
SIGMA_BINS = ("0-0.1", "0.1-0.3", "0.3-1", "1-3", "3-inf")


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The weight that gives every noise level the same loss at initialisation (EDM, Table 1); elementwise.

    Args:
        sigma: noise levels of any shape, in units of the data.
        sigma_data: standard deviation of the data.
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
    condition: Tensor | None = None,
) -> Tensor:
    """The weighted squared error of each patch (Patch Diffusion, Eq. 4; EDM, Eq. 8).

    Args:
        denoiser: the network.
        clean: (B, C, s, s) patches.
        noise: (B, C, s, s) of unit variance.
        sigma: (B,) noise levels.
        coordinates: (B, 2, s, s); None for full images, or for a network without coordinate channels.
        labels: one-hot (B, K), or text embeddings (B, tokens, width); None for no class or text.
        reduction: over the channels and pixels of a patch: "mean", or "sum" as in the released code.
        augmentation: (B, A) labels of `augment`; None for unchanged images.
        condition: (B, K, s, s) values of the network; None for no condition.

    Returns:
        (B,) losses.
    """
    spread = sigma[:, None, None, None]
    further = () if condition is None else (condition,)
    estimate = denoiser(clean + spread * noise, sigma, coordinates, labels, *further, augmentation=augmentation)
    error = (estimate - clean).square().flatten(1)
    error = error.sum(1) if reduction == "sum" else error.mean(1)
    weighted: Tensor = _weight(denoiser, sigma) * error
    return weighted


def _weight(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    network = getattr(denoiser, "model", None)
    if isinstance(network, ControlNetwork):  # the loss that its base was trained with
        return network.loss_weight(sigma)
    return edm_weight(sigma, denoiser.sigma_data)


def losses_by_sigma(losses: Tensor, sigma: Tensor) -> Tensor:
    """Sums and counts of losses by noise level. Losses that are not finite are left out.

    Args:
        losses: (B,).
        sigma: (B,) noise levels.

    Returns:
        (5, 2): the sum and the count in each of `SIGMA_BINS`.
    """
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES).to(sigma.device, non_blocking=True))
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
    condition: Tensor | None = None,
) -> dict[float, float]:
    """The mean weighted loss on full-size images at fixed noise levels.

    The noise depends only on the seed and the shape, so that models are compared on the same noise.

    Args:
        denoiser: the network.
        clean: (N, C, R, R) values of the network.
        labels: one-hot (N, K), or None.
        sigmas: noise levels.
        seed: seed of the noise.
        batch_size: images per evaluation.
        condition: (N, K, R, R) values of the network, or None.

    Returns:
        The mean loss by noise level.
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
            chosen, shown = (None if given is None else given[rows] for given in (labels, condition))
            found = denoising_loss(denoiser, images, noise[rows], level, labels=chosen, condition=shown)
            total += float(found.double().sum())
        losses[sigma] = total / len(clean)
    return losses
