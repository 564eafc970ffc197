"""Cost: how much patches save, estimated from the seconds or FLOPs of a crop of each size."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from patchloom.models.flops import device_time
from patchloom.models.normalisation import identity_normalisation
from patchloom.models.patches import PatchSchedule, PatchSize
from patchloom.models.step import StoredRows, TrainingState, training_step
from patchloom.models.step_plan import CropGroup, StepPlan, StepSettings, plan_step

PLANNED_STEPS = 4000
LOOKED_AT_STEPS = 64  # for the largest group


@dataclass(frozen=True)
class Gain:
    """The speed-up over training on full-size images only.

    Args:
        per_image: ratio of counted images (crops) per second.
        per_update: ratio of updates per second.
    """

    per_image: float
    per_update: float


def step_cost(settings: StepSettings, cost_of_crop: Mapping[int, float], workers: int) -> tuple[float, float]:
    """The mean cost of a step, in which all workers wait for the slowest, and its mean number of crops.

    The result is exact for the draw "shared". For other draws it is the mean over many planned steps.

    Args:
        settings: the settings of the run.
        cost_of_crop: cost of a crop in any unit, by patch size in pixels.
        workers: number of workers.

    Returns:
        The cost in the same unit, and the number of crops.
    """
    if settings.draw == "shared":
        plans = [(size.probability, plan_step(_only(settings, size), 0, 0)) for size in settings.schedule.sizes]
    else:
        plans = [(1 / PLANNED_STEPS, plan_step(settings, step, 0)) for step in range(PLANNED_STEPS)]
    cost = sum(share * _slowest(plan, cost_of_crop, workers) for share, plan in plans)
    return cost, sum(share * plan.crops for share, plan in plans)


def largest_group(settings: StepSettings, workers: int = 1, microbatch: int | None = None) -> CropGroup:
    """The crops with the most pixels that a worker trains on at the same time.

    Args:
        settings: the settings of the run.
        workers: number of workers.
        microbatch: largest number of crops per group. Default: no limit.
    """
    if settings.draw == "shared":
        plans = [plan_step(_only(settings, size), 0, 0) for size in settings.schedule.sizes]
    else:
        plans = [plan_step(settings, step, 0) for step in range(LOOKED_AT_STEPS)]
    groups = [group for plan in plans for worker in range(workers) for group in plan.share(worker, workers, microbatch)]
    return max(groups, key=lambda group: (len(group.crops) * group.size.pixels**2, len(group.crops)))


def _only(settings: StepSettings, size: PatchSize) -> StepSettings:
    """The same settings with a single size in every step."""
    return replace(settings, schedule=PatchSchedule((replace(size, probability=1.0),)), draw="shared", emulated_ranks=1)


def _slowest(plan: StepPlan, cost_of_crop: Mapping[int, float], workers: int) -> float:
    shares = (plan.share(worker, workers) for worker in range(workers))
    return max(sum(len(group.crops) * cost_of_crop[group.size.pixels] for group in share) for share in shares)


def estimated_gain(settings: StepSettings, cost_of_crop: Mapping[int, float], workers: int) -> Gain:
    """Estimate the speed-up of a run over p = 1 (compare Patch Diffusion, Table 1); arguments as for `step_cost`."""
    cost, crops = step_cost(settings, cost_of_crop, workers)
    full_cost, full_crops = step_cost(_only(settings, settings.schedule.sizes[0]), cost_of_crop, workers)
    return Gain(per_image=(crops / cost) / (full_crops / full_cost), per_update=full_cost / cost)


def measured_seconds_of_crop(
    state: TrainingState, settings: StepSettings, workers: int = 1, repeats: int = 3
) -> dict[int, float]:
    """Measure the seconds of a crop in a training step, on this machine.

    The steps train on noise and change the weights.

    Args:
        state: a state before its first step, on the device to measure.
        settings: the settings of the run.
        workers: number of workers; a step has the largest share of one worker.
        repeats: measured steps per size; the fastest one counts.

    Returns:
        Seconds by patch size in pixels.
    """
    denoiser, device = state.denoiser, state.gradients.flat.device
    normalisation, resolution = identity_normalisation(denoiser.channels), settings.schedule.sizes[0].pixels
    seconds = {size.pixels: float("inf") for size in settings.schedule.sizes}
    for number in range(repeats + 1):  # the first one is a warm-up
        for size in settings.schedule.sizes:
            single_size = _only(settings, size)
            plan = plan_step(single_size, number, 0)
            group = plan.share(workers - 1, workers)[0]  # the last worker has the largest share
            shape = (len(group.crops), denoiser.channels, resolution, resolution)
            rows = StoredRows(torch.randn(shape, device=device), torch.full((shape[0],), -1, device=device))
            if channels := denoiser.condition_channels:
                rows = replace(rows, condition=torch.randn(shape[0], channels, *shape[2:], device=device))
            if denoiser.text_shape is not None:
                rows = replace(rows, text=torch.randn(shape[0], *denoiser.text_shape, device=device))
            started = device_time(device)
            training_step(state, single_size, plan, [(group, rows)], normalisation, None)
            if number:
                seconds[size.pixels] = min(seconds[size.pixels], (device_time(device) - started) / len(group.crops))
    return seconds
