"""GPU benchmark: the paper's networks in several precisions on one GPU, and quality at equal time, within ten minutes.

It needs torch, numpy and safetensors, no installation and no network access: `make bench-gpu`, or from a checkout

    python -m patchloom.benchmarks.gpu [--images cifar.npz] [--features inception.safetensors] [--out FOLDER]

DDPM++ on 64 x 64 pixels is compared with plain float32 without TF32, as the released code trains on pixels. ADM on
latents of 32 is compared with half precision without compilation, as the released code trains on latents. With
`--images` (`images`, N x H x W x 3 uint8), it also trains for some minutes at p = .25, .5 and 1 and measures the
Fréchet distance of samples over time. Measurements that do not fit into the time are skipped with a message.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.benchmarks.findings import TINY, Finding, Scale, exact, findings_table
from patchloom.benchmarks.interleaved import interleave, now
from patchloom.benchmarks.limits import convolution_flops
from patchloom.benchmarks.machine import describe_machine
from patchloom.benchmarks.plain import PlainDenoiser, PlainTraining, PlainUNet
from patchloom.benchmarks.result_file import GpuResults, QualityPoint
from patchloom.benchmarks.setups import Trainer, adm_config, only, representative_steps, song_config, step_settings
from patchloom.errors import UserError
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.cost import estimated_gain
from patchloom.models.features import POOL, ColourFeatures, Features, features_of_file
from patchloom.models.flops import peak_flops, training_flops
from patchloom.models.generate import Sampling, generate
from patchloom.models.metrics import frechet_distance
from patchloom.models.random_draws import RowOrder
from patchloom.models.step import HALF_PRECISIONS, StoredRows, set_rounding, training_step
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.platform.files.storage import make_folder, write_atomic

PIXEL = Scale(rounds=3, width=128, side=64, batch=64)
LATENT = Scale(rounds=3, width=192, side=32, batch=64, blocks=3)
WANTED_SPEED, WANTED_GAIN = 5.0, 2.4
MIXED_STEPS = 10  # exactly the shares of Eq. 5 at p = .5
PLAIN = "plain loop, fp32 without TF32"
RATIOS = (0.25, 0.5, 1.0)
CURVE_POINTS = 4  # per quality curve, at equal intervals
SAMPLES, SAMPLE_BATCH, SAMPLER_STEPS = 2_000, 250, 18
COMPILE_S = 100.0  # expected for one graph of a large network

Say = Callable[[str], None]


def say(text: str) -> None:
    """Print one line to stderr; `rich` may not be installed."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Variant:
    """How a step computes: precision, layout and compilation."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False

    def on(self, device: torch.device) -> "Variant":
        """The variant that this device supports: on a CPU, float32 without compilation."""
        return self if device.type == "cuda" else replace(self, precision="fp32", compiled=False)

    def trainer(self, config: DenoiserConfig, settings: StepSettings, device: torch.device) -> Trainer:
        """A trainer with this variant."""
        return Trainer(
            config, replace(settings, precision=self.precision), device,
            channels_last=self.channels_last, compiled=self.compiled,
        )  # fmt: skip


FASTEST = Variant("bf16, channels last, compiled", "bf16", True, True)
PIXEL_VARIANTS = (
    Variant("fp32 without TF32"), Variant("tf32", "tf32"), Variant("bf16", "bf16"),
    Variant("bf16, channels last", "bf16", True), FASTEST,
)  # fmt: skip
LATENT_VARIANTS = (Variant("fp16", "fp16"), Variant("bf16", "bf16"), FASTEST)


@dataclass
class GpuSession:
    """The device, the deadline and the findings of one call."""

    device: torch.device
    deadline: float
    is_tiny: bool
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    curves: dict[str, list[QualityPoint]] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether there is time for a measurement; prints a message if not."""
        if self.is_tiny or self.seconds_left > seconds:
            return True
        say(f"  {what} skipped: it takes about {seconds:.0f} s, and {max(0.0, self.seconds_left):.0f} s are left")
        return False

    def keep(self, name: str, findings: list[Finding]) -> None:
        """Record findings and print them."""
        self.findings[name] = findings
        say(f"\n{name}\n{findings_table(findings)}")


def speeds(
    session: GpuSession, name: str, config: DenoiserConfig, scale: Scale, variants: tuple[Variant, ...],
    plain: PlainTraining | None = None,
) -> None:  # fmt: skip
    """Full-size steps of each variant, interleaved, compared with a plain loop or the first variant."""
    trainers, memory = _start_variants(session, name, config, scale, variants)
    plan = plan_step(step_settings(scale), 0, 0)
    noise = next(iter(trainers.values()))

    def steps_of(trainer: Trainer) -> int:
        set_rounding(trainer.settings.precision)
        return trainer.steps([plan, plan])

    def plain_steps(training: PlainTraining) -> int:
        set_rounding("fp32")
        for _ in range(2):
            training.step(noise.rows(scale.batch).image, scale.side)
        return 2 * scale.batch

    alternatives = {name: partial(steps_of, trainer) for name, trainer in trainers.items()}
    if plain is not None:
        alternatives[PLAIN] = partial(plain_steps, plain)
    timings = interleave(alternatives, scale.rounds, 1)
    flops = training_flops(config, scale.side)
    found = [] if plain is None else [Finding(PLAIN, timings.rate(PLAIN), "images/s")]
    measured = [variant for variant in variants if variant.name in trainers]
    for variant in measured:
        rate, precision = timings.rate(variant.name), variant.on(session.device).precision
        used, peak, source = utilisation(session.device, precision, rate.median * flops)
        found.append(Finding(variant.name, rate, "images/s", peak / flops, source))
        found.append(Finding("  share of peak FLOPs", exact(100 * used), "%"))
        found.append(Finding("  peak memory", exact(memory[variant.name]), "GiB"))
    first = PLAIN if plain is not None else variants[0].name
    for variant in measured:
        if variant.name != first:
            wanted = WANTED_SPEED if variant == FASTEST and plain is not None else None
            ratio = timings.ratio(variant.name, first)
            found.append(Finding(f"{variant.name} over {first}", ratio, "x", wanted=wanted))
    session.keep(f"{name}, full size, batch {scale.batch}", found)


def _start_variants(
    session: GpuSession, name: str, config: DenoiserConfig, scale: Scale, variants: tuple[Variant, ...]
) -> tuple[dict[str, Trainer], dict[str, float]]:
    """Trainers after their first step, and their peak memory in GiB, by variant."""
    settings = step_settings(scale)
    plan = plan_step(settings, 0, 0)
    trainers: dict[str, Trainer] = {}
    memory: dict[str, float] = {}
    for variant in variants:
        if variant.compiled and not session.has_time(f"{name}: {variant.name}", COMPILE_S):
            continue
        say(f"  {name}: {variant.name}" + (" (compiling)" if variant.compiled else ""))
        reset_memory(session.device)
        trainer = variant.on(session.device).trainer(config, settings, session.device)
        set_rounding(trainer.settings.precision)
        trainer.steps([plan])
        trainers[variant.name], memory[variant.name] = trainer, peak_memory(session.device)
    return trainers, memory


def patch_gain(session: GpuSession, name: str, config: DenoiserConfig, scale: Scale, variant: Variant) -> None:
    """Counted images per second of each patch size and of p = .5, and the gain over p = 1."""
    mixed, full = step_settings(scale, 0.5), step_settings(scale, 1.0)
    sizes = mixed.schedule.sizes
    if not session.has_time(f"{name}: p = 0.5", 30 + (COMPILE_S * len(sizes) if variant.compiled else 0)):
        return
    variant = variant.on(session.device)
    set_rounding(variant.precision)
    trainer = variant.trainer(config, mixed, session.device)

    def steps_of(settings: StepSettings, steps: int) -> Callable[[], int]:
        settings = replace(settings, precision=variant.precision)
        plans = representative_steps(settings, steps)
        return lambda: trainer.steps(plans, settings)

    alternatives = {f"crops of {size.pixels}": steps_of(only(mixed, size.pixels), 2) for size in sizes}
    alternatives |= {
        "p = 0.5": steps_of(mixed, MIXED_STEPS),
        "p = 1": steps_of(only(full, scale.side), MIXED_STEPS // 2),
    }
    timings = interleave(alternatives, scale.rounds, 1)
    gain = timings.ratio("p = 0.5", "p = 1")
    limit = estimated_gain(mixed, {size.pixels: float(size.pixels**2) for size in sizes}, 1)
    mean, why = mixed.schedule.mean_multiplier, "cost proportional to pixels"
    session.keep(f"{name}: gain of patches ({variant.name})", [
        *(Finding(name, timings.rate(name), "counted images/s") for name in alternatives),
        Finding("p = 0.5 over p = 1", gain, "x per counted image", limit.per_image, why, WANTED_GAIN),
        Finding("p = 0.5 over p = 1", exact(gain.median / mean), "x per update", limit.per_update, why),
    ])  # fmt: skip


def quality(session: GpuSession, images: np.ndarray, features: Features, seconds: float) -> None:
    """Train at each p for the same seconds, not counting sampling, and measure the Fréchet distance of samples."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(session.device)
    side, samples = pixels.shape[-1], 64 if session.is_tiny else SAMPLES
    say(f"  features of {len(pixels):,} images")
    reference = features_of(features, pixels)
    scale = Scale(width=16 if session.is_tiny else 96, side=side, batch=16 if session.is_tiny else 128, blocks=2)
    if session.is_tiny:
        scale = replace(scale, blocks=1)
    found = []
    for p in RATIOS:
        precision = FASTEST.on(session.device).precision
        settings = step_settings(scale, p, precision=precision, block_size=8, lr=1e-3, lr_rampup_images=20_000)
        config = song_config(side, scale.width, scale.blocks)
        trainer = Trainer(config, settings, session.device, ema_halflife_images=50_000)
        curve = quality_curve(trainer, pixels, features, reference, seconds, samples)
        session.curves[f"p = {p:g}"] = curve
        last = curve[-1]
        found.append(Finding(f"p = {p:g}, after {seconds:.0f} s", exact(last.distance), features.name, is_cost=True))
        found.append(Finding("  counted images", exact(last.images_seen), "images"))
        found.append(Finding("  updates", exact(last.updates), "updates"))
    half_distance = frechet_distance(*(reference[half::2] for half in (0, 1)))
    found.append(Finding("between two halves of the images", exact(half_distance), features.name, is_cost=True))
    session.keep(f"Fréchet distance of {samples:,} samples at equal time", found)


def quality_curve(
    trainer: Trainer, pixels: Tensor, features: Features, reference: Tensor, seconds: float, samples: int
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
        distance = frechet_distance(features_of(features, sampled(average, trainer, samples)), reference)
        curve.append(QualityPoint(spent, distance, state.step, state.images_seen))
        say(f"  p = {settings.schedule.sizes[0].probability:g}, {spent:.0f} s, {state.step:,} updates: {distance:.3g}")
        start = now()
    return curve


def sampled(average: Any, trainer: Trainer, count: int) -> Tensor:
    """(count, 3, R, R) uint8 samples of the averaged weights, for the seeds 0, 1, ..."""
    card = ModelCard(denoiser=trainer.config, normalisation=trainer.normalisation)
    model = SamplingModel(average, trainer.normalisation, None, card)
    batches = []
    for first in range(0, count, SAMPLE_BATCH):
        seeds = list(range(first, min(first + SAMPLE_BATCH, count)))
        batches.append(generate(model, seeds, [-1] * len(seeds), Sampling(steps=SAMPLER_STEPS)))
    return torch.cat(batches)


@torch.no_grad()
def features_of(features: Features, images: Tensor) -> Tensor:
    """(N, d) features of uint8 images, computed in batches."""
    batches = [features(images[first : first + SAMPLE_BATCH])[POOL].cpu() for first in
               range(0, len(images), SAMPLE_BATCH)]  # fmt: skip
    return torch.cat(batches)


def utilisation(device: torch.device, precision: str, flops_per_second: float) -> tuple[float, float, str]:
    """The utilisation of peak FLOP/s in this precision, the peak, and the source of the peak."""
    set_rounding(precision)
    peak, source = peak_flops(device, HALF_PRECISIONS.get(precision, torch.float32))
    return flops_per_second / peak, peak, f"peak FLOPs, {source}"


def reset_memory(device: torch.device) -> None:
    """Reset the measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> float:
    """Peak GiB of tensors, including those of earlier variants that are still in memory."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def limits(session: GpuSession) -> None:
    """Measure the fastest convolutions of the device."""
    found = []
    for precision in ("fp32", "tf32", "bf16") if session.device.type == "cuda" else ("fp32",):
        set_rounding(precision)
        dtype = HALF_PRECISIONS.get(precision, torch.float32)
        measured = convolution_flops(session.device, dtype) / 1e12
        peak, source = peak_flops(session.device, dtype)
        name = f"fastest 3x3 convolution, {precision}"
        found.append(Finding(name, exact(measured), "TFLOP/s", peak / 1e12, source))
    session.keep("limits", found)


def measure(
    device: torch.device, minutes: float, images: np.ndarray | None, features: Features, is_tiny: bool
) -> GpuResults:
    """Run the measurements that fit into these minutes, the most important first."""
    session = GpuSession(device, time.monotonic() + 60 * minutes, is_tiny)
    pixel, latent = (replace(TINY, rounds=1), replace(TINY, rounds=1)) if is_tiny else (PIXEL, LATENT)
    song = song_config(pixel.side, pixel.width, pixel.blocks, dropout=0.05)
    adm = adm_config(latent.side, 32, 1) if is_tiny else adm_config(latent.side)
    limits(session)
    plain = PlainTraining(PlainDenoiser(PlainUNet(pixel.side, 5, 3, **song.network_options)).to(device), pixel.side)
    speeds(session, f"DDPM++ on {pixel.side} pixels", song, pixel, PIXEL_VARIANTS, plain)
    patch_gain(session, f"DDPM++ on {pixel.side} pixels", song, pixel, Variant("bf16, channels last", "bf16", True))
    speeds(session, f"ADM on latents of {latent.side}", adm, latent, LATENT_VARIANTS)
    if images is None:
        say("  quality at equal time skipped: pass --images FILE.npz")
    elif session.has_time("quality at equal time", 150):
        quality(session, images, features, 0.5 if is_tiny else min(100.0, (session.seconds_left - 60) / len(RATIOS)))
    if not is_tiny:
        patch_gain(session, f"DDPM++ on {pixel.side} pixels, compiled", song, pixel, FASTEST)
    return GpuResults(
        datetime.now(UTC).strftime("%Y-%m-%d"), describe_machine(), session.findings, session.curves,
        {"pixel": pixel, "latent": latent},
    )  # fmt: skip


def main() -> int:
    """Parse the options, measure and write the result file. Returns the exit code, 2 without a GPU."""
    parser = argparse.ArgumentParser("patchloom.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a .npz file with `images` (N, H, W, 3) uint8")
    parser.add_argument("--features", type=Path, help="weights of Inception; default: colours of tiles")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes on any device, only to check that everything runs"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print(
            "patchloom: torch finds no CUDA device: run this on a machine with a GPU, or pass --tiny",
            file=sys.stderr,
        )
        return 2
    for path in (options.images, options.features):
        if path is not None and not path.is_file():
            print(f"patchloom: {path} is not a file: pass another file, or none", file=sys.stderr)
            return 2
    try:
        make_folder(options.out)
    except UserError as error:
        print(f"patchloom: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = features_of_file(options.features, device) if options.features else ColourFeatures()
    images = np.load(options.images)["images"] if options.images else None
    results = measure(device, options.minutes, images, features, options.tiny)
    path = options.out / f"gpu-{results.date}.json"
    write_atomic(path, results.to_json() + "\n")
    say(f"\nresults: {path}")
    draw(path)
    return 0


def draw(path: Path) -> None:
    """Plot the result file if matplotlib is installed."""
    try:
        from patchloom.benchmarks.plots import plot_results
    except ImportError:
        say(f"no plots: matplotlib is not installed; python -m patchloom.benchmarks.plots {path} draws them elsewhere")
        return
    for plot in plot_results(path):
        say(f"plot: {plot}")


if __name__ == "__main__":
    sys.exit(main())
