"""Sampling benchmarks: `generate` and one worker of `patchloom sample`, compared with plain loops."""

import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.interleaved import Work, interleave
from patchloom.benchmarks.limits import gemm_flops
from patchloom.benchmarks.plain import PlainDenoiser, PlainUNet, plain_heun
from patchloom.benchmarks.setups import song_config
from patchloom.benchmarks.training import plain_loop_findings
from patchloom.models.checkpoints import Model, load_whole_model, save_model
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import training_flops
from patchloom.models.generate import Sampling, generate, generate_padded, one_thread
from patchloom.models.normalisation import pixel_normalisation
from patchloom.pipelines.sample.shard_sampler import ShardSampler
from patchloom.platform.compute.cluster import map_on_actors, ray_session
from patchloom.platform.tracking.runs import tracking_uri

CPU = torch.device("cpu")
SAMPLING = Sampling(steps=5)
PLAIN_WANTED = 1.0
SHARD, SHARDS = 16, 7  # images per shard, and shards per round; the first shard includes the start of the worker
SMALL_SIDE, SMALL_WIDTH = 32, 16  # of the worker's network: small, so that writing files is a large part of the time
TRAINING_OVER_FORWARD = 3  # FLOPs of a training step over those of a forward pass


def against_plain(scale: Scale, say: Say) -> list[Finding]:
    """`generate`, compared with a plain loop and with the GEMM rate."""
    config = song_config(scale.side, scale.width, scale.blocks, dropout=0.0)
    model, plain = same_networks(config)
    seeds, shape = list(range(scale.batch)), (scale.batch, config["channels"], scale.side, scale.side)

    def generate_batch() -> int:
        return len(generate(model, seeds, [-1] * len(seeds), SAMPLING))

    def plain_batch() -> int:
        return len(plain_heun(plain, torch.randn(shape), SAMPLING.steps))

    timings = interleave({"ours": generate_batch, "plain": plain_batch}, scale.rounds, 1, say)
    name = f"sampling, {SAMPLING.steps} steps of Heun, width {scale.width}, R = {scale.side}"
    return plain_loop_findings(name, timings, sampling_flops(config), PLAIN_WANTED)


def same_networks(config: dict[str, Any]) -> tuple[Model, PlainDenoiser]:
    """An untrained pixel model as `sample` loads it, and the plain denoiser with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_whole_model(untrained(Path(folder) / "model", config))
    channels = config["channels"]
    plain = PlainDenoiser(PlainUNet(config["resolution"], channels + 2, channels, **config["network_options"]))
    plain.load_state_dict(dict(model.denoiser.named_parameters()))
    return model, plain.eval().requires_grad_(False)


def sampling_flops(config: dict[str, Any]) -> float:
    """FLOPs per image: one forward pass per evaluation of the network."""
    forward = training_flops(config, config["resolution"]) / TRAINING_OVER_FORWARD
    return SAMPLING.network_evaluations * forward


def ray_data_worker(scale: Scale, say: Say) -> list[Finding]:
    """One worker of `patchloom sample` without its start, compared with a loop that samples and one that also saves.

    All use one thread. The worker also hashes, writes complete files and writes notes. The images are noise, which is
    the worst case for PNG.
    """
    shards = min(SHARDS, scale.images // SHARD)
    config = song_config(min(SMALL_SIDE, scale.side), min(SMALL_WIDTH, scale.width), 1, dropout=0.0)
    with tempfile.TemporaryDirectory() as folder, ray_session(), one_thread():
        scratch = Path(folder)
        model = load_whole_model(untrained(scratch / "model", config), "cuda" if torch.cuda.is_available() else CPU)
        worker = SampleWorker(scratch, shards)
        loop = partial(plain_loop, model, SHARD * (shards - 1))
        alternatives: dict[str, Work] = {"loop": loop, "worker": worker, "saving": partial(loop, scratch / "saved")}
        timings = interleave(alternatives, scale.rounds, 1, say)
        gemm = gemm_flops(CPU, torch.float32)
    timings.wall_rates["worker"] = worker.wall_rates[
        -scale.rounds :
    ]  # without the warm-up rounds and the start of the worker
    timings.cpu_rates["worker"] = worker.cpu_rates[-scale.rounds :]
    limit = None if torch.cuda.is_available() else gemm / sampling_flops(config)
    ratios = {
        f"a worker of sample over {loop}{suffix}": timings.ratio("worker", name, cpu_time=bool(suffix))
        for name, loop in (("loop", "a loop that samples"), ("saving", "a loop that also saves"))
        for suffix in ("", ", CPU time")
    }
    return [
        *(Finding(what, ratio, "x", 1.0, "the loop") for what, ratio in ratios.items()),
        Finding("a worker of sample", timings.rate("worker"), "images/s", limit, "at the GEMM rate of a thread"),
        Finding("a loop that samples", timings.rate("loop"), "images/s", limit, "at the GEMM rate of a thread"),
        Finding("a loop that also saves", timings.rate("saving"), "images/s", limit, "at the GEMM rate of a thread"),
    ]


def untrained(folder: Path, config: dict[str, Any]) -> Path:
    """Write a model folder with random weights. Returns its path."""
    torch.manual_seed(0)
    folder.mkdir()
    card = {"name": "benchmark", "denoiser": config, "space": pixel_normalisation().describe(), "class_names": [],
            "label_dropout": 0.0, "code_version": ""}  # fmt: skip
    save_model(folder, build_denoiser(config), card)
    return folder


def plain_loop(model: Model, count: int, saved: Path | None = None) -> int:
    """Sample `count` images in batches, and save each with Pillow if `saved` is given. Returns the count."""
    for seed in range(0, count, SHARD):
        seeds = list(range(seed, seed + SHARD))
        images = generate_padded(model, seeds, [-1] * len(seeds), SHARD // 2, SAMPLING).cpu()
        if saved is not None:
            saved.mkdir(exist_ok=True)
            for number, image in zip(seeds, images, strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(saved / f"{number:06d}.png")
    return count


class TimedShardSampler(ShardSampler):
    """A worker that records when a shard was finished; the driver may get the row much later."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return super().__call__(item) | {"ended_unix_s": time.time()}


class SampleWorker:
    """Runs one worker and records its rates from its first finished shard to its last."""

    def __init__(self, scratch: Path, shards: int) -> None:
        self.scratch, self.shards = scratch, shards
        self.wall_rates: list[float] = []
        self.cpu_rates: list[float] = []

    def __call__(self) -> int:
        rows = sorted(
            map_on_actors(TimedShardSampler, self._job(), self._items(), 1, True, lambda made: None), key=_end_of
        )
        images = sum(row["images"] for row in rows[1:])
        self.wall_rates.append(images / (_end_of(rows[-1]) - _end_of(rows[0])))
        self.cpu_rates.append(images / sum(row["cpu_seconds"] for row in rows[1:]))
        return int(images)

    def _job(self) -> dict[str, Any]:
        options = {"format": "png", "shard_size": None, "batch": SHARD // 2, "outpaint": None, **asdict(SAMPLING)}
        return {"folder": str(self.scratch / f"round-{len(self.wall_rates)}"), "reference": str(self.scratch / "model"),
                "options": options, "sampling": SAMPLING, "tracking": tracking_uri(), "backbones": []}  # fmt: skip

    def _items(self) -> list[dict[str, Any]]:
        return [
            {"name": f"{first:06d}", "seeds": list(range(first, first + SHARD)), "labels": [-1] * SHARD, "known": "[]"}
            for first in range(0, SHARD * self.shards, SHARD)
        ]


def _end_of(row: dict[str, Any]) -> float:
    return float(row["ended_unix_s"])
