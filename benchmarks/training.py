"""Training: a step's images a second by patch size, against its limit and a plain loop, and where its time goes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchloom.benchmarks.findings import Finding, Say, Scale, exactly
from patchloom.benchmarks.limits import convolution_flops, gemm_flops
from patchloom.benchmarks.paired import Spread, Turns, in_turns, now
from patchloom.benchmarks.plain import PlainDenoiser, PlainTraining, PlainUNet
from patchloom.benchmarks.setups import Trainer, only, representative_steps, song_config, step_settings
from patchloom.models.cost import Gain, estimated_gain
from patchloom.models.flops import training_flops
from patchloom.models.loss import denoising_loss
from patchloom.models.noise import training_sigmas
from patchloom.models.patches import crop, offsets
from patchloom.models.random_draws import RandomDraws, draw_block, join
from patchloom.models.step import Rows, seeded_dropout
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.platform.dataset.prepared import Dataset, write_shard
from patchloom.platform.files.storage import file_sha256

CPU = torch.device("cpu")
MIXED_STEPS = 10  # 5 full, 3 half and 2 quarter: Eq. 5's shares at p = .5 exactly
STEP_WANTED, GAIN_WANTED = 1.05, 2.4


def against_plain(scale: Scale, say: Say) -> list[Finding]:
    """A training step at full size beside the same mathematics written plainly, and beside the GEMM rate."""
    config = song_config(scale.side, scale.width, scale.blocks)
    trainer = Trainer(config, step_settings(scale))
    options = config["network_options"]
    plain = PlainTraining(PlainDenoiser(PlainUNet(scale.side, 5, 3, **options)).train(), scale.side)
    plan = plan_step(trainer.method, 0, 0)

    def plainly() -> int:
        plain.step(trainer.rows(scale.batch).image, scale.side)
        return scale.batch

    turns = in_turns({"ours": lambda: trainer.steps([plan]), "plain": plainly}, 2 * scale.rounds, 2, say)
    name = f"training step, width {scale.width}, R = {scale.side}"
    return beside_plain(name, turns, training_flops(config, scale.side), STEP_WANTED)


def beside_plain(name: str, turns: Turns, flops: float, wanted: float) -> list[Finding]:
    """What turns of `ours` and `plain` came to, of so many FLOPs an image, beside the rates of GEMM and convolution."""
    gemm, convolution = gemm_flops(CPU, torch.float32), convolution_flops(CPU, torch.float32)
    return [
        Finding(f"{name}: over a plain loop", turns.ratio("ours", "plain"), "x", wanted=wanted),
        Finding(f"{name}: over it, a core's time", turns.ratio("ours", "plain", of_core=True), "x"),
        Finding(name, turns.rate("ours"), "images/s", gemm / flops, "all of the GEMM rate"),
        Finding(f"{name}, plainly", turns.rate("plain"), "images/s", gemm / flops, "all of the GEMM rate"),
        Finding("FLOPs used of the GEMM rate", _scaled(turns.rate("ours"), 100 * flops / gemm), "%",
                100 * convolution / gemm, "the fastest 3x3 convolution"),
    ]  # fmt: skip


def by_size(scale: Scale, say: Say) -> list[Finding]:
    """Counted images a second of each patch size and of p = .5; what patches gain, a counted image and an update."""
    config = song_config(scale.side, scale.width, scale.blocks)
    mixed, full = step_settings(scale, 0.5), step_settings(scale, 1.0)
    trainer = Trainer(config, mixed)
    ways: dict[str, Callable[[], int]] = {}
    for size in mixed.schedule.sizes:
        ways[str(size.pixels)] = _steps_of(trainer, only(mixed, size.pixels), 2)
    ways["p = 0.5"] = _steps_of(trainer, mixed, MIXED_STEPS)
    ways["p = 1"] = _steps_of(trainer, only(full, scale.side), MIXED_STEPS // 2)
    turns = in_turns(ways, scale.rounds, 1, say)
    gemm = gemm_flops(CPU, torch.float32)
    found = []
    for size in mixed.schedule.sizes:
        rate = turns.rate(str(size.pixels))
        flops = training_flops(config, size.pixels)
        found.append(Finding(f"crops of {size.pixels} pixels", rate, "images/s", gemm / flops, "all of the GEMM rate"))
        found.append(Finding("  FLOPs used of the GEMM rate", _scaled(rate, 100 * flops / gemm), "%"))
    found.append(Finding("p = 0.5", turns.rate("p = 0.5"), "counted images/s"))
    found.append(Finding("p = 1", turns.rate("p = 1"), "counted images/s"))
    limit = estimated_gain(mixed, {size.pixels: float(size.pixels**2) for size in mixed.schedule.sizes}, 1)
    found += gains("p = 0.5 over p = 1, one worker", turns.ratio("p = 0.5", "p = 1"), mixed, limit, GAIN_WANTED)
    seconds = {size.pixels: turns.seconds(str(size.pixels)).median for size in mixed.schedule.sizes}
    quarter = estimated_gain(step_settings(scale, 0.25), seconds, 1)
    return [
        *found,
        Finding("p = 0.25 over p = 1, by seconds of single sizes", exactly(quarter.per_image), "x a counted image"),
        Finding("p = 0.25 over p = 1, by seconds of single sizes", exactly(quarter.per_update), "x an update"),
    ]


def gains(
    name: str, per_image: Spread, method: StepSettings, limit: Gain, wanted: float | None = None
) -> list[Finding]:
    """What patches gain in both countings, beside what cost as pixels would allow."""
    per_update = _scaled(per_image, 1 / method.schedule.mean_multiplier)
    why = "cost as pixels"
    return [
        Finding(name, per_image, "x a counted image", limit.per_image, why, wanted),
        Finding(name, per_update, "x an update", limit.per_update, why),
    ]


def by_part(scale: Scale, say: Say) -> list[Finding]:
    """What share of a step each of its parts takes, measured one by one in turns with whole steps."""
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(scale, pixels_on_disk(Path(folder), scale))
        ways: dict[str, Callable[[], int]] = {
            "the network": parts.network, "rows from disk": parts.rows, "crops": parts.crops,
            "random numbers": parts.random_numbers, "gradients cleaned, Adam": parts.optimizer,
            "averages": parts.averages,
        }  # fmt: skip
        turns = in_turns({"step": parts.step, **ways}, 2 * scale.rounds, 1, say)
    shares = {name: turns.ratio("step", name) for name in ways}  # seconds of a part over those of the step
    found = [Finding(f"share of a step: {name}", _scaled(share, 100), "%") for name, share in shares.items()]
    network = shares["the network"]
    rest = Spread(*(100 * (1 - share) for share in (network.median, network.high, network.low)))  # the least is first
    return [*found, Finding("share of a step: all but the network", rest, "%")]


class Parts:
    """A full-size step, whole and in pieces; each takes one, on what the others left ready."""

    def __init__(self, scale: Scale, dataset: Dataset) -> None:
        self.trainer = Trainer(song_config(scale.side, scale.width, scale.blocks), step_settings(scale))
        self.side, self.dataset = scale.side, dataset
        self.plan = plan_step(self.trainer.method, 0, 0)
        (self.group,) = self.plan.share()
        self.images = self.trainer.rows(scale.batch).image
        self.luck = self._luck()
        self.clean, self.where = self._cropped()

    def step(self) -> int:
        self.trainer.steps([self.plan])
        return 1

    def network(self) -> int:
        state, method = self.trainer.state, self.trainer.method
        state.gradients.flat.zero_()
        sigma = training_sigmas(self.luck.sigma, method.noise_mean, method.noise_std)
        with seeded_dropout(state.denoiser, 0, 0, self.group.blocks, CPU):
            denoising_loss(state.denoiser, self.clean, self.luck.noise, sigma, self.where).mean().backward()
        return 1

    def rows(self) -> int:
        generator = np.random.default_rng(0)
        columns = self.dataset.rows(generator.integers(0, len(self.dataset), len(self.images)))
        Rows(torch.from_numpy(columns["image"]), torch.from_numpy(columns["label"]))
        return 1

    def crops(self) -> int:
        self._cropped()
        return 1

    def random_numbers(self) -> int:
        self._luck()
        return 1

    def optimizer(self) -> int:
        self.trainer.state.gradients.clean()
        self.trainer.state.optimizer.step()
        return 1

    def averages(self) -> int:
        for ema in self.trainer.state.emas:
            ema.update(self.trainer.denoiser, 100, len(self.images))
        return 1

    def _cropped(self) -> tuple[Tensor, Tensor]:
        patches, where = crop(self.images, offsets(self.luck.corner, self.side, self.side), self.side)
        return self.trainer.space.normalise(patches), where

    def _luck(self) -> RandomDraws:
        method, channels = self.trainer.method, self.trainer.channels
        return join([
            draw_block(method.seed, 0, block, method.block_size, channels, self.side, self.side, False, CPU)
            for block in self.group.blocks
        ])  # fmt: skip


def by_precision(scale: Scale, say: Say) -> list[Finding]:
    """Steps in bfloat16 beside float32, in turns."""
    config = song_config(scale.side, scale.width, scale.blocks)
    trainers = {name: Trainer(config, step_settings(scale, precision=name)) for name in ("fp32", "bf16")}
    plan = plan_step(trainers["fp32"].method, 0, 0)
    ways = {name: lambda one=one: one.steps([plan]) for name, one in trainers.items()}
    turns = in_turns(ways, scale.rounds, 1, say)
    return [Finding("bf16 over fp32", turns.ratio("bf16", "fp32"), "x")]


def compiled(scale: Scale, say: Say) -> list[Finding]:
    """Compiled steps at full size beside eager ones, and what compiling takes."""
    config = song_config(scale.side, scale.width, scale.blocks)
    eager, fast = Trainer(config, step_settings(scale)), Trainer(config, step_settings(scale), compiled=True)
    plan = plan_step(eager.method, 0, 0)
    say("compiling; a minute or two")
    began = now()
    fast.steps([plan])
    took = now() - began
    turns = in_turns(
        {"eager": lambda: eager.steps([plan]), "compiled": lambda: fast.steps([plan])}, scale.rounds, 1, say
    )
    images_at_most = gemm_flops(CPU, torch.float32) / training_flops(config, scale.side)
    limit = images_at_most / turns.rate("eager").median
    return [
        Finding("compiled over eager", turns.ratio("compiled", "eager"), "x", limit, "all of the GEMM rate"),
        Finding("the first step of a patch size, compiled", exactly(took), "s", is_cost=True),
    ]


def memory(scale: Scale, say: Say) -> list[Finding]:
    """What a crop of each patch size keeps for its backward pass."""
    config = song_config(scale.side, scale.width, scale.blocks)
    trainer = Trainer(config, step_settings(scale, 0.5))
    found = []
    for size in trainer.method.schedule.sizes:
        say(f"{size.pixels} pixels")
        kept = saved_bytes(trainer, only(trainer.method, size.pixels))
        crops = trainer.method.batch_size * size.batch_multiplier
        found.append(
            Finding(f"kept for backward, a crop of {size.pixels} pixels", exactly(kept / crops / 2**20), "MiB")
        )
        found.append(Finding(f"  a batch of {crops}", exactly(kept / 2**20), "MiB"))
    return found


def saved_bytes(trainer: Trainer, method: StepSettings) -> int:
    """Bytes of the tensors that a step's forward pass keeps for its backward pass, each storage once."""
    kept: dict[int, int] = {}
    owned = {each.untyped_storage().data_ptr() for each in trainer.denoiser.state_dict().values()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.steps([plan_step(method, 0, 0)], method)
    return sum(kept.values())


def pixels_on_disk(folder: Path, scale: Scale) -> Dataset:
    """Rows of uint8 noise in one memory-mapped shard, as a preparation writes them."""
    rows = 256
    images = np.random.default_rng(0).integers(0, 256, (rows, 3, scale.side, scale.side), np.uint8)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    path = folder / "shards" / "part-00000.arrow"
    write_shard(path, [f"{row:06d}" for row in range(rows)], [0] * rows, {"image": images})
    shard = {"file": f"shards/{path.name}", "rows": rows, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return Dataset(folder, {"shards": [shard], "kind": "pixels"})


def _steps_of(trainer: Trainer, method: StepSettings, steps: int) -> Callable[[], int]:
    plans = representative_steps(method, steps)
    return lambda: trainer.steps(plans, method)


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(spread.median * factor, spread.low * factor, spread.high * factor)
