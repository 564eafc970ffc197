"""ControlNet benchmark: seconds of steps by patch size, and the gain of patches compared with that of FLOPs."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread, Timings, interleave
from patchloom.benchmarks.setups import Trainer, only, representative_steps, step_settings
from patchloom.models.cards import CONTROLNET, DenoiserConfig
from patchloom.models.controlnet import describe_base
from patchloom.models.cost import estimated_gain
from patchloom.models.flops import flops_by_size
from patchloom.models.known_bases import CLIP_LENGTH, SCHEDULE, SD15_UNET, VAE_DOWNSCALE
from patchloom.models.step_plan import StepSettings

SHARE_WANTED = 0.8  # of the gain by FLOPs
CONTROL_BATCH = 2  # full-size latents; twice and four times as many patches
TEXT_WIDTH, HEAD_WIDTH = 64, 8


def by_patch_size(scale: Scale, say: Say) -> list[Finding]:
    """Steps of a ControlNet by patch size, sizes interleaved, and the gain of p = .5 over full-size steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = controlnet_config(Path(folder), scale)
        trainer = Trainer(config, step_settings(scale, 0.5, batch_size=CONTROL_BATCH, block_size=1))
    settings = trainer.settings
    sizes = [size.pixels for size in settings.schedule.sizes]
    alternatives = {}
    for pixels in sizes:
        single = only(settings, pixels)
        alternatives[str(pixels)] = partial(trainer.steps, representative_steps(single, 1), single)
    timings = interleave(alternatives, scale.rounds, 1, say)
    return gain_findings(settings, timings, flops_by_size(config, sizes))


def gain_findings(settings: StepSettings, timings: Timings, flops: dict[int, int]) -> list[Finding]:
    """The findings of timings by patch size.

    Args:
        settings: the settings of the steps at p = .5.
        timings: crops per second, by patch size in pixels as text.
        flops: FLOPs of a crop in training, by patch size in pixels.
    """
    full = str(settings.schedule.sizes[0].pixels)
    gains, cpu_gains = (
        [estimated_gain(settings, one, 1) for one in seconds_by_round(rates)]
        for rates in (timings.wall_rates, timings.cpu_rates)
    )
    by_flops = estimated_gain(settings, {size: float(count) for size, count in flops.items()}, 1)
    per_image = [gain.per_image for gain in gains]
    mixed = [1 / (rate * gain) for rate, gain in zip(timings.wall_rates[full], per_image, strict=True)]
    share, cpu_share = (
        Spread.of([gain.per_image / by_flops.per_image for gain in measured]) for measured in (gains, cpu_gains)
    )
    step, what = timings.seconds(full).scaled(settings.batch_size), "p = 0.5 over p = 1"
    return [
        Finding(f"full-size step of {settings.batch_size}", step, "s", is_cost=True),
        Finding("p = 1, seconds per counted image", timings.seconds(full), "s", is_cost=True),
        Finding("p = 0.5, seconds per counted image", Spread.of(mixed), "s", is_cost=True),
        Finding(what, Spread.of(per_image), "x per counted image", by_flops.per_image, "FLOPs"),
        Finding(what, Spread.of([gain.per_update for gain in gains]), "x per update", by_flops.per_update, "FLOPs"),
        Finding("measured gain over the gain by FLOPs", share, "x", wanted=SHARE_WANTED),
        Finding("measured gain over the gain by FLOPs, CPU time", cpu_share, "x"),
        *(Finding(f"a crop of {size} latent pixels", exact(count / 1e9), "GFLOP") for size, count in flops.items()),
    ]


def seconds_by_round(rates: dict[str, list[float]]) -> list[dict[int, float]]:
    """Seconds of a crop by patch size, for each round, from crops per second."""
    rounds = zip(*rates.values(), strict=True)
    return [{int(name): 1 / rate for name, rate in zip(rates, one, strict=True)} for one in rounds]


def controlnet_config(folder: Path, scale: Scale) -> DenoiserConfig:
    """A ControlNet of a narrow Stable Diffusion 1.5 with random weights, which are written to a folder.

    Args:
        folder: where to write the base, which the network is built from.
        scale: width of the first level, and side of the latents.
    """
    widths = [scale.width, 2 * scale.width, 4 * scale.width, 4 * scale.width]
    changes: dict[str, Any] = {
        "block_out_channels": widths, "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": HEAD_WIDTH,
        "norm_num_groups": 8, "layers_per_block": min(2, scale.blocks),
    }  # fmt: skip
    if scale.side < 32:  # three levels, because patches of R/4 can be halved twice
        changes |= {
            "block_out_channels": widths[:-1], "down_block_types": SD15_UNET["down_block_types"][1:],
            "up_block_types": SD15_UNET["up_block_types"][:-1],
        }  # fmt: skip
    torch.manual_seed(0)
    UNet2DConditionModel(**{**SD15_UNET, **changes}).save_pretrained(folder / "unet")
    DDPMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    options = {**describe_base(str(folder)), "control_channels": 1, "downscale": VAE_DOWNSCALE, "tokens": CLIP_LENGTH}
    return DenoiserConfig(network=CONTROLNET, network_options=options, resolution=scale.side, channels=4, classes=0,
                          coordinates="linear", condition_channels=VAE_DOWNSCALE**2, sigma_data=1.0)  # fmt: skip
