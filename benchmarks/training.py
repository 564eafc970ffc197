"""Training benchmarks: images per second by patch size, a plain loop, the parts of a step, and memory."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchloom.benchmarks.datasets import open_shards
from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread, Timings, interleave, now
from patchloom.benchmarks.limits import convolution_flops, gemm_flops
from patchloom.benchmarks.plain import PlainDenoiser, PlainTraining, PlainUNet
from patchloom.benchmarks.setups import Trainer, only, representative_steps, song_config, step_settings
from patchloom.models.cost import Gain, estimated_gain
from patchloom.models.flops import training_flops
from patchloom.models.loss import denoising_loss
from patchloom.models.noise import training_sigmas
from patchloom.models.patches import crop, offsets
from patchloom.models.random_draws import CropBatch, RandomDraws
from patchloom.models.step import StoredRows, seeded_dropout
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.platform.dataset.prepared import Dataset, write_shard

CPU = torch.device("cpu")
MIXED_STEPS = 10  # 5 full, 3 half and 2 quarter: exactly the shares of Eq. 5 at p = .5
STEP_WANTED, GAIN_WANTED = 1.05, 2.4


def against_plain(scale: Scale, say: Say) -> list[Finding]:
    """A full-size training step, compared with a plain loop and with the GEMM rate."""
    config = song_config(scale.side, scale.width, scale.blocks)
    trainer = Trainer(config, step_settings(scale))
    options = config.network_options
    plain = PlainTraining(PlainDenoiser(PlainUNet(scale.side, 5, 3, **options)).train(), scale.side)
    plan = plan_step(trainer.settings, 0, 0)

    def plain_step() -> int:
        plain.step(trainer.rows(scale.batch).image, scale.side)
        return scale.batch

    timings = interleave({"ours": lambda: trainer.steps([plan]), "plain": plain_step}, 2 * scale.rounds, 2, say)
    name = f"training step, width {scale.width}, R = {scale.side}"
    return plain_loop_findings(name, timings, training_flops(config, scale.side), STEP_WANTED)


def plain_loop_findings(name: str, timings: Timings, flops: float, wanted: float) -> list[Finding]:
    """Findings of the alternatives `ours` and `plain`, with GEMM and convolution rates as limits.

    Args:
        name: what was measured.
        timings: rates of `ours` and `plain`, in images per second.
        flops: FLOPs per image.
        wanted: target for the ratio.
    """
    gemm, convolution = gemm_flops(CPU, torch.float32), convolution_flops(CPU, torch.float32)
    return [
        Finding(f"{name}: over a plain loop", timings.ratio("ours", "plain"), "x", wanted=wanted),
        Finding(f"{name}: over a plain loop, CPU time", timings.ratio("ours", "plain", cpu_time=True), "x"),
        Finding(name, timings.rate("ours"), "images/s", gemm / flops, "at the GEMM rate"),
        Finding(f"{name}, plain loop", timings.rate("plain"), "images/s", gemm / flops, "at the GEMM rate"),
        Finding("FLOP rate as a share of the GEMM rate", timings.rate("ours").scaled(100 * flops / gemm), "%",
                100 * convolution / gemm, "the fastest 3x3 convolution"),
    ]  # fmt: skip


def by_size(scale: Scale, say: Say) -> list[Finding]:
    """Counted images per second of each patch size and of p = .5, and the gain of patches."""
    config = song_config(scale.side, scale.width, scale.blocks)
    mixed, full = step_settings(scale, 0.5), step_settings(scale, 1.0)
    trainer = Trainer(config, mixed)
    alternatives: dict[str, Callable[[], int]] = {}
    for size in mixed.schedule.sizes:
        alternatives[str(size.pixels)] = _steps_of(trainer, only(mixed, size.pixels), 2)
    alternatives["p = 0.5"] = _steps_of(trainer, mixed, MIXED_STEPS)
    alternatives["p = 1"] = _steps_of(trainer, only(full, scale.side), MIXED_STEPS // 2)
    timings = interleave(alternatives, scale.rounds, 1, say)
    gemm = gemm_flops(CPU, torch.float32)
    found = []
    for size in mixed.schedule.sizes:
        rate = timings.rate(str(size.pixels))
        flops = training_flops(config, size.pixels)
        found.append(Finding(f"crops of {size.pixels} pixels", rate, "images/s", gemm / flops, "at the GEMM rate"))
        found.append(Finding("  FLOP rate as a share of the GEMM rate", rate.scaled(100 * flops / gemm), "%"))
    found.append(Finding("p = 0.5", timings.rate("p = 0.5"), "counted images/s"))
    found.append(Finding("p = 1", timings.rate("p = 1"), "counted images/s"))
    limit = estimated_gain(mixed, {size.pixels: float(size.pixels**2) for size in mixed.schedule.sizes}, 1)
    found += gains("p = 0.5 over p = 1, one worker", timings.ratio("p = 0.5", "p = 1"), mixed, limit, GAIN_WANTED)
    seconds = {size.pixels: timings.seconds(str(size.pixels)).median for size in mixed.schedule.sizes}
    quarter = estimated_gain(step_settings(scale, 0.25), seconds, 1)
    return [
        *found,
        Finding(
            "p = 0.25 over p = 1, from the seconds of single sizes", exact(quarter.per_image), "x per counted image"
        ),
        Finding("p = 0.25 over p = 1, from the seconds of single sizes", exact(quarter.per_update), "x per update"),
    ]


def gains(
    name: str, per_image: Spread, settings: StepSettings, limit: Gain, wanted: float | None = None
) -> list[Finding]:
    """The gain of patches per counted image and per update; the limit assumes that cost is proportional to pixels."""
    per_update = per_image.scaled(1 / settings.schedule.mean_multiplier)
    why = "cost proportional to pixels"
    return [
        Finding(name, per_image, "x per counted image", limit.per_image, why, wanted),
        Finding(name, per_update, "x per update", limit.per_update, why),
    ]


def step_parts(scale: Scale, say: Say) -> list[Finding]:
    """The share of each part of a step, each interleaved with whole steps."""
    with tempfile.TemporaryDirectory() as folder:
        parts = StepParts(scale, pixels_on_disk(Path(folder), scale))
        alternatives: dict[str, Callable[[], int]] = {
            "the network": parts.network, "rows from disk": parts.rows, "crops": parts.crops,
            "random numbers": parts.random_numbers, "gradient cleaning, Adam": parts.optimizer,
            "averages": parts.averages,
        }  # fmt: skip
        timings = interleave({"step": parts.step, **alternatives}, 2 * scale.rounds, 1, say)
    shares = {
        name: timings.ratio("step", name) for name in alternatives
    }  # seconds of a part divided by those of the step
    found = [Finding(f"share of a step: {name}", share.scaled(100), "%") for name, share in shares.items()]
    network = shares["the network"]
    rest = Spread(
        *(100 * (1 - share) for share in (network.median, network.high, network.low))
    )  # low and high change places
    return [*found, Finding("share of a step: everything except the network", rest, "%")]


class StepParts:
    """A full-size step, and its parts as separate functions; each returns 1, its number of steps."""

    def __init__(self, scale: Scale, dataset: Dataset) -> None:
        self.trainer = Trainer(song_config(scale.side, scale.width, scale.blocks), step_settings(scale))
        self.side, self.dataset = scale.side, dataset
        self.plan = plan_step(self.trainer.settings, 0, 0)
        (self.group,) = self.plan.share()
        self.images = self.trainer.rows(scale.batch).image
        self.draws = self._draw()
        self.clean, self.coordinates = self._crop()

    def step(self) -> int:
        self.trainer.steps([self.plan])
        return 1

    def network(self) -> int:
        state, settings = self.trainer.state, self.trainer.settings
        state.gradients.flat.zero_()
        sigma = training_sigmas(self.draws.sigma, settings.noise_mean, settings.noise_std)
        masks = settings.random.masks(0, self.group.blocks, settings.block_size, CPU)
        with seeded_dropout(state.denoiser, masks, 0, CPU):
            denoising_loss(state.denoiser, self.clean, self.draws.noise, sigma, self.coordinates).mean().backward()
        return 1

    def rows(self) -> int:
        generator = np.random.default_rng(0)
        columns = self.dataset.rows(generator.integers(0, len(self.dataset), len(self.images)))
        StoredRows(torch.from_numpy(columns["image"]), torch.from_numpy(columns["label"]))
        return 1

    def crops(self) -> int:
        self._crop()
        return 1

    def random_numbers(self) -> int:
        self._draw()
        return 1

    def optimizer(self) -> int:
        self.trainer.state.gradients.clean()
        self.trainer.state.optimizer.step()
        return 1

    def averages(self) -> int:
        for ema in self.trainer.state.emas:
            ema.update(self.trainer.denoiser, 100, len(self.images))
        return 1

    def _crop(self) -> tuple[Tensor, Tensor]:
        patches, coordinates = crop(self.images, offsets(self.draws.corner, self.side, self.side), self.side)
        return self.trainer.normalisation.normalise(patches), coordinates

    def _draw(self) -> RandomDraws:
        settings, channels = self.trainer.settings, self.trainer.channels
        blocks, side = self.group.blocks, self.side
        return settings.random.crops(CropBatch(0, blocks, settings.block_size, channels, side, side, False, CPU))


def by_precision(scale: Scale, say: Say) -> list[Finding]:
    """Steps in bfloat16 compared with float32."""
    config = song_config(scale.side, scale.width, scale.blocks)
    trainers = {name: Trainer(config, step_settings(scale, precision=name)) for name in ("fp32", "bf16")}
    plan = plan_step(trainers["fp32"].settings, 0, 0)
    alternatives = {name: partial(trainer.steps, [plan]) for name, trainer in trainers.items()}
    timings = interleave(alternatives, scale.rounds, 1, say)
    return [Finding("bf16 over fp32", timings.ratio("bf16", "fp32"), "x")]


def compiled(scale: Scale, say: Say) -> list[Finding]:
    """Compiled full-size steps compared with eager ones, and the compilation time."""
    config = song_config(scale.side, scale.width, scale.blocks)
    eager, fast = Trainer(config, step_settings(scale)), Trainer(config, step_settings(scale), compiled=True)
    plan = plan_step(eager.settings, 0, 0)
    say("compiling; this takes a minute or two")
    start = now()
    fast.steps([plan])
    compile_seconds = now() - start
    timings = interleave(
        {"eager": lambda: eager.steps([plan]), "compiled": lambda: fast.steps([plan])}, scale.rounds, 1, say
    )
    gemm_rate = gemm_flops(CPU, torch.float32) / training_flops(config, scale.side)
    limit = gemm_rate / timings.rate("eager").median
    return [
        Finding("compiled over eager", timings.ratio("compiled", "eager"), "x", limit, "at the GEMM rate"),
        Finding("the first step of a patch size, compiled", exact(compile_seconds), "s", is_cost=True),
    ]


def memory(scale: Scale, say: Say) -> list[Finding]:
    """The memory that a crop of each patch size keeps for the backward pass."""
    config = song_config(scale.side, scale.width, scale.blocks)
    trainer = Trainer(config, step_settings(scale, 0.5))
    found = []
    for size in trainer.settings.schedule.sizes:
        say(f"{size.pixels} pixels")
        kept = saved_bytes(trainer, only(trainer.settings, size.pixels))
        crops = trainer.settings.batch_size * size.batch_multiplier
        found.append(
            Finding(f"kept for backward, per crop of {size.pixels} pixels", exact(kept / crops / 2**20), "MiB")
        )
        found.append(Finding(f"  per batch of {crops}", exact(kept / 2**20), "MiB"))
    return found


def saved_bytes(trainer: Trainer, settings: StepSettings) -> int:
    """Bytes of the tensors that the forward pass keeps for the backward pass; each storage counts once."""
    kept: dict[int, int] = {}
    owned = {each.untyped_storage().data_ptr() for each in trainer.denoiser.state_dict().values()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        trainer.steps([plan_step(settings, 0, 0)], settings)
    return sum(kept.values())


def pixels_on_disk(folder: Path, scale: Scale) -> Dataset:
    """A dataset of uint8 noise in one memory-mapped shard, as `prepare` writes it."""
    rows = 256
    images = np.random.default_rng(0).integers(0, 256, (rows, 3, scale.side, scale.side), np.uint8)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    path = folder / "shards" / "part-00000.arrow"
    shard = write_shard(path, [f"{row:06d}" for row in range(rows)], [0] * rows, {"image": images})
    return open_shards(folder, "pixels", images.shape[1:], [shard])


def _steps_of(trainer: Trainer, settings: StepSettings, steps: int) -> Callable[[], int]:
    plans = representative_steps(settings, steps)
    return lambda: trainer.steps(plans, settings)
