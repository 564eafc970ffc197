"""Sampling benchmarks: `generate` and one worker of `patchloom sample`, compared with plain loops."""

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.interleaved import Work, interleave
from patchloom.benchmarks.limits import gemm_flops
from patchloom.benchmarks.plain import plain_heun
from patchloom.benchmarks.setups import same_networks, sampling_flops, song_config, untrained
from patchloom.benchmarks.training import plain_loop_findings
from patchloom.models.checkpoints import SamplingModel, load_sampling_model
from patchloom.models.generate import Sampling, generate, generate_padded
from patchloom.models.precision import one_thread
from patchloom.pipelines.sample.seeds import Seeds
from patchloom.pipelines.sample.shard_sampler import SampledShard, SeedShard, ShardSampler, ShardSamplerArgument
from patchloom.platform.compute.jobs import Job, run_job
from patchloom.platform.compute.session import ray_session
from patchloom.platform.tracking.store import store_environment

CPU = torch.device("cpu")
SAMPLING = Sampling(steps=5)
PLAIN_WANTED = 1.0
SHARD, SHARDS = 16, 7  # images per shard, and shards per round; the first shard includes the start of the worker
SMALL_SIDE, SMALL_WIDTH = 32, 16  # of the worker's network: small, so that writing files is a large part of the time


def against_plain(scale: Scale, say: Say) -> list[Finding]:
    """`generate`, compared with a plain loop and with the GEMM rate."""
    config = song_config(scale.side, scale.width, scale.blocks, dropout=0.0)
    model, plain = same_networks(config)
    seeds, shape = list(range(scale.batch)), (scale.batch, config.channels, scale.side, scale.side)

    def generate_batch() -> int:
        return len(generate(model, seeds, [-1] * len(seeds), SAMPLING))

    def plain_batch() -> int:
        return len(plain_heun(plain, torch.randn(shape), SAMPLING.steps))

    timings = interleave({"ours": generate_batch, "plain": plain_batch}, scale.rounds, 1, say)
    name = f"sampling, {SAMPLING.steps} steps of Heun, width {scale.width}, R = {scale.side}"
    return plain_loop_findings(name, timings, sampling_flops(config, SAMPLING), PLAIN_WANTED)


def ray_data_worker(scale: Scale, say: Say) -> list[Finding]:
    """One worker of `patchloom sample` without its start, compared with a loop that samples and one that also saves.

    All use one thread. The worker also hashes, writes complete files and writes notes. The images are noise, which is
    the worst case for PNG.
    """
    shards = min(SHARDS, scale.images // SHARD)
    config = song_config(min(SMALL_SIDE, scale.side), min(SMALL_WIDTH, scale.width), 1, dropout=0.0)
    with tempfile.TemporaryDirectory() as folder, ray_session(), one_thread():
        scratch = Path(folder)
        model = load_sampling_model(untrained(scratch / "model", config), "cuda" if torch.cuda.is_available() else CPU)
        worker = SampleWorker(scratch, shards)
        loop = partial(plain_loop, model, SHARD * (shards - 1))
        alternatives: dict[str, Work] = {"loop": loop, "worker": worker, "saving": partial(loop, scratch / "saved")}
        timings = interleave(alternatives, scale.rounds, 1, say)
        gemm = gemm_flops(CPU, torch.float32)
    timings.wall_rates["worker"] = worker.wall_rates[
        -scale.rounds :
    ]  # without the warm-up rounds and the start of the worker
    timings.cpu_rates["worker"] = worker.cpu_rates[-scale.rounds :]
    limit = None if torch.cuda.is_available() else gemm / sampling_flops(config, SAMPLING)
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


def plain_loop(model: SamplingModel, count: int, saved: Path | None = None) -> int:
    """Sample `count` images in batches, and save each with Pillow if `saved` is given. Returns the count."""
    for seed in range(0, count, SHARD):
        seeds = list(range(seed, seed + SHARD))
        images = generate_padded(model, seeds, [-1] * len(seeds), SHARD // 2, SAMPLING).cpu()
        if saved is not None:
            saved.mkdir(exist_ok=True)
            for number, image in zip(seeds, images, strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(saved / f"{number:06d}.png")
    return count


class BenchmarkedJob(Job[SeedShard, SampledShard]):
    """Shards of seeds without classes, sampled into a new folder."""

    title, worker, folder = "sampling", ShardSampler, None

    def __init__(self, model: Path, out: Path, shards: int) -> None:
        self.total, self.results = SHARD * shards, list[SampledShard]()
        self.argument = ShardSamplerArgument(
            str(model), str(out), store_environment(), (), SAMPLING, SHARD // 2, "png", None, None
        )

    def missing(self) -> list[SeedShard]:
        firsts = range(0, self.total, SHARD)
        return [SeedShard(f"{first:06d}", Seeds([first], [first + SHARD - 1])) for first in firsts]

    def keep(self, unit: SeedShard, result: SampledShard) -> None:
        self.results.append(result)


class SampleWorker:
    """Runs one worker and records its rates from its first finished shard to its last."""

    def __init__(self, scratch: Path, shards: int) -> None:
        self.scratch, self.shards = scratch, shards
        self.wall_rates: list[float] = []
        self.cpu_rates: list[float] = []

    def __call__(self) -> int:
        job = BenchmarkedJob(self.scratch / "model", self.scratch / f"round-{len(self.wall_rates)}", self.shards)
        with contextlib.redirect_stdout(io.StringIO()):
            run_job(job, workers=1)
        shards = sorted(job.results, key=lambda shard: shard.ended_unix_s)
        images = sum(shard.images for shard in shards[1:])
        self.wall_rates.append(images / (shards[-1].ended_unix_s - shards[0].ended_unix_s))
        self.cpu_rates.append(images / sum(shard.cpu_seconds for shard in shards[1:]))
        return images
