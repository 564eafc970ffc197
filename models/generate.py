"""Generate: seeds in, images out; the image of a seed does not depend on its neighbours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchloom.models import samplers
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.codec import from_pixels, to_pixels
from patchloom.models.denoiser import halvings_of
from patchloom.models.guidance import EVERYWHERE, guided, guides_at, keep_centre
from patchloom.models.noise import LADDERS
from patchloom.models.patches import extended_grid
from patchloom.models.samplers import Denoise, Noise, SeededNoise
from patchloom.models.sampling_options import SAMPLER_NAMES, SamplingOptions
from patchloom.models.step import one_hot

SAMPLERS: dict[str, Callable[..., Tensor]] = {name: getattr(samplers, name.replace("-", "_")) for name in SAMPLER_NAMES}
CLASSES_IN_ERRORS = 20  # how many classes an error names


@dataclass(frozen=True)
class Sampling(SamplingOptions):
    """How noise becomes images. The image of a seed depends on the model, the seed, the label and these options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sigmas()  # raises ValueError if the ladder has fewer steps

    def sigmas(self) -> Tensor:
        """The (steps + 1,) float64 noise levels, ending in 0."""
        return LADDERS[self.ladder](self.steps)

    def __call__(self, denoise: Denoise, noise: Noise) -> Tensor:
        """Sample from `noise`, whose first draw is the start: (B, C, H, W) float64."""
        options: dict[str, Any] = {}
        if self.sampler == "heun":
            low, high = self.churn_between or EVERYWHERE
            options = {"churn": self.churn, "churn_min": low, "churn_max": high, "churn_noise": self.churn_noise}
        if self.sampler in ("heun", "ancestral", "dpmpp-2m-sde"):
            options["noise"] = noise
        sigmas = self.sigmas()
        return SAMPLERS[self.sampler](denoise, noise().double() * sigmas[0], sigmas, **options)

    @property
    def network_evaluations(self) -> int:
        """How often an image goes through the network; counted by sampling one that is all zero."""
        count = 0

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal count
            count += 2 if guides_at(float(sigma), self.guidance, self.guidance_between or EVERYWHERE) else 1
            return x

        self(counted, lambda: torch.zeros(1, 1, 1, 1))
        return count


def check_fit(sampling: Sampling, card: ModelCard) -> None:
    """Raise ValueError where the model of this card (`model.json`) cannot be sampled so, with the reason."""
    if sampling.guidance != 1 and not (card.class_names and card.label_dropout > 0):
        lacks = "label dropout" if card.class_names else "classes"
        raise ValueError(
            f"guidance {sampling.guidance:g} compares a class with no class, and this model was trained without "
            f"{lacks}, so it never learned one of them: leave it at 1"
        )
    multiple = 2 ** halvings_of(card.denoiser) * (card.autoencoder.downscale if card.autoencoder else 1)
    if sampling.size and any(side % multiple or side < 1 for side in sampling.size):
        raise ValueError(
            f"size {sampling.size[0]}x{sampling.size[1]} cannot be halved as often as the networks do: "
            f"choose multiples of {multiple}"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of the CPU for the block: their number changes the order of sums, and so the last bit of an image."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def generate(
    model: SamplingModel, seeds: list[int], labels: list[int], sampling: Sampling, centre: Tensor | None = None
) -> Tensor:
    """(B, C, H, W) uint8 images, one a seed, by the sampler on the full grid of coordinates (section 3.4).

    labels: a class number a seed, -1 for none. centre: (C, h, w) uint8, an image that stays in the middle
    of a larger canvas. The bytes of an image depend on its seed, its label, the options and the size of the
    batch, not on what else is in the batch. Raises ValueError for sizes that do not fit the network.
    """
    denoiser = model.denoiser
    device = next(denoiser.parameters()).device
    downscale = model.autoencoder.downscale if model.autoencoder else 1
    height, width = (side // downscale for side in sampling.size or (denoiser.resolution * downscale,) * 2)
    noise = SeededNoise(seeds, (denoiser.channels, height, width))
    classes = one_hot(torch.tensor(labels), denoiser.classes).to(device) if denoiser.classes else None
    coordinates = None
    if denoiser.coordinates != "none" and sampling.canvas == "extrapolate":
        coordinates = extended_grid(height, width, denoiser.resolution, device)
    denoise = guided(denoiser, classes, sampling.guidance, sampling.guidance_between or EVERYWHERE, coordinates)
    if centre is not None:
        denoise = keep_centre(denoise, from_pixels(centre[None].to(device), model.normalisation, model.autoencoder))
    x = sampling(denoise, lambda: noise().to(device))
    return to_pixels(x, model.normalisation, model.autoencoder)


def class_number(label: int | str | None, class_names: Sequence[str]) -> int:
    """A class by its name or number -> its number; -1 for None, an empty word or -1: no class.

    Raises ValueError for a class that the model does not know.
    """
    if label in (None, "", -1, "-1"):
        return -1
    if str(label) in class_names:
        return class_names.index(str(label))
    if str(label).isdigit() and int(str(label)) < len(class_names):
        return int(str(label))
    known = ", ".join(class_names[:CLASSES_IN_ERRORS]) or "none, it has no classes"
    known += ", ..." if len(class_names) > CLASSES_IN_ERRORS else ""
    raise ValueError(f"is not a class of this model: it knows {known}")


def default_labels(seeds: list[int], classes: int) -> list[int]:
    """Classes in turn, so that any run of seeds is balanced; -1 where the model has none."""
    return [seed % classes if classes else -1 for seed in seeds]


def generate_padded(
    model: SamplingModel,
    seeds: list[int],
    labels: list[int],
    batch: int,
    sampling: Sampling,
    centre: Tensor | None = None,
) -> Tensor:
    """`generate` in compute batches of exactly `batch`, the last one padded: (N, C, H, W) uint8, one a seed.

    Equal batches give equal bits, so a seed's bytes are the same in a job of any size.
    """
    images = []
    for start in range(0, len(seeds), batch):
        some, their = seeds[start : start + batch], labels[start : start + batch]
        pad = batch - len(some)
        made = generate(model, some + some[-1:] * pad, their + their[-1:] * pad, sampling, centre)
        images.append(made[: len(some)])
    return torch.cat(images)
