"""Setups: the networks, batches and steps that benchmarks measure, with noise instead of images."""

import math
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from patchloom.benchmarks.findings import Scale
from patchloom.benchmarks.plain import PlainDenoiser, PlainUNet
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel, load_sampling_model, save_model
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.flops import evaluation_flops
from patchloom.models.generate import Sampling
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StoredRows, TrainingState, compile_network, new_state, training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step

DROPOUT = 0.1
ADAM = (0.9, 0.999), 1e-8
BLOCK = 2  # crops; four workers can share a batch of 8


def song_config(
    side: int, width: int, blocks: int = 4, *, channels: int = 3, dropout: float = DROPOUT
) -> DenoiserConfig:
    """DDPM++ (EDM, Table 7) on images of `side` pixels, for `build_denoiser`; two levels on tiny images."""
    multipliers = [1, 2, 2, 2] if side >= 32 else [1, 2]
    options = {"width": width, "width_multipliers": multipliers, "blocks": blocks, "attention": [16],
               "dropout": dropout}  # fmt: skip
    return DenoiserConfig(network="song", network_options=options, resolution=side, channels=channels, classes=0,
                          coordinates="linear", sigma_data=0.5)  # fmt: skip


def adm_config(side: int = 32, width: int = 192, blocks: int = 3, *, channels: int = 4) -> DenoiserConfig:
    """ADM (EDM, Table 7) on latents of `side` pixels, as in the paper's LSUN runs."""
    options = {"width": width, "width_multipliers": [1, 2, 3, 4] if side >= 32 else [1, 2], "blocks": blocks,
               "attention": [32, 16, 8], "dropout": DROPOUT, "head_width": min(64, width)}  # fmt: skip
    return DenoiserConfig(network="dhariwal", network_options=options, resolution=side, channels=channels, classes=0,
                          coordinates="linear", sigma_data=0.5)  # fmt: skip


def step_settings(scale: Scale, p: float = 1.0, **changes: Any) -> StepSettings:
    """Settings of a run with ratio p of full-size steps, and the sizes and multipliers of Eq. 5."""
    base = StepSettings(
        seed=0, schedule=patch_schedule(scale.side, p), updates=10**6, batch_size=scale.batch, block_size=BLOCK,
        lr=1e-4, lr_rampup_images=0,
    )  # fmt: skip
    return replace(base, **changes)


class Trainer:
    """The state of a run on one device, which trains on noise.

    Args:
        config: the network, see `song_config` and `adm_config`.
        settings: the settings of the steps.
        device: where to train.
        channels_last: use torch's channels_last layout.
        compiled: compile one graph per patch size, in the first step of that size.
        ema_halflife_images: half-life of the average, in counted images.
    """

    def __init__(
        self, config: DenoiserConfig, settings: StepSettings, device: torch.device | str = "cpu", *,
        channels_last: bool = False, compiled: bool = False, ema_halflife_images: float = 500_000.0,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.config = config
        self.settings, self.device, self.channels = settings, torch.device(device), config.channels
        layout = torch.channels_last if channels_last else torch.contiguous_format
        denoiser: Any = build_denoiser(config).to(self.device)
        self.denoiser: Denoiser = denoiser.to(memory_format=layout).train()
        average = HalfLifeEMA(self.denoiser, ema_halflife_images)
        self.state: TrainingState = new_state(self.denoiser, [average], settings, *ADAM)
        if compiled:
            compile_network(self.denoiser, settings.schedule)
        self.normalisation: Normalisation = pixel_normalisation(self.channels)
        self.resolution = config.resolution

    def rows(self, count: int) -> StoredRows:
        """`count` rows of uint8 noise, with conditions and texts of noise if the network takes them."""
        shape = (count, self.channels, self.resolution, self.resolution)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        shown, text = self.config.condition_channels, self.denoiser.text_shape
        more = {
            "condition": torch.randn(count, shown, *shape[2:], device=self.device) if shown else None,
            "text": torch.randn(count, *text, device=self.device) if text else None,
        }
        return StoredRows(images, torch.full((count,), -1, device=self.device), **more)

    def steps(self, plans: list[StepPlan], settings: StepSettings | None = None) -> int:
        """Take these steps on one worker. Returns the number of counted crops."""
        for plan in plans:
            work = [(group, self.rows(len(group.crops))) for group in plan.share()]
            training_step(self.state, settings or self.settings, plan, work, self.normalisation, None)
        return sum(plan.crops for plan in plans)


def only(settings: StepSettings, pixels: int) -> StepSettings:
    """The same run with one crop size in every step."""
    sizes = tuple(
        replace(size, probability=float(size.pixels == pixels)) for size in settings.schedule.sizes
    )  # keep all sizes, so that one training state fits every such run
    return replace(settings, schedule=replace(settings.schedule, sizes=sizes), draw="shared")


def representative_steps(settings: StepSettings, steps: int) -> list[StepPlan]:
    """The first steps of a run that together have exactly the expected shares of sizes, to exclude random draws."""
    if settings.draw == "stratified":
        return [plan_step(settings, step, 0) for step in range(steps)]
    ranks = settings.emulated_ranks if settings.draw == "independent" else 1
    shares = {size.pixels: size.probability for size in settings.schedule.sizes}
    missing: Counter[tuple[int, ...]] = Counter()
    for sizes in product(shares, repeat=ranks):
        missing[sizes] = round(steps * math.prod(shares[pixels] for pixels in sizes))
    chosen, step = [], 0
    while sum(missing.values()) > 0:
        plan = plan_step(settings, step, 0)
        sizes = tuple(size.pixels for size in plan.sizes)
        if missing[sizes] > 0:
            missing[sizes] -= 1
            chosen.append(plan)
        step += 1
    return chosen


def untrained(folder: Path, config: DenoiserConfig) -> Path:
    """Write a pixel model with random weights into a new folder. Returns its path."""
    torch.manual_seed(0)
    folder.mkdir()
    card = ModelCard(name="benchmark", denoiser=config, normalisation=pixel_normalisation())
    save_model(folder, build_denoiser(config), card)
    return folder


def plain_copy(model: SamplingModel) -> PlainDenoiser:
    """The plain denoiser with the weights of a DDPM++, on its device."""
    config = model.card.denoiser
    plain = PlainDenoiser(PlainUNet(config.resolution, config.channels + 2, config.channels, **config.network_options))
    plain.load_state_dict(dict(model.denoiser.named_parameters()))
    return plain.to(next(model.denoiser.parameters()).device).eval().requires_grad_(False)


def same_networks(config: DenoiserConfig) -> tuple[SamplingModel, PlainDenoiser]:
    """An untrained pixel model as `sample` loads it on a CPU, and the plain denoiser with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_sampling_model(untrained(Path(folder) / "model", config))
    return model, plain_copy(model)


def sampling_flops(config: DenoiserConfig, sampling: Sampling) -> float:
    """FLOPs per image: one forward pass per evaluation of the network."""
    return sampling.network_evaluations * float(evaluation_flops(config, config.resolution))
