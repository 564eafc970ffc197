"""One optimisation step: the method of Patch Diffusion on one screen.

A step is a pure function of the method, the data, the step's number and the crops consumed before it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.models.augment import augment, augmentation_labels
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import WeightAverage
from patchloom.models.layers import Dropout
from patchloom.models.loss import SIGMA_BINS, denoising_loss, losses_by_sigma
from patchloom.models.noise import training_sigmas
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import PatchSchedule, crop, offsets
from patchloom.models.random_draws import RandomDraws, concatenate_draws, derive_seed, draws_of_block
from patchloom.models.step_plan import CropGroup, StepPlan, StepSettings
from patchloom.models.unet import UNet

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS_A_SIZE = 4  # compiled for a patch size before torch gives up; one but for batches that vary (stratified)


def set_rounding(precision: str) -> None:
    """fp32 means fp32, also where a GPU would rather round to TF32; with any other precision it may."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def compile_network(denoiser: Denoiser, schedule: PatchSchedule) -> None:
    """One graph a patch size, made when a size is first trained on; copies that were made before stay as they are."""
    torch._dynamo.config.recompile_limit = GRAPHS_A_SIZE * len(schedule.sizes)
    denoiser.model.compile(dynamic=False)


@dataclass(frozen=True)
class StoredRows:
    """A batch of stored rows: `image` (B, C, R, R), or moments `image` and `std`; `label` (B,), -1 for none."""

    image: Tensor
    label: Tensor
    std: Tensor | None = None


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B,) class numbers -> (B, K) float32; -1, no class, is the zero vector."""
    return F.one_hot(labels.long() + 1, classes + 1)[:, 1:].float()


def crop_losses(
    denoiser: Denoiser, rows: StoredRows, luck: RandomDraws, size: int, method: StepSettings, space: Normalisation
) -> tuple[Tensor, Tensor]:
    """The loss of each crop and its noise level, both (B,): crop, add noise, denoise, compare (Eq. 4)."""
    images = rows.image if rows.std is None else rows.image + rows.std * luck.posterior
    if method.mirror:  # the image is mirrored and the coordinates are not
        images = torch.where(luck.mirrored[:, None, None, None] < 0.5, images, images.flip(3))
    grid = augmentation = None
    if method.augmentation:  # here the coordinates move with the image
        images, grid = augment(images, luck.augmentation)
        augmentation = augmentation_labels(luck.augmentation)
    patches, where = crop(images, offsets(luck.corner, images.shape[-1], size), size, grid)
    labels = None
    if denoiser.classes:
        kept = luck.label_kept >= method.label_dropout
        labels = one_hot(torch.where(kept, rows.label, -1), denoiser.classes)
    sigma = training_sigmas(luck.sigma, method.noise_mean, method.noise_std)
    losses = denoising_loss(
        denoiser, space.normalise(patches), luck.noise, sigma,
        where if denoiser.coordinates != "none" else None, labels, method.reduction, augmentation,
    )  # fmt: skip
    return losses, sigma


class Gradients:
    """All gradients in one flat tensor, followed by sums of losses and counts of crops.

    One tensor means one all-reduce in a layout that never changes, so that a restarted run adds up in
    the same order as one that was never stopped.
    """

    def __init__(self, module: nn.Module, record: tuple[int, ...]) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.length = sum(p.numel() for p in parameters)
        self._record_shape = (*record, 2)
        self.flat = torch.zeros(self.length + math.prod(self._record_shape), device=parameters[0].device)
        start = 0
        for parameter in parameters:
            flat = self.flat[start : start + parameter.numel()]
            parameter.grad = flat.as_strided(parameter.shape, parameter.stride())  # in the parameter's own layout
            start += parameter.numel()

    @property
    def loss_and_crops(self) -> Tensor:
        """(*record, 2): the sum of the losses and the number of crops; in training (patch sizes, sigma bins, 2)."""
        return self.flat[self.length :].view(self._record_shape)

    def clean(self) -> None:
        """NaN becomes 0 and infinity 1e5, as EDM does, so that one bad crop does not end a run."""
        torch.nan_to_num(self.flat[: self.length], nan=0, posinf=1e5, neginf=-1e5, out=self.flat[: self.length])


@dataclass
class TrainingState:
    """What a checkpoint holds: weights, averages, the optimiser, and how far the run is."""

    denoiser: Denoiser
    emas: list[WeightAverage]
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    scaler: torch.amp.GradScaler  # idle but in fp16
    crops_by_size: list[int]  # crops consumed of each of the schedule's sizes, full images first
    step: int = 0

    @property
    def images_seen(self) -> int:
        """Crops consumed, counted as the paper does."""
        return sum(self.crops_by_size)


def new_state(
    denoiser: Denoiser, emas: list[WeightAverage], method: StepSettings, betas: tuple[float, float], eps: float
) -> TrainingState:
    """A run before its first step: EDM's Adam and one flat tensor of gradients."""
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=method.lr, betas=betas, eps=eps, fused=True)
    sizes = len(method.schedule.sizes)
    gradients = Gradients(denoiser, (sizes, len(SIGMA_BINS)))
    scaler = torch.amp.GradScaler(gradients.flat.device.type, enabled=method.precision == "fp16")
    return TrainingState(denoiser, emas, optimizer, gradients, scaler, [0] * sizes)


@contextmanager
def seeded_dropout(network: nn.Module, seed: int, step: int, blocks: range, device: torch.device) -> Iterator[None]:
    """Dropout layers draw from one generator a block while this holds: masks do not depend on who owns a block.

    Layers of a backbone of one's own know torch's global generator alone; it is seeded, and given back after.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Dropout) and layer.rate]
    seeds = [derive_seed(seed, step, block, "dropout") for block in blocks] if layers else []
    generators = [torch.Generator(device).manual_seed(number) for number in seeds]
    numbers = torch.tensor([number & 0xFFFFFFFF for number in seeds], device=device) if layers else None
    for number, layer in enumerate(layers):
        layer.generators, layer.seeds, layer.number = generators, numbers, number
    is_ours = any(isinstance(module, UNet) for module in network.modules())
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not is_ours):
        if not is_ours:
            torch.manual_seed(derive_seed(seed, step, blocks.start, "dropout"))
        yield
    for layer in layers:
        layer.generators, layer.seeds = [], None


def learning_rate(method: StepSettings, images_seen: int) -> float:
    """A linear ramp over the first images, then constant (EDM)."""
    return method.lr * min(1.0, images_seen / max(method.lr_rampup_images, 1))


def training_step(
    state: TrainingState,
    method: StepSettings,
    plan: StepPlan,
    work: Iterable[tuple[CropGroup, StoredRows]],
    space: Normalisation,
    reduce: Callable[[Tensor], object],
) -> None:
    """Take one step on this worker's share of the batch and move `state` on.

    work: the groups of `plan.share(...)`, each with the rows of its crops. reduce: sums a tensor over all
    workers in place; with one worker it does nothing. A crop weighs 1 / (batch size x its multiplier), so
    that every draw of sizes minimises the same loss (Patch Diffusion, Eq. 4 and 5).
    """
    state.gradients.flat.zero_()
    for group, rows in work:
        _add_gradients(state, method, plan, group, rows, space)
    reduce(state.gradients.flat)
    state.scaler.unscale_(state.optimizer)
    state.gradients.clean()

    for size, blocks in zip(plan.sizes, plan.blocks, strict=True):
        state.crops_by_size[method.schedule.sizes.index(size)] += blocks * plan.block_size
    for settings in state.optimizer.param_groups:
        settings["lr"] = learning_rate(method, state.images_seen)
    state.scaler.step(state.optimizer)  # in fp16 not where the gradients overflowed
    state.scaler.update()
    for ema in state.emas:
        ema.update(state.denoiser, state.images_seen, plan.crops)
    state.step += 1


def _add_gradients(
    state: TrainingState, method: StepSettings, plan: StepPlan, group: CropGroup, rows: StoredRows, space: Normalisation
) -> None:
    """One microbatch: the gradients of a group's crops, and its losses by patch size and noise level."""
    size, device = group.size, rows.image.device
    channels, resolution = rows.image.shape[1], rows.image.shape[-1]
    luck = concatenate_draws([
        draws_of_block(
            method.seed, plan.step, block, plan.block_size, channels, resolution, size.pixels,
            rows.std is not None, device, method.augmentation,
        )
        for block in group.blocks
    ])  # fmt: skip
    half = HALF_PRECISIONS.get(method.precision)
    with (
        seeded_dropout(state.denoiser, method.seed, plan.step, group.blocks, device),
        torch.autocast(device.type, half, enabled=half is not None),
    ):
        losses, sigma = crop_losses(state.denoiser, rows, luck, size.pixels, method, space)
    loss = losses.sum() / (method.batch_size * size.batch_multiplier)
    state.scaler.scale(loss).backward()
    state.gradients.loss_and_crops[method.schedule.sizes.index(size)] += losses_by_sigma(losses, sigma)
