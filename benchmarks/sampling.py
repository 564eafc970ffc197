"""Sampling: `generate` beside a plain Heun loop, and one worker of `patchloom sample` beside plain loops."""

import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.limits import gemm_flops
from patchloom.benchmarks.paired import Work, in_turns
from patchloom.benchmarks.plain import PlainDenoiser, PlainUNet, plain_heun
from patchloom.benchmarks.setups import song_config
from patchloom.benchmarks.training import beside_plain
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
SHARD, SHARDS = 16, 7  # images, and how many of them a worker makes; the first is its start
SMALL_SIDE, SMALL_WIDTH = 32, 16  # of the worker's network, beside which the files weigh most
TRAINING_OVER_FORWARD = 3  # FLOPs


def against_plain(scale: Scale, say: Say) -> list[Finding]:
    """`generate` beside the same mathematics written plainly, both from fresh noise, and beside the GEMM rate."""
    config = song_config(scale.side, scale.width, scale.blocks, dropout=0.0)
    model, plain = same_networks(config)
    seeds, shape = list(range(scale.batch)), (scale.batch, config["channels"], scale.side, scale.side)

    def ours() -> int:
        return len(generate(model, seeds, [-1] * len(seeds), SAMPLING))

    def plainly() -> int:
        return len(plain_heun(plain, torch.randn(shape), SAMPLING.steps))

    turns = in_turns({"ours": ours, "plain": plainly}, scale.rounds, 1, say)
    name = f"sampling, {SAMPLING.steps} steps of Heun, width {scale.width}, R = {scale.side}"
    return beside_plain(name, turns, sampling_flops(config), PLAIN_WANTED)


def same_networks(config: dict[str, Any]) -> tuple[Model, PlainDenoiser]:
    """A model of pixels that was not trained, read as for sampling, and its plain twin with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_whole_model(untrained(Path(folder) / "model", config))
    channels = config["channels"]
    plain = PlainDenoiser(PlainUNet(config["resolution"], channels + 2, channels, **config["network_options"]))
    plain.load_state_dict(dict(model.denoiser.named_parameters()))
    return model, plain.eval().requires_grad_(False)


def sampling_flops(config: dict[str, Any]) -> float:
    """FLOPs of one image: a forward pass an evaluation of the network."""
    forward = training_flops(config, config["resolution"]) / TRAINING_OVER_FORWARD
    return SAMPLING.network_evaluations * forward


def on_ray_data(scale: Scale, say: Say) -> list[Finding]:
    """One worker of `sample` on Ray Data, its start left out, beside a loop that samples and one that saves too.

    All have one thread. Besides, the worker hashes, writes whole files and takes notes. What it makes is noise,
    which PNG compresses worst.
    """
    shards = min(SHARDS, scale.images // SHARD)
    config = song_config(min(SMALL_SIDE, scale.side), min(SMALL_WIDTH, scale.width), 1, dropout=0.0)
    with tempfile.TemporaryDirectory() as folder, ray_session(), one_thread():
        scratch = Path(folder)
        model = load_whole_model(untrained(scratch / "model", config), "cuda" if torch.cuda.is_available() else CPU)
        worker = Worker(scratch, shards)
        loop = partial(plain_loop, model, SHARD * (shards - 1))
        ways: dict[str, Work] = {"loop": loop, "worker": worker, "saving": partial(loop, scratch / "saved")}
        turns = in_turns(ways, scale.rounds, 1, say)
        gemm = gemm_flops(CPU, torch.float32)
    turns.by_clock["worker"] = worker.by_clock[-scale.rounds :]  # the warm-up and its start left out
    turns.by_core["worker"] = worker.by_core[-scale.rounds :]
    limit = None if torch.cuda.is_available() else gemm / sampling_flops(config)
    ratios = {
        f"a worker of sample {words}{core}": turns.ratio("worker", way, of_core=bool(core))
        for way, words in (("loop", "over a loop that samples"), ("saving", "over one that saves too"))
        for core in ("", ", a core's time")
    }
    return [
        *(Finding(what, ratio, "x", 1.0, "the loop itself") for what, ratio in ratios.items()),
        Finding("a worker of sample", turns.rate("worker"), "images/s", limit, "all of a thread's GEMM rate"),
        Finding("a loop that samples", turns.rate("loop"), "images/s", limit, "all of a thread's GEMM rate"),
        Finding("a loop that saves too", turns.rate("saving"), "images/s", limit, "all of a thread's GEMM rate"),
    ]


def untrained(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder with weights as they were drawn."""
    torch.manual_seed(0)
    folder.mkdir()
    card = {"name": "benchmark", "denoiser": config, "space": pixel_normalisation().describe(), "class_names": [],
            "label_dropout": 0.0, "code_version": ""}  # fmt: skip
    save_model(folder, build_denoiser(config), card)
    return folder


def plain_loop(model: Model, count: int, saved: Path | None = None) -> int:
    """Sample so many images in batches, and perhaps save each with Pillow."""
    for seed in range(0, count, SHARD):
        some = list(range(seed, seed + SHARD))
        images = generate_padded(model, some, [-1] * len(some), SHARD // 2, SAMPLING).cpu()
        if saved is not None:
            saved.mkdir(exist_ok=True)
            for number, image in zip(some, images, strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(saved / f"{number:06d}.png")
    return count


class Timed(ShardSampler):
    """A worker that says when a shard was finished; its note of it may reach the driver much later."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return super().__call__(item) | {"ended_unix_s": time.time()}


class Worker:
    """One worker on Ray Data; notes its rates from its first finished shard to its last."""

    def __init__(self, scratch: Path, shards: int) -> None:
        self.scratch, self.shards = scratch, shards
        self.by_clock: list[float] = []
        self.by_core: list[float] = []

    def __call__(self) -> int:
        rows = sorted(map_on_actors(Timed, self._job(), self._items(), 1, True, lambda made: None), key=_end_of)
        images = sum(row["images"] for row in rows[1:])
        self.by_clock.append(images / (_end_of(rows[-1]) - _end_of(rows[0])))
        self.by_core.append(images / sum(row["cpu_seconds"] for row in rows[1:]))
        return int(images)

    def _job(self) -> dict[str, Any]:
        options = {"format": "png", "shard_size": None, "batch": SHARD // 2, "outpaint": None, **asdict(SAMPLING)}
        return {"folder": str(self.scratch / f"round-{len(self.by_clock)}"), "reference": str(self.scratch / "model"),
                "options": options, "sampling": SAMPLING, "tracking": tracking_uri(), "backbones": []}  # fmt: skip

    def _items(self) -> list[dict[str, Any]]:
        return [
            {"name": f"{first:06d}", "seeds": list(range(first, first + SHARD)), "labels": [-1] * SHARD, "known": "[]"}
            for first in range(0, SHARD * self.shards, SHARD)
        ]


def _end_of(row: dict[str, Any]) -> float:
    return float(row["ended_unix_s"])
