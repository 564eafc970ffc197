"""Plans: the patch sizes of a step, and how its crops are split into groups for the workers."""

from dataclasses import dataclass

from patchloom.models.old_draws import OldDraws
from patchloom.models.patches import PatchSchedule, PatchSize
from patchloom.models.random_draws import CURRENT_DRAWS, Draws, DrawSource


@dataclass(frozen=True)
class StepSettings:
    """The settings of a run. A step depends only on these and the data.

    Args:
        seed: seed of all random draws.
        schedule: patch sizes and their probabilities.
        updates: optimisation steps of the run.
        batch_size: full-size images per step, over all workers.
        block_size: samples per block; workers own whole blocks.
        lr: learning rate after the ramp.
        lr_rampup_images: counted images of the ramp.
        noise_mean: mean of ln(sigma).
        noise_std: standard deviation of ln(sigma).
        reduction: how a crop's loss is reduced over its pixels: "mean" or "sum".
        label_dropout: share of labels that are dropped.
        condition_dropout: share of crops whose condition is dropped: where a label is dropped at this rate.
        mirror: whether images are mirrored at random.
        augmentation: probability of EDM's augmentations; 0 for none.
        draw: how the patch sizes of a step are drawn: "shared", "stratified" or "independent".
        emulated_ranks: groups that draw a size each, for "independent".
        precision: "fp32", "tf32", "bf16" or "fp16".
        draws_version: version of the random draws and the order of rows; runs keep the one that they began with.
    """

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
    condition_dropout: float = 0.0
    mirror: bool = False
    augmentation: float = 0.0
    draw: str = "shared"
    emulated_ranks: int = 1
    precision: str = "fp32"
    draws_version: int = CURRENT_DRAWS

    @property
    def random(self) -> DrawSource:
        """The random numbers of the run."""
        return draw_source(self.seed, self.draws_version)


def draw_source(seed: int, version: int = CURRENT_DRAWS) -> DrawSource:
    """The random numbers of a run of this seed, in the version of its `run.json`."""
    return Draws(seed) if version >= CURRENT_DRAWS else OldDraws(seed)


@dataclass(frozen=True)
class CropGroup:
    """Crops of one size that are trained on together; they fill whole blocks.

    Args:
        size: the patch size.
        blocks: numbers of the blocks in the step.
        crops: numbers of the crops in the run.
    """

    size: PatchSize
    blocks: range
    crops: range


@dataclass(frozen=True)
class StepPlan:
    """The patch sizes of one step, and the number of blocks of each.

    Args:
        step: number of the step.
        first_crop: number of its first crop in the run.
        block_size: samples per block.
        sizes: patch size of each group.
        blocks: number of blocks of each group.
        whole_groups: False: the workers split every group, so that all have the same work. True: each group is an
            emulated rank and belongs to one worker, and the step waits for the slowest worker.
    """

    step: int
    first_crop: int
    block_size: int
    sizes: tuple[PatchSize, ...]
    blocks: tuple[int, ...]
    whole_groups: bool = False

    @property
    def crops(self) -> int:
        """Number of crops, over all workers."""
        return sum(self.blocks) * self.block_size

    def share(self, worker: int = 0, workers: int = 1, microbatch: int | None = None) -> list[CropGroup]:
        """The groups of one worker. The shares of all workers cover the batch exactly once.

        Args:
            worker: number of the worker.
            workers: number of workers.
            microbatch: largest number of crops per group, to limit memory; at least one block. Default: no limit.
        """
        groups, first = [], 0
        for number, (size, count) in enumerate(zip(self.sizes, self.blocks, strict=True)):
            if self.whole_groups:
                begin, end = (0, count) if number * workers // len(self.sizes) == worker else (0, 0)
            else:
                begin, end = count * worker // workers, count * (worker + 1) // workers
            most = max(1, microbatch // self.block_size) if microbatch else max(1, end - begin)
            for start in range(begin, end, most):
                groups.append(self._group(size, range(first + start, first + min(start + most, end))))
            first += count
        return groups

    def _group(self, size: PatchSize, blocks: range) -> CropGroup:
        crops = range(self.first_crop + blocks.start * self.block_size, self.first_crop + blocks.stop * self.block_size)
        return CropGroup(size, blocks, crops)


def plan_step(settings: StepSettings, step: int, crops_consumed: int) -> StepPlan:
    """Choose the patch sizes of a step (Patch Diffusion, Eq. 5). Smaller patches come in larger batches.

    "shared" draws one size, "independent" one per emulated rank. "stratified" takes every size in proportion to
    its probability, rounded to whole blocks such that the proportions hold over any number of steps.

    Args:
        settings: the settings of the run.
        step: number of the step.
        crops_consumed: crops of all earlier steps.
    """
    schedule, block_size = settings.schedule, settings.block_size
    if settings.draw == "stratified":
        sizes = schedule.sizes
        due = [settings.batch_size * size.probability * size.batch_multiplier / block_size for size in sizes]
        blocks = [round((step + 1) * share) - round(step * share) for share in due]
    else:
        ranks = settings.emulated_ranks if settings.draw == "independent" else 1
        uniforms = [settings.random.size_uniform(step, rank) for rank in range(ranks)]
        sizes = tuple(schedule.size_at(step, settings.updates, uniform) for uniform in uniforms)
        blocks = [settings.batch_size * size.batch_multiplier // (ranks * block_size) for size in sizes]
    whole_groups = settings.draw == "independent"
    return StepPlan(step, crops_consumed, block_size, sizes, tuple(blocks), whole_groups)
