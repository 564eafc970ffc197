"""One optimisation step of Patch Diffusion.

A step is a pure function of the settings, the data, the number of the step and the crops consumed before it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchloom.models.augment import augment, augmentation_labels
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import WeightAverage
from patchloom.models.gradients import Gradients, StartSum
from patchloom.models.layers import Dropout, DropoutMasks
from patchloom.models.loss import SIGMA_BINS, denoising_loss, losses_by_sigma
from patchloom.models.noise import training_sigmas
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import PatchSchedule, crop, offsets
from patchloom.models.random_draws import CropBatch, RandomDraws, derive_seed
from patchloom.models.step_plan import CropGroup, StepPlan, StepSettings
from patchloom.models.unet import UNet

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS_PER_SIZE = 4  # compiled per patch size before torch falls back to eager; stratified steps need several


def set_rounding(precision: str) -> None:
    """Forbid TF32 on GPUs for fp32, and allow it for every other precision."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def compile_network(denoiser: Denoiser, schedule: PatchSchedule) -> None:
    """Compile the network: one graph per patch size, built at its first step. Earlier copies stay uncompiled."""
    torch._dynamo.config.recompile_limit = GRAPHS_PER_SIZE * len(schedule.sizes)
    denoiser.model.compile(dynamic=False)


@dataclass(frozen=True)
class StoredRows:
    """A batch of rows as the dataset stores them.

    Args:
        image: (B, C, R, R) pixels, or means of latents.
        label: (B,) class numbers, -1 for no class.
        std: (B, C, R, R) standard deviations of latents; None for pixels and deterministic autoencoders.
        condition: (B, K, R, R) float32, condition images as values of the network; None for networks without.
        text: (B, tokens, width) text embeddings; None for networks without.
    """

    image: Tensor
    label: Tensor
    std: Tensor | None = None
    condition: Tensor | None = None
    text: Tensor | None = None


def network_labels(denoiser: Denoiser, rows: StoredRows, is_kept: Tensor | None = None) -> Tensor | None:
    """What the network gets as labels.

    Args:
        denoiser: the network.
        rows: the rows.
        is_kept: (B,) bool, which labels are not dropped. Default: all.

    Returns:
        Text embeddings (B, tokens, width), or one-hot (B, K), with zeros where they are dropped; None without classes
        and texts.
    """
    if rows.text is not None:
        text = rows.text.float()
        return text if is_kept is None else torch.where(is_kept[:, None, None], text, 0)
    if not denoiser.classes:
        return None
    return one_hot(rows.label if is_kept is None else torch.where(is_kept, rows.label, -1), denoiser.classes)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B,) class numbers -> (B, K) float32; -1 (no class) gives the zero vector."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def crop_losses(
    denoiser: Denoiser,
    rows: StoredRows,
    draws: RandomDraws,
    size: int,
    settings: StepSettings,
    normalisation: Normalisation,
) -> tuple[Tensor, Tensor]:
    """Crop, add noise, denoise and compare (Patch Diffusion, Eq. 4).

    Args:
        denoiser: the network.
        rows: the full images or latents, one per crop.
        draws: the random draws of the crops.
        size: side of the crops in pixels.
        settings: the settings of the run.
        normalisation: the map from stored values to the network's.

    Returns:
        The loss and the noise level of each crop, both (B,).
    """
    images = rows.image if rows.std is None else rows.image + rows.std * draws.posterior
    channels = images.shape[1]
    if rows.condition is not None:  # further channels, which move with those of the image
        images = torch.cat([images, rows.condition], dim=1)
    if settings.mirror:  # the coordinates are not mirrored
        images = torch.where(draws.mirrored[:, None, None, None] < 0.5, images, images.flip(3))
    grid = augmentation = None
    if settings.augmentation:  # the coordinates move with the image
        images, grid = augment(images, draws.augmentation)
        augmentation = augmentation_labels(draws.augmentation)
    patches, coordinates = crop(images, offsets(draws.corner, images.shape[-1], size), size, grid)
    condition = None
    if rows.condition is not None:
        patches, condition = patches[:, :channels], patches[:, channels:]
        kept = draws.label_kept >= settings.condition_dropout  # with equal rates, label and condition go together
        condition = torch.where(kept[:, None, None, None], condition, 0)
    labels = network_labels(denoiser, rows, draws.label_kept >= settings.label_dropout)
    network = getattr(denoiser, "model", None)
    if isinstance(network, ControlNetwork):
        sigma = network.training_levels(draws.sigma)
    else:
        sigma = training_sigmas(draws.sigma, settings.noise_mean, settings.noise_std)
    half = HALF_PRECISIONS.get(settings.precision)
    # only here: the augmentation is matrix products, and half precision would move its coordinates by a pixel
    with torch.autocast(images.device.type, half) if half else nullcontext():
        losses = denoising_loss(
            denoiser, normalisation.normalise(patches), draws.noise, sigma,
            coordinates if denoiser.coordinates != "none" else None, labels, settings.reduction, augmentation,
            condition,
        )  # fmt: skip
    return losses, sigma


@dataclass
class TrainingState:
    """The state of a run: what a checkpoint holds, and the gradients.

    Args:
        denoiser: the network.
        emas: its averages; the first one becomes the model.
        optimizer: Adam.
        gradients: the flat gradients.
        scaler: scales the loss in fp16; disabled for other precisions.
        crops_by_size: crops consumed of each patch size of the schedule, full images first.
        step: optimisation steps taken.
    """

    denoiser: Denoiser
    emas: list[WeightAverage]
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    scaler: torch.amp.GradScaler
    crops_by_size: list[int]
    step: int = 0

    @property
    def images_seen(self) -> int:
        """Counted images: crops of all sizes, as the paper counts them."""
        return sum(self.crops_by_size)


def new_state(
    denoiser: Denoiser, emas: list[WeightAverage], settings: StepSettings, betas: tuple[float, float], eps: float
) -> TrainingState:
    """The state before the first step, with EDM's Adam."""
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=settings.lr, betas=betas, eps=eps, fused=True)
    sizes = len(settings.schedule.sizes)
    gradients = Gradients(denoiser, (sizes, len(SIGMA_BINS)))
    scaler = torch.amp.GradScaler(gradients.flat.device.type, enabled=settings.precision == "fp16")
    return TrainingState(denoiser, emas, optimizer, gradients, scaler, [0] * sizes)


@contextmanager
def seeded_dropout(network: nn.Module, masks: DropoutMasks, seed: int, device: torch.device) -> Iterator[None]:
    """Set the dropout masks of a network inside a `with` block.

    Backbones from other packages draw from torch's global generator. It is seeded here, and restored at the end.

    Args:
        network: the network, whose `Dropout` layers get the masks.
        masks: masks that do not depend on how workers share the batch.
        seed: seed of torch's global generator.
        device: device of the masks.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Dropout) and layer.rate]
    for number, layer in enumerate(layers):
        layer.masks, layer.number = masks, number
    is_unet = any(isinstance(module, UNet) for module in network.modules())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not is_unet):
            if not is_unet:
                torch.manual_seed(seed)
            yield
    finally:
        for layer in layers:
            layer.masks = None


def learning_rate(settings: StepSettings, images_seen: int) -> float:
    """The learning rate: a linear ramp over the first images, then constant (EDM)."""
    return settings.lr * min(1.0, images_seen / max(settings.lr_rampup_images, 1))


def training_step(
    state: TrainingState,
    settings: StepSettings,
    plan: StepPlan,
    work: Iterable[tuple[CropGroup, StoredRows]],
    normalisation: Normalisation,
    start_sum: StartSum | None,
) -> None:
    """Take one step on this worker's share of the batch, and update `state`.

    A crop has the weight 1 / (batch size x batch multiplier of its size), so that every draw of sizes minimises
    the same loss (Patch Diffusion, Eq. 4 and 5).

    Args:
        state: the state of the run.
        settings: the settings of the run.
        plan: the plan of this step.
        work: the groups of `plan.share(...)`, each with the rows of its crops.
        normalisation: the map from stored values to the network's.
        start_sum: starts to sum a part of the gradients over all workers; None for one worker.
    """
    state.gradients.flat.zero_()
    groups = list(work)
    for group, rows in groups[:-1]:
        _add_gradients(state, settings, plan, group, rows, normalisation)
    with state.gradients.summed(start_sum):
        for group, rows in groups[-1:]:  # a worker may have no group
            _add_gradients(state, settings, plan, group, rows, normalisation)
    state.scaler.unscale_(state.optimizer)
    state.gradients.clean()

    for size, blocks in zip(plan.sizes, plan.blocks, strict=True):
        state.crops_by_size[settings.schedule.sizes.index(size)] += blocks * plan.block_size
    for param_group in state.optimizer.param_groups:
        param_group["lr"] = learning_rate(settings, state.images_seen)
    state.scaler.step(state.optimizer)  # skipped in fp16 if the gradients overflowed
    state.scaler.update()
    for ema in state.emas:
        ema.update(state.denoiser, state.images_seen, plan.crops)
    state.step += 1


def _add_gradients(
    state: TrainingState,
    settings: StepSettings,
    plan: StepPlan,
    group: CropGroup,
    rows: StoredRows,
    normalisation: Normalisation,
) -> None:
    """Add the gradients of a group of crops, and record their losses by patch size and noise level."""
    size, device = group.size, rows.image.device
    batch = CropBatch(
        plan.step, group.blocks, plan.block_size, rows.image.shape[1], rows.image.shape[-1], size.pixels,
        rows.std is not None, device, settings.augmentation,
    )  # fmt: skip
    draws = settings.random.crops(batch)
    masks = settings.random.masks(plan.step, group.blocks, plan.block_size, device)
    dropout_seed = derive_seed(settings.seed, plan.step, group.blocks.start, "dropout")
    with seeded_dropout(state.denoiser, masks, dropout_seed, device):
        losses, sigma = crop_losses(state.denoiser, rows, draws, size.pixels, settings, normalisation)
    loss = losses.sum() / (settings.batch_size * size.batch_multiplier)
    # before the backward pass, which starts to sum them
    state.gradients.loss_and_crops[settings.schedule.sizes.index(size)] += losses_by_sigma(losses, sigma)
    state.scaler.scale(loss).backward()
