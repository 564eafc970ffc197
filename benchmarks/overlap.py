"""Overlap: how much of a slow all-reduce the backward pass hides, on two gloo workers of one thread each.

The gradients go through a link that sleeps as long as a slow network would send, and then adds them with gloo. A step
with all its sums takes `compute + reduce` if nothing overlaps. The hidden part is compared with what could be hidden.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread
from patchloom.benchmarks.setups import Trainer, song_config, step_settings
from patchloom.benchmarks.workers import free_port
from patchloom.models.gradients import FLOAT_BYTES, LEAST_BUCKET_BYTES, Gradients, StartSum
from patchloom.models.random_draws import CropBatch
from patchloom.models.step import crop_losses, training_step
from patchloom.models.step_plan import plan_step
from patchloom.platform.compute.machine import keep_freed_memory

WORKERS, BATCH_OF_WORKER = 2, 8
STEPS = 4  # per round and alternative
WANTED = 0.5


class SlowLink:
    """Sums tensors over the workers one after the other, as fast as a network of this bandwidth."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._sender = ThreadPoolExecutor(1, "link")

    def start_sum(self, bucket: Tensor) -> Callable[[], object]:
        """Start to sum a tensor; returns a function that waits for it."""
        return self._sender.submit(self._send, bucket).result

    def close(self) -> None:
        """End the thread."""
        self._sender.shutdown()

    def _send(self, bucket: Tensor) -> None:
        time.sleep(bucket.numel() * FLOAT_BYTES / self.bytes_per_second)
        dist.all_reduce(bucket)


def slow_network(scale: Scale, say: Say) -> list[Finding]:
    """Seconds of a step, its computation and its sums, and the share of the sums that is hidden."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "timings.pt"
        say("two workers")
        spawn(_work, (scale, free_port(), str(path)), nprocs=WORKERS)
        timings: dict[str, list[float]] = torch.load(path, weights_only=True)
    ready, sizes = timings.pop("ready"), timings.pop("sizes")
    names = {"compute": "computation of a step", "backward": "  its backward pass", "reduce": "sums of the gradients",
             "step": "a step with its sums", "after": "  if summed after the backward pass"}  # fmt: skip
    found = [Finding("buckets", exact(len(sizes)), "")]
    found += [Finding(what, Spread.of(timings[name]), "s", is_cost=True) for name, what in names.items()]
    limit, limit_is = hidden_limit(ready, sizes), "each bucket sent once its gradients are there"
    hidden = _hidden_shares(timings, "step")
    found.append(Finding("hidden share of the sums", Spread.of(hidden), "", limit, limit_is, WANTED))
    return [*found, Finding("  if summed after the backward pass", Spread.of(_hidden_shares(timings, "after")), "")]


def hidden_limit(ready: list[float], sizes: list[float]) -> float:
    """The hidden share if the sums cost no computing time, and all together take as long as the backward pass.

    Args:
        ready: when each bucket has all its gradients, as a share of the backward pass.
        sizes: the sizes of the buckets, in any unit.
    """
    end = 0.0
    for start, size in zip(ready, sizes, strict=True):
        end = max(end, start) + size / sum(sizes)
    return 2 - end


def _hidden_shares(timings: dict[str, list[float]], name: str) -> list[float]:
    """(compute + reduce - step) / min(reduce, backward), by round."""
    rounds = zip(*(timings[part] for part in ("compute", "reduce", "backward", name)), strict=True)
    return [(compute + reduce - step) / min(reduce, backward) for compute, reduce, backward, step in rounds]


def _work(rank: int, scale: Scale, port: int, path: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    process = _OverlapProcess(rank, scale)
    link = SlowLink(process.bytes_per_second())
    alternatives: dict[str, Callable[[], float]] = {
        "compute": lambda: process.step_seconds(None),
        "backward": process.backward_seconds,
        "reduce": lambda: process.reduce_seconds(link),
        "step": lambda: process.step_seconds(link.start_sum),
        "after": lambda: process.step_seconds(lambda bucket: lambda: link.start_sum(bucket)()),
    }
    timings: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(-1, scale.rounds):  # the first round warms up
        for name in list(alternatives)[:: 1 if number % 2 else -1]:
            seconds = alternatives[name]()
            timings[name] += [seconds] * (number >= 0)
    ready = process.ready_shares()
    if rank == 0:
        sizes = [float(len(bucket)) for bucket in process.gradients.buckets]
        torch.save(timings | {"ready": ready, "sizes": sizes}, path)
    link.close()
    dist.destroy_process_group()


class _OverlapProcess:
    """One of the two workers. It trains on noise."""

    def __init__(self, rank: int, scale: Scale) -> None:
        settings = step_settings(replace(scale, batch=WORKERS * BATCH_OF_WORKER))
        self.trainer = Trainer(song_config(scale.side, scale.width // 2, 1, dropout=0.0), settings)
        state = self.trainer.state
        record = state.gradients.loss_and_crops.shape[:-1]
        state.gradients = Gradients(state.denoiser, record, LEAST_BUCKET_BYTES // 4)  # as many as of a large network
        self.gradients = state.gradients
        self.plan = plan_step(settings, 0, 0)
        (group,) = self.plan.share(rank, WORKERS)
        self.work = [(group, self.trainer.rows(len(group.crops)))]

    def bytes_per_second(self) -> float:
        """The bandwidth at which the sums take as long as the backward pass, the same on both workers."""
        self.backward_seconds()  # warms up
        seconds = torch.tensor([self.backward_seconds()])
        dist.broadcast(seconds, 0)
        return FLOAT_BYTES * len(self.gradients.flat) / float(seconds)

    def step_seconds(self, start_sum: StartSum | None) -> float:
        """Seconds per step with these sums; None for no sums. The workers wait for each other after every step."""
        trainer = self.trainer
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            training_step(trainer.state, trainer.settings, self.plan, self.work, trainer.normalisation, start_sum)
            dist.barrier()
        return (time.perf_counter() - start) / STEPS

    def backward_seconds(self) -> float:
        """Seconds of a backward pass, while the other worker makes the same."""
        return sum(self._backward(lambda _: None) for _ in range(STEPS)) / STEPS

    def ready_shares(self) -> list[float]:
        """When each bucket has all its gradients, as a share of the backward pass; medians."""
        shares = []
        for _ in range(STEPS):
            times: list[float] = []

            def note(_: Tensor, times: list[float] = times) -> None:
                times.append(time.perf_counter())

            seconds, end = self._backward(note), time.perf_counter()
            shares.append([1 - (end - moment) / seconds for moment in times])
        return [median(of_bucket) for of_bucket in zip(*shares, strict=True)]

    def _backward(self, start_sum: StartSum) -> float:
        trainer, (group, rows) = self.trainer, self.work[0]
        shape = (self.plan.step, group.blocks, self.plan.block_size, trainer.channels, trainer.resolution)
        draws = trainer.settings.random.crops(CropBatch(*shape, group.size.pixels, False, trainer.device))
        losses, _ = crop_losses(
            trainer.denoiser, rows, draws, group.size.pixels, trainer.settings, trainer.normalisation
        )  # fmt: skip
        dist.barrier()
        start = time.perf_counter()
        with self.gradients.summed(start_sum):
            losses.mean().backward()
        return time.perf_counter() - start

    def reduce_seconds(self, link: SlowLink) -> float:
        """Seconds of the sums of all buckets, without computation."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            for wait in [link.start_sum(bucket) for bucket in self.gradients.buckets]:
                wait()
            dist.barrier()
        return (time.perf_counter() - start) / STEPS
