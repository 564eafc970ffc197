"""Cost: what patches save, foretold from the seconds or FLOPs that a crop of each size takes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import PatchSchedule, PatchSize
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step

PLANNED_STEPS = 4000


@dataclass(frozen=True)
class Gain:
    """How much faster than full-size images alone: by counted images (crops), and by updates."""

    per_image: float
    per_update: float


def step_cost(method: StepSettings, cost_of_crop: Mapping[int, float], workers: int) -> tuple[float, float]:
    """The mean cost of a step, for which all wait for the slowest worker, and the mean number of its crops.

    cost_of_crop: by patch size in pixels, in any unit. Exact where a step has one size; the other draws are
    averaged over steps that are planned as a run plans them.
    """
    if method.draw == "shared":
        plans = [(size.probability, plan_step(_only(method, size), 0, 0)) for size in method.schedule.sizes]
    else:
        plans = [(1 / PLANNED_STEPS, plan_step(method, step, 0)) for step in range(PLANNED_STEPS)]
    cost = sum(share * _slowest(plan, cost_of_crop, workers) for share, plan in plans)
    return cost, sum(share * plan.crops for share, plan in plans)


def _only(method: StepSettings, size: PatchSize) -> StepSettings:
    """The same run with a single size in every step."""
    return replace(method, schedule=PatchSchedule((replace(size, probability=1.0),)), draw="shared", emulated_ranks=1)


def _slowest(plan: StepPlan, cost_of_crop: Mapping[int, float], workers: int) -> float:
    shares = (plan.share(worker, workers) for worker in range(workers))
    return max(sum(len(group.crops) * cost_of_crop[group.size.pixels] for group in share) for share in shares)


def estimated_gain(method: StepSettings, cost_of_crop: Mapping[int, float], workers: int) -> Gain:
    """What this run's patches save against p = 1 on so many workers (Patch Diffusion, Table 1, by arithmetic)."""
    cost, crops = step_cost(method, cost_of_crop, workers)
    full_cost, full_crops = step_cost(_only(method, method.schedule.sizes[0]), cost_of_crop, workers)
    return Gain(per_image=(crops / cost) / (full_crops / full_cost), per_update=full_cost / cost)


def measured_seconds_of_crop(
    denoiser: Denoiser, method: StepSettings, space: Normalisation, workers: int = 1, repeats: int = 3
) -> dict[int, float]:
    """Seconds that a crop of each patch size takes in a training step here, the best of `repeats`; by pixels.

    Steps have one worker's share of the batch, on noise in place of images, and change `denoiser`.
    """
    state = new_state(denoiser, [], method, (0.9, 0.999), 1e-8)
    resolution = method.schedule.sizes[0].pixels
    device = state.gradients.flat.device
    seconds = {size.pixels: float("inf") for size in method.schedule.sizes}
    for number in range(repeats + 1):  # the first is not counted
        for size in method.schedule.sizes:
            one = _only(method, size)
            plan = plan_step(one, number, 0)
            group = plan.share(workers - 1, workers)[0]  # the last worker's share is the largest
            shape = (len(group.crops), denoiser.channels, resolution, resolution)
            rows = StoredRows(torch.randn(shape, device=device), torch.full((shape[0],), -1, device=device))
            began = _now(device)
            training_step(state, one, plan, [(group, rows)], space, _alone)
            if number:
                seconds[size.pixels] = min(seconds[size.pixels], (_now(device) - began) / len(group.crops))
    return seconds


def _alone(_: Tensor) -> None:
    pass


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
