"""One optimisation step: the method of Patch Diffusion on one screen.

A step is a pure function of the method, the data, the step's number and the crops consumed before it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.models.codec import Space
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.loss import denoising_loss
from patchloom.models.luck import Luck, derive_seed, draw_block, join, size_luck
from patchloom.models.noise import training_sigmas
from patchloom.models.patches import PatchSchedule, PatchSize, crop, offsets
from patchloom.models.unet import Dropout


@dataclass(frozen=True)
class Method:
    """What a run trains, in plain values: with the data, all that a step depends on."""

    seed: int
    schedule: PatchSchedule
    updates: int
    batch_size: int
    block_size: int
    lr: float
    lr_rampup_images: int
    noise_mean: float = -1.2
    noise_std: float = 1.2
    reduction: str = "mean"
    label_dropout: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class Rows:
    """A batch of stored rows: `image` (B, C, R, R), or moments `image` and `std`; `label` (B,), -1 for none."""

    image: Tensor
    label: Tensor
    std: Tensor | None = None


@dataclass(frozen=True)
class StepPlan:
    """What one step trains on: one patch size for all workers, and which of the run's crops."""

    step: int
    size: PatchSize
    first_crop: int
    crops: int
    block_size: int

    def blocks_of(self, worker: int, workers: int) -> range:
        """The whole blocks that a worker owns; together they cover the step's batch once."""
        blocks = self.crops // self.block_size
        return range(blocks * worker // workers, blocks * (worker + 1) // workers)

    def crop_numbers(self, blocks: range) -> range:
        """Which crops of the run these blocks are."""
        first = self.first_crop
        return range(first + blocks.start * self.block_size, first + blocks.stop * self.block_size)


def plan_step(method: Method, step: int, crops_consumed: int) -> StepPlan:
    """Draw the step's patch size (Eq. 5); smaller patches come in larger batches."""
    size = method.schedule.size_at(step, method.updates, size_luck(method.seed, step))
    return StepPlan(step, size, crops_consumed, method.batch_size * size.batch_multiplier, method.block_size)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B,) class numbers -> (B, K) float32; -1, no class, is the zero vector."""
    return F.one_hot(labels.long() + 1, classes + 1)[:, 1:].float()


def crop_losses(denoiser: Denoiser, rows: Rows, luck: Luck, size: int, method: Method, space: Space) -> Tensor:
    """The loss of each crop, (B,): crop, add noise, denoise, compare (Patch Diffusion, Eq. 4)."""
    images = rows.image if rows.std is None else rows.image + rows.std * luck.posterior
    if method.mirror:  # the image is mirrored and the coordinates are not
        images = torch.where(luck.mirrored[:, None, None, None] < 0.5, images, images.flip(3))
    patches, where = crop(images, offsets(luck.corner, images.shape[-1], size), size)
    labels = None
    if denoiser.classes:
        kept = luck.label_kept >= method.label_dropout
        labels = one_hot(torch.where(kept, rows.label, -1), denoiser.classes)
    sigma = training_sigmas(luck.sigma, method.noise_mean, method.noise_std)
    return denoising_loss(denoiser, space.normalise(patches), luck.noise, sigma, where, labels, method.reduction)


class Gradients:
    """All gradients in one flat tensor, followed by the loss and crop count of every patch size.

    One tensor means one all-reduce in a layout that never changes, so that a restarted run adds up in
    the same order as one that was never stopped.
    """

    def __init__(self, module: nn.Module, sizes: int) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.length = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(self.length + 2 * sizes, device=parameters[0].device)
        start = 0
        for parameter in parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    @property
    def loss_and_crops(self) -> Tensor:
        """(sizes, 2): the sum of the losses and the number of crops."""
        return self.flat[self.length :].view(-1, 2)

    def clean(self) -> None:
        """NaN becomes 0 and infinity 1e5, as EDM does, so that one bad crop does not end a run."""
        torch.nan_to_num(self.flat[: self.length], nan=0, posinf=1e5, neginf=-1e5, out=self.flat[: self.length])


@dataclass
class TrainingState:
    """What a checkpoint holds: weights, averages, the optimiser, and how far the run is."""

    denoiser: Denoiser
    emas: list[HalfLifeEMA]
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    crops_by_size: list[int]  # crops consumed of each of the schedule's sizes, full images first
    step: int = 0

    @property
    def images_seen(self) -> int:
        """Crops consumed, counted as the paper does."""
        return sum(self.crops_by_size)


def new_state(
    denoiser: Denoiser, emas: list[HalfLifeEMA], method: Method, betas: tuple[float, float], eps: float
) -> TrainingState:
    """A run before its first step: EDM's Adam and one flat tensor of gradients."""
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=method.lr, betas=betas, eps=eps, fused=True)
    sizes = len(method.schedule.sizes)
    return TrainingState(denoiser, emas, optimizer, Gradients(denoiser, sizes), [0] * sizes)


@contextmanager
def dropout_luck(network: nn.Module, seed: int, step: int, blocks: range, device: torch.device) -> Iterator[None]:
    """Dropout layers draw from one generator a block while this holds: masks do not depend on who owns a block."""
    layers = [layer for layer in network.modules() if isinstance(layer, Dropout) and layer.rate]
    seeds = [derive_seed(seed, step, block, "dropout") for block in blocks] if layers else []
    generators = [torch.Generator(device).manual_seed(number) for number in seeds]
    for layer in layers:
        layer.generators = generators
    yield
    for layer in layers:
        layer.generators = []


def learning_rate(method: Method, images_seen: int) -> float:
    """A linear ramp over the first images, then constant (EDM)."""
    return method.lr * min(1.0, images_seen / max(method.lr_rampup_images, 1))


def training_step(
    state: TrainingState,
    method: Method,
    plan: StepPlan,
    rows: Rows | None,
    space: Space,
    reduce: Callable[[Tensor], object],
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Take one step on this worker's share of the batch and move `state` on.

    rows: those of `plan.crop_numbers(plan.blocks_of(worker, workers))`, or None where the share is empty.
    reduce: sums a tensor over all workers in place; with one worker it does nothing.
    """
    state.gradients.flat.zero_()
    blocks = plan.blocks_of(worker, workers)
    size, number = plan.size.pixels, method.schedule.sizes.index(plan.size)
    if rows is not None:
        channels, resolution = rows.image.shape[1], rows.image.shape[-1]
        luck = join([
            draw_block(
                method.seed, plan.step, block, plan.block_size, channels, resolution, size,
                rows.std is not None, rows.image.device,
            )
            for block in blocks
        ])  # fmt: skip
        with dropout_luck(state.denoiser, method.seed, plan.step, blocks, rows.image.device):
            losses = crop_losses(state.denoiser, rows, luck, size, method, space)
        (losses.sum() / plan.crops).backward()
        record = state.gradients.loss_and_crops[number]
        record += torch.stack([losses.detach().sum(), losses.new_tensor(len(losses))])
    reduce(state.gradients.flat)
    state.gradients.clean()

    state.crops_by_size[number] += plan.crops
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(method, state.images_seen)
    state.optimizer.step()
    for ema in state.emas:
        ema.update(state.denoiser, state.images_seen, plan.crops)
    state.step += 1
