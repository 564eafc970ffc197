"""Setups: the networks, batches and steps that are measured, on noise in place of images."""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from patchloom.benchmarks.findings import Scale
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import Rows, TrainingState, compile_network, new_state, training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step

DROPOUT = 0.1
ADAM = (0.9, 0.999), 1e-8
BLOCK = 2  # crops; small enough that four workers share a batch of 8


def song_config(side: int, width: int, blocks: int = 4, *, channels: int = 3, dropout: float = DROPOUT) -> Any:
    """DDPM++ (EDM, Table 7) on images of `side` pixels, as `build_denoiser` takes it; two levels on tiny ones."""
    multipliers = [1, 2, 2, 2] if side >= 32 else [1, 2]
    options = {"width": width, "width_multipliers": multipliers, "blocks": blocks, "attention": [16],
               "dropout": dropout}  # fmt: skip
    return {"network": "song", "network_options": options, "resolution": side, "channels": channels, "classes": 0,
            "coordinates": "linear", "sigma_data": 0.5}  # fmt: skip


def adm_config(side: int = 32, width: int = 192, blocks: int = 3, *, channels: int = 4) -> Any:
    """ADM (EDM, Table 7) on latents of `side` pixels, as the paper's LSUN runs have it."""
    options = {"width": width, "width_multipliers": [1, 2, 3, 4] if side >= 32 else [1, 2], "blocks": blocks,
               "attention": [32, 16, 8], "dropout": DROPOUT, "head_width": min(64, width)}  # fmt: skip
    return {"network": "dhariwal", "network_options": options, "resolution": side, "channels": channels, "classes": 0,
            "coordinates": "linear", "sigma_data": 0.5}  # fmt: skip


def step_settings(scale: Scale, p: float = 1.0, **changes: Any) -> StepSettings:
    """A run at this ratio of full-size steps, with Eq. 5's sizes and multipliers."""
    base = StepSettings(
        seed=0, schedule=patch_schedule(scale.side, p), updates=10**6, batch_size=scale.batch, block_size=BLOCK,
        lr=1e-4, lr_rampup_images=0,
    )  # fmt: skip
    return replace(base, **changes)


class Trainer:
    """A run's state on one device, and steps of it on noise.

    channels_last: weights, and so activations, with the channels of a pixel side by side. compiled: one graph a
    patch size, made when a size is first trained on.
    """

    def __init__(
        self, config: dict[str, Any], method: StepSettings, device: torch.device | str = "cpu", *,
        channels_last: bool = False, compiled: bool = False, ema_halflife_images: float = 500_000.0,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.method, self.device, self.channels = method, torch.device(device), config["channels"]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        denoiser: Any = build_denoiser(config).to(self.device)
        self.denoiser: Denoiser = denoiser.to(memory_format=layout).train()
        average = HalfLifeEMA(self.denoiser, ema_halflife_images)
        self.state: TrainingState = new_state(self.denoiser, [average], method, *ADAM)
        if compiled:
            compile_network(self.denoiser, method.schedule)
        self.space: Normalisation = pixel_normalisation(self.channels)
        self.resolution = config["resolution"]

    def rows(self, count: int) -> Rows:
        """As many rows as there are crops, of uint8 noise."""
        shape = (count, self.channels, self.resolution, self.resolution)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return Rows(images, torch.full((count,), -1, device=self.device))

    def steps(self, plans: list[StepPlan], method: StepSettings | None = None) -> int:
        """Take these steps alone; gives the crops that were counted."""
        for plan in plans:
            work = [(group, self.rows(len(group.crops))) for group in plan.share()]
            training_step(self.state, method or self.method, plan, work, self.space, alone)
        return sum(plan.crops for plan in plans)


def alone(_: Tensor) -> None:
    """The sum over one worker."""


def only(method: StepSettings, pixels: int) -> StepSettings:
    """The same run with crops of one size in every step."""
    sizes = tuple(
        replace(size, probability=float(size.pixels == pixels)) for size in method.schedule.sizes
    )  # all are kept, so that one state serves every such run
    return replace(method, schedule=replace(method.schedule, sizes=sizes), draw="shared")


def representative_steps(method: StepSettings, steps: int) -> list[StepPlan]:
    """The first steps of the run whose sizes have exactly their shares, so that no luck of the draw is measured."""
    if method.draw == "stratified":
        return [plan_step(method, step, 0) for step in range(steps)]
    ranks = method.emulated_ranks if method.draw == "independent" else 1
    shares = {size.pixels: size.probability for size in method.schedule.sizes}
    room: Counter[tuple[int, ...]] = Counter()
    for some in product(shares, repeat=ranks):
        share = 1.0
        for pixels in some:
            share *= shares[pixels]
        room[some] = round(steps * share)
    chosen, step = [], 0
    while sum(room.values()) > 0:
        plan = plan_step(method, step, 0)
        sizes = tuple(size.pixels for size in plan.sizes)
        if room[sizes] > 0:
            room[sizes] -= 1
            chosen.append(plan)
        step += 1
    return chosen
