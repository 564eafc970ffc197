"""Plans: which crops of which sizes a step trains on, in which groups, and who owns them."""

from dataclasses import dataclass

from patchloom.models.patches import PatchSchedule, PatchSize
from patchloom.models.random_draws import size_uniform


@dataclass(frozen=True)
class StepSettings:
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
    augmentation: float = 0.0
    draw: str = "shared"
    emulated_ranks: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class CropGroup:
    """Crops of one size in a step: whole blocks of them, trained on together."""

    size: PatchSize
    blocks: range  # their numbers in the step
    crops: range  # their numbers in the run


@dataclass(frozen=True)
class StepPlan:
    """What one step trains on: how many blocks of which patch sizes, one after the other.

    Workers split every group, so that all have the same work; with `whole_groups` each group is an emulated
    rank and belongs to one worker, and a step waits for the slowest.
    """

    step: int
    first_crop: int
    block_size: int
    sizes: tuple[PatchSize, ...]
    blocks: tuple[int, ...]  # of each group
    whole_groups: bool = False

    @property
    def crops(self) -> int:
        """Crops of all workers."""
        return sum(self.blocks) * self.block_size

    def share(self, worker: int = 0, workers: int = 1, microbatch: int | None = None) -> list[CropGroup]:
        """What a worker owns; all shares together cover the step's batch once.

        microbatch: at most so many crops a group (but never less than a block), for what memory holds.
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


def plan_step(method: StepSettings, step: int, crops_consumed: int) -> StepPlan:
    """The step's patch sizes (Eq. 5); smaller patches come in larger batches.

    `shared` draws one size, `independent` one for each emulated rank; `stratified` takes every size in its
    share, rounded to whole blocks so that the shares hold over any number of steps.
    """
    schedule, block_size = method.schedule, method.block_size
    if method.draw == "stratified":
        sizes = schedule.sizes
        due = [method.batch_size * size.probability * size.batch_multiplier / block_size for size in sizes]
        blocks = [round((step + 1) * share) - round(step * share) for share in due]
    else:
        ranks = method.emulated_ranks if method.draw == "independent" else 1
        lucks = [size_uniform(method.seed, step, rank) for rank in range(ranks)]
        sizes = tuple(schedule.size_at(step, method.updates, luck) for luck in lucks)
        blocks = [method.batch_size * size.batch_multiplier // (ranks * block_size) for size in sizes]
    whole_groups = method.draw == "independent"
    return StepPlan(step, crops_consumed, block_size, sizes, tuple(blocks), whole_groups)
