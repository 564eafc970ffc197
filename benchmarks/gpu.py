"""One GPU, ten minutes, no network: the paper's settings in the precisions that people use, and quality at equal time.

It needs torch, numpy and safetensors, and no installation: `make bench-gpu`, or from a checkout

    python -m patchloom.benchmarks.gpu [--images cifar.npz] [--features inception.safetensors] [--out FOLDER]

DDPM++ on 64 x 64 pixels: what the platform does on a GPU beside plain float32 without TF32, as the released code
trains on pixels. ADM on latents of 32: beside half precision without compilation, as it trains on latents. With images
(`images`, N x H x W x 3 uint8), the same few minutes of training at p = .25, .5 and 1 and the Fréchet distance of
samples over them. What does not fit into the time is left out with a word.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.benchmarks.findings import TINY, Finding, Scale, exactly, table
from patchloom.benchmarks.limits import convolution_flops
from patchloom.benchmarks.machine import describe_machine
from patchloom.benchmarks.paired import in_turns, now
from patchloom.benchmarks.plain import PlainDenoiser, PlainTraining, PlainUNet
from patchloom.benchmarks.setups import Trainer, adm_config, only, representative_steps, song_config, step_settings
from patchloom.errors import UserError
from patchloom.models.checkpoints import Model
from patchloom.models.cost import estimated_gain
from patchloom.models.features import POOL, ColourFeatures, Features, features_of_file
from patchloom.models.flops import peak_flops, training_flops
from patchloom.models.generate import Sampling, generate
from patchloom.models.metrics import frechet_distance
from patchloom.models.random_draws import RowOrder
from patchloom.models.step import HALF_PRECISIONS, Rows, set_rounding, training_step
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.platform.files.storage import make_folder, write_atomic

RESULTS_FORMAT = 1
PIXEL = Scale(rounds=3, width=128, side=64, batch=64)
LATENT = Scale(rounds=3, width=192, side=32, batch=64, blocks=3)
WANTED_SPEED, WANTED_GAIN = 5.0, 2.4
MIXED_STEPS = 10  # Eq. 5's shares at p = .5 exactly
PLAIN = "a plain loop, fp32 without TF32"
RATIOS = (0.25, 0.5, 1.0)
LOOKS = 4  # at a run's quality, evenly spaced
SAMPLES, SAMPLED_AT_ONCE, SAMPLER_STEPS = 2_000, 250, 18
COMPILING_S = 100.0  # what a graph of a large network may take

Say = Callable[[str], None]


def say(text: str) -> None:
    """One line to the person watching; `rich` may not be here."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Variant:
    """How a step computes."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False

    def on(self, device: torch.device) -> "Variant":
        """What this device can do of it: a CPU, which only tries things out, computes in float32 as it is."""
        return self if device.type == "cuda" else replace(self, precision="fp32", compiled=False)

    def trainer(self, config: dict[str, Any], method: StepSettings, device: torch.device) -> Trainer:
        """A run that computes so."""
        return Trainer(
            config, replace(method, precision=self.precision), device,
            channels_last=self.channels_last, compiled=self.compiled,
        )  # fmt: skip


FASTEST = Variant("bf16, channels last, compiled", "bf16", True, True)
PIXEL_VARIANTS = (
    Variant("fp32 without TF32"), Variant("tf32", "tf32"), Variant("bf16", "bf16"),
    Variant("bf16, channels last", "bf16", True), FASTEST,
)  # fmt: skip
LATENT_VARIANTS = (Variant("fp16", "fp16"), Variant("bf16", "bf16"), FASTEST)


@dataclass
class Session:
    """What is measured where, until when, and what was found."""

    device: torch.device
    deadline: float
    is_tiny: bool
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Until the time is up."""
        return self.deadline - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether there is time for something; says so where there is none."""
        if self.is_tiny or self.seconds_left > seconds:
            return True
        say(f"  {what} left out: {max(0.0, self.seconds_left):.0f} s are left, and it may take {seconds:.0f} s")
        return False

    def keep(self, name: str, findings: list[Finding]) -> None:
        """Note what was found, and show it."""
        self.findings[name] = findings
        say(f"\n{name}\n{table(findings)}")


def speeds(
    session: Session, name: str, config: dict[str, Any], scale: Scale, variants: tuple[Variant, ...],
    plain: PlainTraining | None = None,
) -> None:  # fmt: skip
    """Full-size steps of each variant in turns, over a plain loop or the first of them; FLOPs used; peak memory."""
    method = step_settings(scale)
    plan = plan_step(method, 0, 0)
    trainers: dict[str, Trainer] = {}
    memory: dict[str, float] = {}
    for variant in variants:
        if variant.compiled and not session.has_time(f"{name}: {variant.name}", COMPILING_S):
            continue
        say(f"  {name}: {variant.name}" + (" (compiling)" if variant.compiled else ""))
        reset_memory(session.device)
        trainer = variant.on(session.device).trainer(config, method, session.device)
        set_rounding(trainer.method.precision)
        trainer.steps([plan])
        trainers[variant.name], memory[variant.name] = trainer, peak_memory(session.device)

    def steps_of(trainer: Trainer) -> Callable[[], int]:
        def steps() -> int:
            set_rounding(trainer.method.precision)
            return trainer.steps([plan, plan])

        return steps

    def plainly() -> int:
        assert plain is not None
        set_rounding("fp32")
        for _ in range(2):
            plain.step(next(iter(trainers.values())).rows(scale.batch).image, scale.side)
        return 2 * scale.batch

    ways = {variant: steps_of(trainer) for variant, trainer in trainers.items()}
    ways |= {PLAIN: plainly} if plain is not None else {}
    turns = in_turns(ways, scale.rounds, 1)
    first, flops = PLAIN if plain is not None else variants[0].name, training_flops(config, scale.side)
    found = [] if plain is None else [Finding(PLAIN, turns.rate(PLAIN), "images/s")]
    for variant in variants:
        if variant.name in ways:
            rate = turns.rate(variant.name)
            precision = variant.on(session.device).precision
            used, peak, source = utilisation(session.device, precision, rate.median * flops)
            found.append(Finding(variant.name, rate, "images/s", peak / flops, source))
            found.append(Finding("  FLOPs used", exactly(100 * used), "%"))
            found.append(Finding("  memory at the peak", exactly(memory[variant.name]), "GiB"))
    for variant in variants:
        if variant.name in ways and variant.name != first:
            wanted = WANTED_SPEED if variant == FASTEST and plain is not None else None
            found.append(Finding(f"{variant.name} over {first}", turns.ratio(variant.name, first), "x", wanted=wanted))
    session.keep(f"{name}, full size, batch {scale.batch}", found)


def patch_gain(session: Session, name: str, config: dict[str, Any], scale: Scale, variant: Variant) -> None:
    """Counted images a second of p = .5 over p = 1, and of each size alone."""
    mixed, full = step_settings(scale, 0.5), step_settings(scale, 1.0)
    sizes = mixed.schedule.sizes
    if not session.has_time(f"{name}: p = 0.5", 30 + (COMPILING_S * len(sizes) if variant.compiled else 0)):
        return
    variant = variant.on(session.device)
    set_rounding(variant.precision)
    trainer = variant.trainer(config, mixed, session.device)

    def steps_of(method: StepSettings, steps: int) -> Callable[[], int]:
        method = replace(method, precision=variant.precision)
        plans = representative_steps(method, steps)
        return lambda: trainer.steps(plans, method)

    ways = {f"crops of {size.pixels}": steps_of(only(mixed, size.pixels), 2) for size in sizes}
    ways |= {"p = 0.5": steps_of(mixed, MIXED_STEPS), "p = 1": steps_of(only(full, scale.side), MIXED_STEPS // 2)}
    turns = in_turns(ways, scale.rounds, 1)
    gain = turns.ratio("p = 0.5", "p = 1")
    limit = estimated_gain(mixed, {size.pixels: float(size.pixels**2) for size in sizes}, 1)
    mean = mixed.schedule.mean_multiplier
    session.keep(f"{name}: what patches gain ({variant.name})", [
        *(Finding(way, turns.rate(way), "counted images/s") for way in ways),
        Finding("p = 0.5 over p = 1", gain, "x a counted image", limit.per_image, "cost as pixels", WANTED_GAIN),
        Finding("p = 0.5 over p = 1", exactly(gain.median / mean), "x an update", limit.per_update, "cost as pixels"),
    ])  # fmt: skip


def quality(session: Session, images: np.ndarray, features: Features, seconds: float) -> None:
    """Train at each p for the same seconds; the Fréchet distance of samples over that time, sampling not counted."""
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
        method = step_settings(scale, p, precision=precision, block_size=8, lr=1e-3, lr_rampup_images=20_000)
        config = song_config(side, scale.width, scale.blocks)
        trainer = Trainer(config, method, session.device, ema_halflife_images=50_000)
        curve = quality_curve(trainer, pixels, features, reference, seconds, samples)
        session.curves[f"p = {p:g}"] = curve
        last = curve[-1]
        found.append(
            Finding(f"p = {p:g}, after {seconds:.0f} s", exactly(last["distance"]), features.name, is_cost=True)
        )
        found.append(Finding("  counted images", exactly(last["images_seen"]), "images"))
        found.append(Finding("  updates", exactly(last["updates"]), "updates"))
    ceiling = frechet_distance(*(reference[half::2] for half in (0, 1)))
    found.append(Finding("one half of the images to the other", exactly(ceiling), features.name, is_cost=True))
    session.keep(f"Fréchet distance of {samples:,} samples at equal time", found)


def quality_curve(
    trainer: Trainer, pixels: Tensor, features: Features, reference: Tensor, seconds: float, samples: int
) -> list[dict[str, float]]:
    """Train for so many seconds, and look at samples of the average `LOOKS` times."""
    set_rounding(trainer.method.precision)
    order, state, method = RowOrder(len(pixels), 0), trainer.state, trainer.method
    labels = torch.full((len(pixels),), -1, device=trainer.device)
    curve: list[dict[str, float]] = []
    spent, began = 0.0, now()
    for look in range(1, LOOKS + 1):
        while spent + now() - began < seconds * look / LOOKS:
            plan = plan_step(method, state.step, state.images_seen)
            work = []
            for group in plan.share():
                rows = torch.tensor([order[crop] for crop in group.crops], device=trainer.device)
                work.append((group, Rows(pixels[rows], labels[rows])))
            training_step(state, method, plan, work, trainer.space, lambda _: None)
        spent, average = spent + now() - began, state.emas[0].module
        distance = frechet_distance(features_of(features, sampled(average, trainer, samples)), reference)
        curve.append({"seconds": spent, "distance": distance, "updates": state.step, "images_seen": state.images_seen})
        say(f"  p = {method.schedule.sizes[0].probability:g}, {spent:.0f} s, {state.step:,} updates: {distance:.3g}")
        began = now()
    return curve


def sampled(average: Any, trainer: Trainer, count: int) -> Tensor:
    """(count, 3, R, R) uint8 samples of the averaged weights, of the seeds 0, 1, ..."""
    model = Model(average, trainer.space, None, {})
    batches = []
    for first in range(0, count, SAMPLED_AT_ONCE):
        seeds = list(range(first, min(first + SAMPLED_AT_ONCE, count)))
        batches.append(generate(model, seeds, [-1] * len(seeds), Sampling(steps=SAMPLER_STEPS)))
    return torch.cat(batches)


@torch.no_grad()
def features_of(features: Features, images: Tensor) -> Tensor:
    """(N, d) features of uint8 images, a batch at a time."""
    batches = [features(images[first : first + SAMPLED_AT_ONCE])[POOL].cpu() for first in
               range(0, len(images), SAMPLED_AT_ONCE)]  # fmt: skip
    return torch.cat(batches)


def utilisation(device: torch.device, precision: str, flops_per_second: float) -> tuple[float, float, str]:
    """The share of the most FLOP/s of this precision that is used, that most, and where it is from."""
    set_rounding(precision)
    peak, source = peak_flops(device, HALF_PRECISIONS.get(precision, torch.float32))
    return flops_per_second / peak, peak, f"all FLOPs, {source}"


def reset_memory(device: torch.device) -> None:
    """Begin to watch for a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> float:
    """GiB that tensors held at most; what earlier variants still hold is among them."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def limits(session: Session) -> None:
    """What the device can do at best."""
    found = []
    for precision in ("fp32", "tf32", "bf16") if session.device.type == "cuda" else ("fp32",):
        set_rounding(precision)
        dtype = HALF_PRECISIONS.get(precision, torch.float32)
        measured = convolution_flops(session.device, dtype) / 1e12
        peak, source = peak_flops(session.device, dtype)
        name = f"fastest 3x3 convolution, {precision}"
        found.append(Finding(name, exactly(measured), "TFLOP/s", peak / 1e12, source))
    session.keep("limits", found)


def measure(
    device: torch.device, minutes: float, images: np.ndarray | None, features: Features, is_tiny: bool
) -> dict[str, Any]:
    """Everything that fits into these minutes, the most important first; gives the record."""
    session = Session(device, time.monotonic() + 60 * minutes, is_tiny)
    pixel, latent = (replace(TINY, rounds=1), replace(TINY, rounds=1)) if is_tiny else (PIXEL, LATENT)
    song = song_config(pixel.side, pixel.width, pixel.blocks, dropout=0.05)
    adm = adm_config(latent.side, 32, 1) if is_tiny else adm_config(latent.side)
    limits(session)
    plain = PlainTraining(PlainDenoiser(PlainUNet(pixel.side, 5, 3, **song["network_options"])).to(device), pixel.side)
    speeds(session, f"DDPM++ on {pixel.side} pixels", song, pixel, PIXEL_VARIANTS, plain)
    patch_gain(session, f"DDPM++ on {pixel.side} pixels", song, pixel, Variant("bf16, channels last", "bf16", True))
    speeds(session, f"ADM on latents of {latent.side}", adm, latent, LATENT_VARIANTS)
    if images is None:
        say("  quality at equal time left out: give --images FILE.npz")
    elif session.has_time("quality at equal time", 150):
        quality(session, images, features, 0.5 if is_tiny else min(100.0, (session.seconds_left - 60) / len(RATIOS)))
    if not is_tiny:
        patch_gain(session, f"DDPM++ on {pixel.side} pixels, compiled", song, pixel, FASTEST)
    return {
        "format_version": RESULTS_FORMAT, "benchmark": "gpu", "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "subjects": {name: [found.describe() for found in each] for name, each in session.findings.items()},
        "curves": session.curves, "scales": {"pixel": asdict(pixel), "latent": asdict(latent)},
    }  # fmt: skip


def main() -> int:
    """Parse, measure, keep; exit code 2 where there is no GPU."""
    parser = argparse.ArgumentParser("patchloom.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help=".npz with `images` (N, H, W, 3) uint8")
    parser.add_argument("--features", type=Path, help="Inception's weights; colours of tiles without")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tiny", action="store_true", help="on any device: shows that everything runs")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print(
            "patchloom: torch sees no CUDA device here: run this on a machine with a GPU, or with --tiny",
            file=sys.stderr,
        )
        return 2
    for path in (options.images, options.features):
        if path is not None and not path.is_file():
            print(f"patchloom: {path} is no file: give another, or none", file=sys.stderr)
            return 2
    try:
        make_folder(options.out)
    except UserError as error:
        print(f"patchloom: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = features_of_file(options.features, device) if options.features else ColourFeatures()
    images = np.load(options.images)["images"] if options.images else None
    record = measure(device, options.minutes, images, features, options.tiny)
    path = options.out / f"gpu-{record['date']}.json"
    write_atomic(path, json.dumps(record, indent=2) + "\n")
    say(f"\nkept as {path}")
    draw(path)
    return 0


def draw(path: Path) -> None:
    """Plots beside the record, where matplotlib is."""
    try:
        from patchloom.benchmarks.plots import plot_record
    except ImportError:
        say(f"no plots: matplotlib is not here; elsewhere, python -m patchloom.benchmarks.plots {path} draws them")
        return
    for plot in plot_record(path):
        say(f"look at it: {plot}")


if __name__ == "__main__":
    sys.exit(main())
