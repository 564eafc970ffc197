"""Quality at equal time on one GPU: the Fréchet distance of samples while a network trains at several p."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.benchmarks.findings import Finding, Scale, exact
from patchloom.benchmarks.gpu_session import GpuSession, say
from patchloom.benchmarks.gpu_training import FASTEST_EAGER
from patchloom.benchmarks.interleaved import now
from patchloom.benchmarks.result_file import QualityPoint
from patchloom.benchmarks.setups import Trainer, song_config, step_settings
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.features import POOL, Features
from patchloom.models.generate import Sampling, generate
from patchloom.models.metrics import frechet_distance
from patchloom.models.random_draws import RowOrder
from patchloom.models.step import StoredRows, set_rounding, training_step
from patchloom.models.step_plan import plan_step

RATIOS = (0.25, 0.5, 1.0)
CURVE_POINTS = 4  # per quality curve, at equal intervals
SAMPLE_BATCH = 250


def quality(session: GpuSession, images: np.ndarray, features: Features, seconds: float) -> None:
    """Train at each p for the same seconds, not counting sampling, and measure the Fréchet distance of samples."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(session.device)
    side = pixels.shape[-1]
    say(f"  features of {len(pixels):,} images")
    reference = features_of(features, pixels)
    precision = FASTEST_EAGER.precision if session.device.type == "cuda" else "fp32"  # many CPUs emulate bf16
    scale, samples, sampling = Scale(width=96, side=side, batch=128, blocks=2), 2_000, Sampling(precision=precision)
    if session.is_tiny:
        scale, samples, sampling = Scale(width=16, side=side, batch=16, blocks=1), 64, replace(sampling, steps=2)
    config, found = song_config(side, scale.width, scale.blocks), []
    for p in RATIOS:
        settings = step_settings(scale, p, precision=precision, block_size=8, lr=1e-3, lr_rampup_images=20_000)
        trainer = Trainer(config, settings, session.device, channels_last=True, ema_halflife_images=50_000)
        curve = quality_curve(trainer, pixels, features, reference, seconds, samples, sampling)
        session.results.curves[f"p = {p:g}"] = curve
        last = curve[-1]
        found.append(Finding(f"p = {p:g}, after {seconds:.0f} s", exact(last.distance), features.name, is_cost=True))
        found.append(Finding("  counted images", exact(last.images_seen), "images"))
        found.append(Finding("  updates", exact(last.updates), "updates"))
    half_distance = frechet_distance(*(reference[half::2] for half in (0, 1)))
    found.append(Finding("between two halves of the images", exact(half_distance), features.name, is_cost=True))
    session.keep(f"Fréchet distance of {samples:,} samples at equal time", found)


def quality_curve(
    trainer: Trainer,
    pixels: Tensor,
    features: Features,
    reference: Tensor,
    seconds: float,
    samples: int,
    sampling: Sampling,
) -> list[QualityPoint]:
    """Train for some seconds and measure samples of the averaged weights `CURVE_POINTS` times."""
    set_rounding(trainer.settings.precision)
    order, state, settings = RowOrder(len(pixels), 0), trainer.state, trainer.settings
    labels = torch.full((len(pixels),), -1, device=trainer.device)
    curve: list[QualityPoint] = []
    spent, start = 0.0, now()
    for point in range(1, CURVE_POINTS + 1):
        while spent + now() - start < seconds * point / CURVE_POINTS:
            plan = plan_step(settings, state.step, state.images_seen)
            work = []
            for group in plan.share():
                rows = torch.from_numpy(order.at(group.crops)).to(trainer.device)
                work.append((group, StoredRows(pixels[rows], labels[rows])))
            training_step(state, settings, plan, work, trainer.normalisation, None)
        spent, average = spent + now() - start, state.emas[0].module
        distance = frechet_distance(features_of(features, sampled(average, trainer, samples, sampling)), reference)
        curve.append(QualityPoint(spent, distance, state.step, state.images_seen))
        say(f"  p = {settings.schedule.sizes[0].probability:g}, {spent:.0f} s, {state.step:,} updates: {distance:.3g}")
        start = now()
    return curve


def sampled(average: Any, trainer: Trainer, count: int, sampling: Sampling) -> Tensor:
    """(count, 3, R, R) uint8 samples of the averaged weights, for the seeds 0, 1, ..."""
    card = ModelCard(denoiser=trainer.config, normalisation=trainer.normalisation)
    model = SamplingModel(average, trainer.normalisation, None, card)
    batches = []
    for first in range(0, count, SAMPLE_BATCH):
        seeds = list(range(first, min(first + SAMPLE_BATCH, count)))
        batches.append(generate(model, seeds, [-1] * len(seeds), sampling))
    return torch.cat(batches)


@torch.no_grad()
def features_of(features: Features, images: Tensor) -> Tensor:
    """(N, d) features of uint8 images, computed in batches."""
    batches = [features(images[first : first + SAMPLE_BATCH])[POOL].cpu() for first in
               range(0, len(images), SAMPLE_BATCH)]  # fmt: skip
    return torch.cat(batches)
