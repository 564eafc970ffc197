"""Generate: seeds in, images out; the image of a seed does not depend on its neighbours."""

import torch
from torch import Tensor

from patchloom.models.checkpoints import Model
from patchloom.models.codec import to_pixels
from patchloom.models.guidance import guided
from patchloom.models.noise import karras_sigmas
from patchloom.models.samplers import heun, seeded_noise
from patchloom.models.step import one_hot


@torch.no_grad()
def generate(model: Model, seeds: list[int], labels: list[int], steps: int = 18, guidance: float = 1.0) -> Tensor:
    """(B, 3, H, W) uint8 images, one a seed, by Heun's sampler on the full grid of coordinates (section 3.4).

    labels: a class number a seed, -1 for none. The bytes of an image depend on its seed, its label, the
    options and the size of the batch, not on what else is in the batch.
    """
    denoiser = model.denoiser
    device = next(denoiser.parameters()).device
    noise = seeded_noise(seeds, (denoiser.channels, denoiser.resolution, denoiser.resolution)).to(device)
    classes = one_hot(torch.tensor(labels), denoiser.classes).to(device) if denoiser.classes else None
    sigmas = karras_sigmas(steps)
    x = heun(guided(denoiser, classes, guidance), noise.double() * sigmas[0], sigmas)
    return to_pixels(x, model.space, model.autoencoder)


def default_labels(seeds: list[int], classes: int) -> list[int]:
    """Classes in turn, so that any run of seeds is balanced; -1 where the model has none."""
    return [seed % classes if classes else -1 for seed in seeds]


def generate_padded(
    model: Model, seeds: list[int], labels: list[int], batch: int, steps: int = 18, guidance: float = 1.0
) -> Tensor:
    """`generate` in compute batches of exactly `batch`, the last one padded: (len(seeds), 3, H, W) uint8.

    Equal batches give equal bits, so a seed's bytes are the same in a job of any size.
    """
    images = []
    for start in range(0, len(seeds), batch):
        some, their = seeds[start : start + batch], labels[start : start + batch]
        pad = batch - len(some)
        made = generate(model, some + some[-1:] * pad, their + their[-1:] * pad, steps, guidance)
        images.append(made[: len(some)])
    return torch.cat(images)
