"""Latents: training on latents that were encoded once beside encoding the images of every step, as others do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchloom.benchmarks.findings import TINY, Finding, Say, Scale, exactly
from patchloom.benchmarks.paired import Spread, Turns, in_turns
from patchloom.benchmarks.setups import Trainer, adm_config, only, step_settings
from patchloom.models.flops import training_flops
from patchloom.models.patches import PatchSchedule, patch_schedule
from patchloom.models.step import Rows, training_step
from patchloom.models.step_plan import StepSettings, plan_step

BATCH, P = 2, 0.5
LATENT_SIDE, DOWNSCALE = 32, 8
WANTED = 2.0


def precomputed(scale: Scale, say: Say) -> list[Finding]:
    """Counted images a second at p = .5 on stored latents, over those of a loop that encodes each crop's image first.

    ADM at latents of 32 (the paper's) and an autoencoder of Stable Diffusion's shape on 256 x 256 images, in
    float32 as the released code has it. A step of each size and an encoding take turns; p = .5 is Eq. 5's
    mean of them, an encoding added for each crop.
    """
    is_tiny = scale == TINY
    side = 8 if is_tiny else LATENT_SIDE
    config = adm_config(side, 32, 1) if is_tiny else adm_config(side)
    small = Scale(side=side, batch=BATCH)
    method = step_settings(small, P)
    trainer, encode = Trainer(config, method), _autoencoder(is_tiny)
    image = side * DOWNSCALE
    images = torch.rand(BATCH, 3, image, image) * 2 - 1

    def encoded() -> int:
        encode(images)
        return BATCH

    ways: dict[str, Callable[[], int]] = {"encoding": encoded}
    for size in method.schedule.sizes:
        ways[str(size.pixels)] = partial(_latent_step, trainer, only(method, size.pixels))
    turns = in_turns(ways, 1 if is_tiny else max(3, scale.rounds - 2), 1, say)
    flops = {size.pixels: float(training_flops(config, size.pixels)) for size in method.schedule.sizes}
    flops_of_encoding = _flops(is_tiny, image)
    schedules = {"R and R/2, as in the released code": patch_schedule(side, P, smaller=((0.5, 1.0, 2),)),
                 "R, R/2 and R/4": method.schedule}  # fmt: skip
    gains = []
    for sizes, schedule in schedules.items():
        gain = Spread.of([_gain(schedule, seconds) for seconds in _seconds(turns, method)])
        limit = _gain(schedule, flops | {0: flops_of_encoding})
        name = f"latents encoded once over encoding in each step, p = 0.5, {sizes}"
        gains.append(Finding(name, gain, "x", limit, "by FLOPs", WANTED))
    return [
        *gains,
        Finding(f"an encoding of {image} x {image} pixels", turns.seconds("encoding"), "s"),
        Finding("  of", exactly(flops_of_encoding / 1e9), "GFLOP"),
        *(
            found
            for pixels, cost in flops.items()
            for found in (
                Finding(f"a step, a crop of {pixels} latents", turns.seconds(str(pixels)), "s"),
                Finding("  of", exactly(cost / 1e9), "GFLOP"),
            )
        ),
    ]


def _latent_step(trainer: Trainer, method: StepSettings) -> int:
    """One step on moments, whose latents are drawn afresh; gives its crops."""
    plan = plan_step(method, 0, 0)
    work = []
    for group in plan.share():
        shape = (len(group.crops), trainer.channels, trainer.resolution, trainer.resolution)
        rows = Rows(torch.randn(shape), torch.full((shape[0],), -1), torch.full(shape, 0.1))
        work.append((group, rows))
    training_step(trainer.state, method, plan, work, trainer.space, lambda _: None)
    return plan.crops


def _seconds(turns: Turns, method: StepSettings) -> list[dict[int, float]]:
    """Seconds of a crop of each size, and of an encoding under 0, round by round."""
    names = {0: "encoding"} | {size.pixels: str(size.pixels) for size in method.schedule.sizes}
    rounds = len(turns.by_clock["encoding"])
    return [{pixels: 1 / turns.by_clock[name][number] for pixels, name in names.items()} for number in range(rounds)]


def _gain(schedule: PatchSchedule, cost: dict[int, float]) -> float:
    """The cost of a mean step that encodes over that of one that does not; the cost of an encoding stands under 0."""
    step = sum(size.probability * size.batch_multiplier * cost[size.pixels] for size in schedule.sizes)
    encoding = cost[0] * schedule.mean_multiplier
    return (step + encoding) / step


def _network(is_tiny: bool) -> Any:
    """An AutoencoderKL of Stable Diffusion's shape (Rombach et al. 2022), with random weights."""
    from diffusers import AutoencoderKL

    widths = (8, 8, 8, 8) if is_tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=min(32, widths[0]),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
    )  # fmt: skip


def _autoencoder(is_tiny: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    network = _network(is_tiny).eval()

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = network.encode(images).latent_dist.sample()
        return latents

    return encode


def _flops(is_tiny: bool, side: int) -> float:
    """FLOPs of one encoding; a multiply-add counts 2."""
    with torch.device("meta"):
        network = _network(is_tiny).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.encoder(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops())
