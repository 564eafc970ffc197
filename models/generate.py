"""Generation: images from seeds. The image of a seed does not depend on the other images of its batch."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from patchloom.errors import did_you_mean
from patchloom.models import samplers
from patchloom.models.cards import CONTROLNET, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.codec import to_pixels
from patchloom.models.conditions import check_condition, network_condition
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import halvings_of
from patchloom.models.guidance import EVERYWHERE, guided, guides_at
from patchloom.models.inpainting import GRADIENTS, KnownPixels
from patchloom.models.noise import LADDERS
from patchloom.models.patches import extended_grid
from patchloom.models.precision import half_precision
from patchloom.models.samplers import Denoise, Noise, SeededNoise, resampled
from patchloom.models.sampling_options import SAMPLER_NAMES, SamplingOptions
from patchloom.models.step import one_hot
from patchloom.models.windows import WindowedNetwork

SAMPLERS: dict[str, Callable[..., Tensor]] = {name: getattr(samplers, name.replace("-", "_")) for name in SAMPLER_NAMES}
IMAGE_CHANNELS = 3  # of what an autoencoder decodes
PLAIN_NUMBER = re.compile(r"-1|0|[1-9][0-9]{0,8}")  # not 07, which may be a name
CLASSES_IN_ERRORS = 20  # class names that an error lists


@dataclass(frozen=True)
class Sampling(SamplingOptions):
    """How noise becomes images. The image of a seed depends on the model, the seed, the label and these options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sigmas()  # raises ValueError if the ladder has fewer steps

    def sigmas(self, limits: tuple[float, float] | None = None) -> Tensor:
        """The (steps + 1,) float64 noise levels, ending in 0.

        Args:
            limits: the lowest and highest level that the network knows, between which the ladder is.
        """
        ladder = LADDERS[self.ladder]
        if limits is None:
            return ladder(self.steps)
        ends = signature(ladder).parameters
        if "sigma_max" in ends:
            low, high = max(limits[0], ends["sigma_min"].default), min(limits[1], ends["sigma_max"].default)
            return ladder(self.steps, sigma_min=low, sigma_max=high)
        levels = ladder(self.steps)
        logs, (low, high) = levels[:-1].log(), map(math.log, limits)
        if logs[-1] < low or logs[0] > high:  # other ladders are scaled, in ln(sigma)
            low, high = max(low, float(logs[-1])), min(high, float(logs[0]))
            logs = (low + (logs - logs[-1]) * ((high - low) / (logs[0] - logs[-1]).clamp(min=1e-9))).clamp(low, high)
        return torch.cat([logs.exp(), levels[-1:]])

    def __call__(
        self, denoise: Denoise, noise: Noise, repeats: int = 1, limits: tuple[float, float] | None = None
    ) -> Tensor:
        """Sample with this sampler.

        Args:
            denoise: denoise(x, sigma) -> clean estimate.
            noise: noise() -> (B, C, H, W) standard normal; the first call gives the start.
            repeats: how often each step is made (see `resampled`).
            limits: as for `sigmas`.

        Returns:
            (B, C, H, W) float64.
        """
        options: dict[str, Any] = {}
        if self.sampler == "heun":
            low, high = self.churn_between or EVERYWHERE
            churn = self.churn / self.steps if repeats > 1 else self.churn  # the steps are sampled one by one
            options = {"churn": churn, "churn_min": low, "churn_max": high, "churn_noise": self.churn_noise}
        sampler, sigmas = SAMPLERS[self.sampler], self.sigmas(limits)
        if "noise" in signature(sampler).parameters:
            options["noise"] = noise
        start, chosen = noise().double() * float(sigmas[0]), partial(sampler, **options)
        if repeats == 1:
            return chosen(denoise, start, sigmas)
        return resampled(chosen, denoise, start, sigmas, noise, repeats)

    @property
    def network_evaluations(self) -> int:
        """Network evaluations per image."""
        return self.evaluations_given(None)

    def evaluations_given(self, known: KnownPixels | None) -> int:
        """Network evaluations per image, counted by sampling an empty image; a gradient counts as one."""
        count = 0

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal count
            count += 2 if guides_at(float(sigma), self.guidance, self.guidance_between or EVERYWHERE) else 1
            return x

        self(counted, lambda: torch.zeros(1, 1, 1, 1), known.repeats if known else 1)
        return count * (1 + GRADIENTS if known and known.needs_gradients else 1)


def check_fit(sampling: Sampling, card: ModelCard) -> None:
    """Check that a model supports these options.

    Raises:
        ValueError: guidance for a model trained without it, or a size that the networks cannot halve.
    """
    if sampling.guidance != 1 and (lacks := _lacks_for_guidance(card)):
        raise ValueError(
            f"guidance: {sampling.guidance:g} needs a model trained with classes and label dropout, or with "
            f"a condition and condition dropout, and this model has no {lacks}; leave it at 1"
        )
    multiple = 2 ** halvings_of(card.denoiser) * card.downscale
    if sampling.size and any(side % multiple or side < 1 for side in sampling.size):
        raise ValueError(
            f"size: {sampling.size[0]}x{sampling.size[1]} is not a multiple of {multiple} pixels on both sides; "
            f"choose multiples of {multiple}"
        )
    trained = card.image_side
    if sampling.canvas == "windows" and sampling.size and min(sampling.size) < trained:
        raise ValueError(
            f"size: {sampling.size[0]}x{sampling.size[1]} is smaller on one side than a window of {trained}x{trained}; "
            f"choose at least {trained} pixels"
        )


def _lacks_for_guidance(card: ModelCard) -> str:
    """What the training lacked, without which the network has no estimate without label and condition; or nothing."""
    if card.denoiser.network == CONTROLNET:  # its base has one
        return ""
    if not card.class_names and card.condition is None:
        return "classes"
    if card.class_names and not card.label_dropout:
        return "label dropout"
    return "condition dropout" if card.condition is not None and not card.condition.dropout else ""


def image_size(card: ModelCard, sampling: Sampling) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    return sampling.size or (card.image_side, card.image_side)


@torch.no_grad()
def generate(
    model: SamplingModel,
    seeds: list[int],
    labels: list[int],
    sampling: Sampling,
    known: KnownPixels | None = None,
    check: Callable[[], None] | None = None,
    condition: Tensor | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """Generate one batch of images on the full grid of coordinates (Patch Diffusion, section 3.4).

    The bytes of an image depend on its seed, its label, the options and the size of the batch, but not on the other
    images of the batch.

    Args:
        model: the model.
        seeds: one per image.
        labels: class number of each image, -1 for no class.
        sampling: the options.
        known: the pixels that all images share; the others are sampled to fit.
        check: called before each evaluation of the network; ends the sampling by an exception.
        condition: (B, K, H, W), a condition image per image, with values as in the dataset, for models that need one.
        text: (B, tokens, width), a text embedding per image, for models with texts. Default: no text.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        ValueError: the size does not fit the network, a condition is missing or does not fit, or the values overflowed
            in half precision.
    """
    device = next(model.denoiser.parameters()).device
    with half_precision(device, sampling.precision):
        return _generate(model, seeds, labels, sampling, known, check, condition, text, device)


def _generate(
    model: SamplingModel,
    seeds: list[int],
    labels: list[int],
    sampling: Sampling,
    known: KnownPixels | None,
    check: Callable[[], None] | None,
    condition: Tensor | None,
    text: Tensor | None,
    device: torch.device,
) -> Tensor:
    denoiser = model.denoiser
    check_condition(
        model.card.condition, None if condition is None else condition.shape, image_size(model.card, sampling)
    )
    if condition is not None and model.card.condition is not None:
        condition = network_condition(model.card.condition, condition.to(device, non_blocking=True))
    height, width = (side // model.card.downscale for side in image_size(model.card, sampling))
    noise = SeededNoise(seeds, (denoiser.channels, height, width))
    classes = (
        one_hot(torch.tensor(labels).to(device, non_blocking=True), denoiser.classes) if denoiser.classes else None
    )
    if denoiser.text_shape is not None:
        if text is not None and text.shape[1:] != denoiser.text_shape:
            raise ValueError(f"text: is {tuple(text.shape[1:])} tokens x width, and must be {denoiser.text_shape}")
        classes = None if text is None else text.to(device, torch.float32, non_blocking=True)
    elif text is not None:
        raise ValueError("text: this model was trained without texts; leave it out")
    coordinates = None
    if denoiser.coordinates != "none" and sampling.canvas == "extrapolate":
        coordinates = extended_grid(height, width, denoiser.resolution, device)
    network: Callable[..., Tensor] = model.replayed or denoiser
    if known is not None and known.needs_gradients:
        network = denoiser  # a replay has no gradients
    if sampling.canvas == "windows":
        network = WindowedNetwork(network, denoiser.resolution)
    denoise = guided(
        network, classes, sampling.guidance, sampling.guidance_between or EVERYWHERE, coordinates,
        in_one_batch=device.type != "cpu",  # fewer launches
        condition=condition,
    )  # fmt: skip
    if check is not None:
        denoise = _checked_before(denoise, check)
    if known is not None:
        denoise = known.estimates(denoise, model.normalisation, model.autoencoder, device)
    limits = denoiser.model.sigma_range if isinstance(denoiser.model, ControlNetwork) else None
    x = sampling(denoise, lambda: noise().to(device, non_blocking=True), known.repeats if known else 1, limits)
    if sampling.precision != "fp32" and not x.isfinite().all():
        raise ValueError(f"precision: the samples are not finite in {sampling.precision}; use fp32")
    return to_pixels(x, model.normalisation, model.autoencoder)


def _checked_before(denoise: Denoise, check: Callable[[], None]) -> Denoise:
    def checked(x: Tensor, sigma: Tensor) -> Tensor:
        check()
        return denoise(x, sigma)

    return checked


def class_number(label: int | str | None, class_names: Sequence[str]) -> int:
    """The number of a class.

    Args:
        label: number of the class, or its name; None, "" or -1 for no class. A text such as "7" is the class number 7
            if no class has this name.
        class_names: names of the model's classes.

    Returns:
        The number, or -1 for no class.

    Raises:
        ValueError: the model has no such class.
    """
    if label in (None, ""):
        return -1
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    if isinstance(label, str) and PLAIN_NUMBER.fullmatch(label):
        label = int(label)
    if isinstance(label, int) and -1 <= label < len(class_names):
        return label
    known = ", ".join(class_names[:CLASSES_IN_ERRORS]) or "none, it has no classes"
    known += ", ..." if len(class_names) > CLASSES_IN_ERRORS else ""
    raise ValueError(f"is not a class of this model{did_you_mean(label, class_names)}: it knows {known}")


def default_labels(seeds: list[int], classes: int | Sequence[int]) -> list[int]:
    """Cycle through the classes by seed, so that consecutive seeds are balanced; -1 if there are none.

    Args:
        seeds: the seeds.
        classes: the number of classes, or the numbers of the classes to sample.
    """
    numbers = range(classes) if isinstance(classes, int) else classes
    return [numbers[seed % len(numbers)] if numbers else -1 for seed in seeds]


def generate_padded(
    model: SamplingModel,
    seeds: list[int],
    labels: list[int],
    batch: int,
    sampling: Sampling,
    known: KnownPixels | None = None,
    check: Callable[[], None] | None = None,
    condition: Tensor | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """`generate` in batches of exactly `batch` images; the last one is padded.

    The same batch size gives the same bytes for a seed, for any number of seeds.

    Args:
        model: the model.
        seeds: one per image.
        labels: class number of each image, -1 for no class.
        batch: images per batch.
        sampling: the options.
        known: the pixels that all images share; the others are sampled to fit.
        check: called before each evaluation of the network; ends the sampling by an exception.
        condition: (N, K, H, W), a condition image per seed, with values as in the dataset, for models that need one.
        text: (N, tokens, width), a text embedding per seed, for models with texts. Default: no text.

    Returns:
        (N, C, H, W) uint8, one image per seed.
    """
    if not seeds:
        channels = IMAGE_CHANNELS if model.autoencoder else model.denoiser.channels
        return torch.empty(0, channels, *image_size(model.card, sampling), dtype=torch.uint8)
    images = []
    for start in range(0, len(seeds), batch):
        batch_seeds, batch_labels = seeds[start : start + batch], labels[start : start + batch]
        count = len(batch_seeds)
        batch_seeds, batch_labels = (values + values[-1:] * (batch - count) for values in (batch_seeds, batch_labels))
        shown = None if condition is None else condition[start : start + batch]
        if shown is not None and count < batch:
            shown = torch.cat([shown, shown[-1:].expand(batch - count, -1, -1, -1)])
        texts = None if text is None else text[start : start + batch]
        if texts is not None and count < batch:
            texts = torch.cat([texts, texts[-1:].expand(batch - count, -1, -1)])
        images.append(generate(model, batch_seeds, batch_labels, sampling, known, check, shown, texts)[:count])
    return torch.cat(images)
