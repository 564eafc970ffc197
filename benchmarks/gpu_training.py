"""Training on one GPU: images per second and FLOPs by precision and crop size, memory, and the gain of patches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchloom.benchmarks.findings import Finding, Scale, exact
from patchloom.benchmarks.gpu_session import GpuSession, PeakMemory, say
from patchloom.benchmarks.interleaved import Timings, Work, interleave
from patchloom.benchmarks.limits import convolution_flops
from patchloom.benchmarks.plain import PlainDenoiser, PlainTraining, PlainUNet
from patchloom.benchmarks.setups import Trainer, only, representative_steps, step_settings
from patchloom.models.cards import DenoiserConfig
from patchloom.models.cost import estimated_gain
from patchloom.models.flops import training_flops
from patchloom.models.step import HALF_PRECISIONS, set_rounding, training_step
from patchloom.models.step_plan import StepSettings, plan_step

WANTED_SPEED, WANTED_GAIN = 5.0, 2.4
STEPS = 2  # per round
MIXED_STEPS = 10  # exactly the shares of Eq. 5 at p = .5
PLAIN = "plain loop, fp32 without TF32"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
COMPILE_S = 100.0  # expected for one graph of a large network


@dataclass(frozen=True)
class Variant:
    """How a network computes: precision, layout and compilation."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False

    def trainer(self, config: DenoiserConfig, settings: StepSettings, device: torch.device) -> Trainer:
        """A trainer with this variant; not compiled on a CPU, where that takes minutes."""
        return Trainer(
            config, replace(settings, precision=self.precision), device,
            channels_last=self.channels_last, compiled=self.compiled and device.type == "cuda",
        )  # fmt: skip


FASTEST_EAGER = Variant("bf16, channels last", "bf16", True)
FASTEST = Variant("bf16, channels last, compiled", "bf16", True, True)
PIXEL_VARIANTS = (
    Variant("fp32 without TF32"), Variant("tf32", "tf32"), Variant("bf16", "bf16"), FASTEST_EAGER, FASTEST
)  # fmt: skip
LATENT_VARIANTS = (Variant("fp16", "fp16"), Variant("bf16", "bf16"), FASTEST)


def device_limits(session: GpuSession) -> None:
    """Measure the fastest convolutions of the device."""
    found = []
    for precision in ("fp32", "tf32", "bf16") if session.device.type == "cuda" else ("fp32",):
        peak, source = session.peak(precision)
        measured = convolution_flops(session.device, HALF_PRECISIONS.get(precision, torch.float32)) / 1e12
        found.append(Finding(f"fastest 3x3 convolution, {precision}", exact(measured), "TFLOP/s", peak / 1e12, source))
    session.keep("limits", found)


def speeds(
    session: GpuSession, name: str, config: DenoiserConfig, scale: Scale, variants: tuple[Variant, ...],
    against_plain: bool = False,
) -> None:  # fmt: skip
    """Full-size steps of each variant, interleaved, compared with a plain loop or the first variant."""
    alternatives: dict[str, Work] = {}
    memory: dict[str, float] = {}
    if against_plain:
        with PeakMemory(session.device) as peak:
            alternatives[PLAIN] = plain_steps(config, scale.batch, session.device)
            alternatives[PLAIN]()
        memory[PLAIN] = peak.gib
    for variant in variants:
        if variant.compiled and not session.has_time(f"{name}: {variant.name}", COMPILE_S):
            continue
        say(f"  {variant.name}" + (" (compiling)" if variant.compiled else ""))
        with PeakMemory(session.device) as peak:
            trainer = variant.trainer(config, step_settings(scale), session.device)
            alternatives[variant.name] = steps_of(trainer, trainer.settings, STEPS)
            alternatives[variant.name]()
        memory[variant.name] = peak.gib
    timings = interleave(alternatives, scale.rounds, 0)
    session.keep(
        f"{name}, full size, batch {scale.batch}",
        _speed_findings(session, timings, training_flops(config, scale.side), variants, memory),
    )


def _speed_findings(
    session: GpuSession, timings: Timings, flops: float, variants: tuple[Variant, ...], memory: Mapping[str, float]
) -> list[Finding]:
    """The rate and memory of each alternative, and how many times as fast as the first one it is."""
    precisions = {PLAIN: "fp32"} | {variant.name: variant.precision for variant in variants}
    found: list[Finding] = []
    for name in timings.wall_rates:
        found += session.rate(name, timings.rate(name), flops, precisions[name])
        found.append(Finding(f"peak memory of {name}", exact(memory[name]), "GiB", is_cost=True))
    first, *others = timings.wall_rates
    for name in others:
        wanted = WANTED_SPEED if name == FASTEST.name and first == PLAIN and not session.is_tiny else None
        found.append(Finding(f"{name} over {first}", timings.ratio(name, first), "x", wanted=wanted))
    return found


def steps_of(trainer: Trainer, settings: StepSettings, steps: int) -> Callable[[], int]:
    """Steps with exactly the expected shares of crop sizes, which return the number of counted crops."""
    plans = representative_steps(settings, steps)

    def train() -> int:
        set_rounding(settings.precision)
        return trainer.steps(plans, settings)

    return train


def noise_images(config: DenoiserConfig, batch: int, device: torch.device) -> Tensor:
    """(B, C, R, R) uint8 noise."""
    shape = (batch, config.channels, config.resolution, config.resolution)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def plain_steps(config: DenoiserConfig, batch: int, device: torch.device, steps: int = STEPS) -> Callable[[], int]:
    """Full-size steps of a plain loop, as the released code trains on pixels: float32 without TF32."""
    network = PlainUNet(config.resolution, config.channels + 2, config.channels, **config.network_options)
    training = PlainTraining(PlainDenoiser(network).to(device).train(), config.resolution)
    images = noise_images(config, batch, device)

    def train() -> int:
        set_rounding("fp32")
        for _ in range(steps):
            training.step(images, config.resolution)
        return steps * batch

    return train


def flops_by_size(session: GpuSession, name: str, config: DenoiserConfig, scale: Scale) -> None:
    """Crops per second of each size in each precision, and their FLOPs as a share of the peak."""
    found = []
    for precision in PRECISIONS:
        variant = Variant(precision, precision, channels_last=True)
        trainer = variant.trainer(config, step_settings(scale, 0.5), session.device)
        sizes = [size.pixels for size in trainer.settings.schedule.sizes]
        alternatives = {str(pixels): steps_of(trainer, only(trainer.settings, pixels), STEPS)
                        for pixels in sizes}  # fmt: skip
        timings = interleave(alternatives, scale.rounds, 1)
        for pixels in sizes:
            what = f"crops of {pixels}, {precision}"
            found += session.rate(what, timings.rate(str(pixels)), training_flops(config, pixels), precision)
    session.keep(f"{name}, by crop size and precision, channels last", found)


def patch_gain(session: GpuSession, name: str, config: DenoiserConfig, scale: Scale, variant: Variant) -> None:
    """Counted images per second at p = .5 compared with p = 1."""
    trainer = variant.trainer(config, step_settings(scale, 0.5), session.device)
    mixed, full = trainer.settings, only(trainer.settings, scale.side)
    timings = interleave(
        {"p = 0.5": steps_of(trainer, mixed, MIXED_STEPS), "p = 1": steps_of(trainer, full, MIXED_STEPS // 2)},
        scale.rounds, 1,
    )  # fmt: skip
    gain = timings.ratio("p = 0.5", "p = 1")
    limit = estimated_gain(mixed, {size.pixels: float(size.pixels**2) for size in mixed.schedule.sizes}, 1)
    why = "cost proportional to pixels"
    wanted = None if session.is_tiny else WANTED_GAIN
    session.keep(f"{name}: gain of patches ({variant.name})", [
        Finding("p = 0.5", timings.rate("p = 0.5"), "counted images/s"),
        Finding("p = 1", timings.rate("p = 1"), "counted images/s"),
        Finding("p = 0.5 over p = 1", gain, "x per counted image", limit.per_image, why, wanted),
        Finding("p = 0.5 over p = 1", gain.scaled(1 / mixed.schedule.mean_multiplier), "x per update",
                limit.per_update, why),
    ])  # fmt: skip


def one_step(trainer: Trainer, batch: int) -> Callable[[], None]:
    """One full-size step whose rows are already on the device."""
    settings = replace(only(trainer.settings, trainer.resolution), batch_size=batch)
    plan = plan_step(settings, 0, 0)
    work = [(group, trainer.rows(len(group.crops))) for group in plan.share()]

    def step() -> None:
        set_rounding(settings.precision)
        training_step(trainer.state, settings, plan, work, trainer.normalisation, None)

    return step
