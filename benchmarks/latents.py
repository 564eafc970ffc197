"""Latent benchmarks: training on stored latents, compared with encoding the images in every step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchloom.benchmarks.findings import TINY, Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread, Timings, interleave
from patchloom.benchmarks.setups import Trainer, adm_config, only, step_settings
from patchloom.models.flops import training_flops
from patchloom.models.patches import PatchSchedule, patch_schedule
from patchloom.models.step import StoredRows, training_step
from patchloom.models.step_plan import StepSettings, plan_step

BATCH, P = 2, 0.5
LATENT_SIDE, DOWNSCALE = 32, 8
WANTED = 2.0


def precomputed(scale: Scale, say: Say) -> list[Finding]:
    """The gain of stored latents at p = .5 over a loop that encodes the image of each crop first.

    The network is ADM on latents of 32 (as in the paper), and the autoencoder has the shape of Stable Diffusion's, on
    256 x 256 images in float32 as in the released code. A step of each size and an encoding are measured, interleaved.
    The times at p = .5 are the mean of Eq. 5, with one encoding added per crop.
    """
    is_tiny = scale == TINY
    side = 8 if is_tiny else LATENT_SIDE
    config = adm_config(side, 32, 1) if is_tiny else adm_config(side)
    small = Scale(side=side, batch=BATCH)
    settings = step_settings(small, P)
    trainer, encode = Trainer(config, settings), _autoencoder(is_tiny)
    image = side * DOWNSCALE
    images = torch.rand(BATCH, 3, image, image) * 2 - 1

    def encode_batch() -> int:
        encode(images)
        return BATCH

    alternatives: dict[str, Callable[[], int]] = {"encoding": encode_batch}
    for size in settings.schedule.sizes:
        alternatives[str(size.pixels)] = partial(_latent_step, trainer, only(settings, size.pixels))
    timings = interleave(alternatives, 1 if is_tiny else max(3, scale.rounds - 2), 1, say)
    flops = {size.pixels: float(training_flops(config, size.pixels)) for size in settings.schedule.sizes}
    flops_of_encoding = _flops(is_tiny, image)
    schedules = {"R and R/2 as in the released code": patch_schedule(side, P, smaller=((0.5, 1.0, 2),)),
                 "R, R/2 and R/4": settings.schedule}  # fmt: skip
    gains = []
    for sizes, schedule in schedules.items():
        gain = Spread.of([_gain(schedule, seconds) for seconds in _seconds(timings, settings)])
        limit = _gain(schedule, flops | {0: flops_of_encoding})
        name = f"stored latents over encoding in each step, p = 0.5, {sizes}"
        gains.append(Finding(name, gain, "x", limit, "by FLOPs", WANTED))
    return [
        *gains,
        Finding(f"an encoding of {image} x {image} pixels", timings.seconds("encoding"), "s"),
        Finding("  FLOPs", exact(flops_of_encoding / 1e9), "GFLOP"),
        *(
            found
            for pixels, cost in flops.items()
            for found in (
                Finding(f"a step, a crop of {pixels} latents", timings.seconds(str(pixels)), "s"),
                Finding("  FLOPs", exact(cost / 1e9), "GFLOP"),
            )
        ),
    ]


def _latent_step(trainer: Trainer, settings: StepSettings) -> int:
    """One step on moments, from which latents are sampled. Returns the number of crops."""
    plan = plan_step(settings, 0, 0)
    work = []
    for group in plan.share():
        shape = (len(group.crops), trainer.channels, trainer.resolution, trainer.resolution)
        rows = StoredRows(torch.randn(shape), torch.full((shape[0],), -1), torch.full(shape, 0.1))
        work.append((group, rows))
    training_step(trainer.state, settings, plan, work, trainer.normalisation, None)
    return plan.crops


def _seconds(timings: Timings, settings: StepSettings) -> list[dict[int, float]]:
    """For each round, the seconds per crop by size; key 0 is an encoding."""
    names = {0: "encoding"} | {size.pixels: str(size.pixels) for size in settings.schedule.sizes}
    rounds = len(timings.wall_rates["encoding"])
    return [
        {pixels: 1 / timings.wall_rates[name][number] for pixels, name in names.items()} for number in range(rounds)
    ]


def _gain(schedule: PatchSchedule, cost: dict[int, float]) -> float:
    """Cost of a mean step with encoding divided by its cost without; key 0 is the cost of an encoding."""
    step = sum(size.probability * size.batch_multiplier * cost[size.pixels] for size in schedule.sizes)
    encoding = cost[0] * schedule.mean_multiplier
    return (step + encoding) / step


def _network(is_tiny: bool) -> Any:
    """An AutoencoderKL with the shape of Stable Diffusion's (Rombach et al. 2022) and random weights."""
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
    """FLOPs of one encoding; a multiply-add counts as 2."""
    with torch.device("meta"):
        network = _network(is_tiny).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.encoder(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops())
