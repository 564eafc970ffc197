"""Worker benchmarks: steps of 1, 2 and 4 workers for each draw of patch sizes, measured and estimated.

All settings run interleaved in four gloo processes of one thread each; a process that a setting does not use waits. The
steps of a setting are the first of its run that together have exactly the shares of Eq. 5, where that is possible.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread
from patchloom.benchmarks.setups import Trainer, only, representative_steps, song_config, step_settings
from patchloom.benchmarks.training import gains
from patchloom.models.cost import estimated_gain
from patchloom.models.scaling import Workers, step_seconds
from patchloom.models.step import training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step
from patchloom.platform.compute.machine import keep_freed_memory

Key = TypeVar("Key")

COUNTS = (1, 2, 4)
BATCH, P = 16, 0.5
EXACT_STEPS, STEPS = 100, 20  # for two workers, so that each pair of sizes has its share; for the others
REDUCTIONS = 10
CROP_OF = {1: "one worker", 2: "each of two workers"}  # two workers share the memory bandwidth
WANTED = {1: None, 2: 2.3, 4: None}  # the gain of `shared` over p = 1 per counted image
DRAWS = {1: ("p = 1", "shared"), 2: ("p = 1", "shared", "stratified", "independent"),
         4: ("p = 1", "shared", "stratified", "independent")}  # fmt: skip


def by_draw(scale: Scale, say: Say) -> list[Finding]:
    """Gains of patches on 1, 2 and 4 workers for each draw, and steps compared with the scaling model."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "timings.pt"
        say("four workers")
        spawn(_work, (scale, free_port(), str(path)), nprocs=max(COUNTS))
        measured = WorkerTimings(**torch.load(path, weights_only=True))
    return _findings(scale, measured)


def free_port() -> int:
    """A TCP port of this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class WorkerTimings:
    """Seconds, by round."""

    gradient_bytes: int
    crop: dict[int, dict[int, list[float]]]  # of a crop, by the number of workers and the size
    reduce: dict[int, list[float]] = field(default_factory=dict)  # of an all-reduce, by the number of workers
    step: dict[str, list[float]] = field(default_factory=dict)  # of a step, by the number of workers and the draw


def settings_by_draw(scale: Scale, count: int) -> dict[str, StepSettings]:
    """The settings that `count` workers run, by name."""
    base = step_settings(replace(scale, batch=BATCH), P)
    all_settings = {
        "p = 1": only(base, scale.side),
        "shared": base,
        "stratified": replace(base, draw="stratified"),
        "independent": replace(base, draw="independent", emulated_ranks=count),
    }
    return {name: all_settings[name] for name in DRAWS[count]}


def _plans(scale: Scale, settings: StepSettings, count: int) -> list[StepPlan]:
    if scale.rounds == 1:
        return [plan_step(settings, step, 0) for step in range(2)]
    if settings.draw == "independent" and count > 2:  # too many combinations for exact shares
        return [plan_step(settings, step, 0) for step in range(2 * STEPS)]
    return representative_steps(settings, EXACT_STEPS if count == 2 else STEPS)


def _work(rank: int, scale: Scale, port: int, path: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=max(COUNTS))
    groups = {count: dist.new_group(list(range(count))) for count in COUNTS}
    process = _WorkerProcess(rank, scale, groups)
    measured = WorkerTimings(process.gradient_bytes, {1: {}, 2: {}})
    for number in range(-1, scale.rounds):  # the first round warms up
        for size in process.trainer.settings.schedule.sizes:
            settings = only(process.trainer.settings, size.pixels)
            for count, crop_seconds in measured.crop.items():
                seconds = process.time_steps(count, settings, [plan_step(settings, 0, 0)], is_joint=False)
                _record(crop_seconds, size.pixels, seconds * count / (BATCH * size.batch_multiplier), number)
        for count in COUNTS:
            _record(measured.reduce, count, process.time_reduction(count), number)
            for name, settings in settings_by_draw(scale, count).items():
                plans = process.plans[count, name][max(number, 0) :: scale.rounds]
                seconds = process.time_steps(count, settings, plans) / len(plans)
                _record(measured.step, f"{count} {name}", seconds, number)
    if rank == 0:
        torch.save(vars(measured), path)
    dist.destroy_process_group()


def _record(values: dict[Key, list[float]], key: Key, value: float, number: int) -> None:
    if number >= 0:
        values.setdefault(key, []).append(value)


class _WorkerProcess:
    """One of the four processes. It trains for settings that use it and waits during the others."""

    def __init__(self, rank: int, scale: Scale, groups: dict[int, dist.ProcessGroup]) -> None:
        self.rank, self.groups = rank, groups
        config = song_config(scale.side, scale.width // 2, 1, dropout=0.0)
        self.trainer = Trainer(config, step_settings(replace(scale, batch=BATCH), P))
        self.gradient_bytes = self.trainer.state.gradients.flat.numel() * 4
        self.plans = {
            (count, name): _plans(scale, settings, count)
            for count in COUNTS
            for name, settings in settings_by_draw(scale, count).items()
        }

    def time_steps(self, count: int, settings: StepSettings, plans: list[StepPlan], is_joint: bool = True) -> float:
        """Seconds of these steps on the first `count` workers; `is_joint` sums their gradients."""
        trainer = self.trainer
        own_plans = plans if self.rank < count else []
        work = [
            [(group, trainer.rows(len(group.crops))) for group in plan.share(self.rank, count)] for plan in own_plans
        ]

        def start_sum(bucket: Tensor) -> Callable[[], object]:
            wait: Callable[[], object] = dist.all_reduce(bucket, group=self.groups[count], async_op=True).wait
            return wait

        dist.barrier()
        start = time.perf_counter()
        for plan, groups in zip(own_plans, work, strict=True):
            training_step(
                trainer.state,
                settings,
                plan,
                groups,
                trainer.normalisation,
                start_sum if is_joint and count > 1 else None,
            )
        dist.barrier()
        return time.perf_counter() - start

    def time_reduction(self, count: int) -> float:
        """Seconds of one all-reduce of the gradients."""
        flat = torch.zeros(self.gradient_bytes // 4)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(REDUCTIONS if self.rank < count else 0):
            dist.all_reduce(flat, group=self.groups[count])
        dist.barrier()
        return (time.perf_counter() - start) / REDUCTIONS


def _findings(scale: Scale, measured: WorkerTimings) -> list[Finding]:
    base = step_settings(replace(scale, batch=BATCH), P)
    crop = {CROP_OF[count]: {pixels: Spread.of(seconds) for pixels, seconds in measured.crop[count].items()}
            for count in measured.crop}  # fmt: skip
    gradient_bytes = measured.gradient_bytes
    found = [Finding(f"a crop of {pixels} pixels, {who}", spread, "s")
           for who, spreads in crop.items() for pixels, spread in spreads.items()]  # fmt: skip
    pair = Spread.of(measured.reduce[2])
    found.append(Finding("gradients", exact(gradient_bytes), "bytes"))
    found.append(Finding("an all-reduce of two workers", pair, "s"))
    pixels_cost = {size.pixels: float(size.pixels**2) for size in base.schedule.sizes}
    for count in COUNTS:
        full = measured.step[f"{count} p = 1"]
        costs = {pixels: spread.median for pixels, spread in crop[CROP_OF[min(count, 2)]].items()}
        for name, settings in settings_by_draw(scale, count).items():
            seconds = measured.step[f"{count} {name}"]
            setting = f"{count} worker{'s' if count > 1 else ''}, {name}"
            estimated = estimated_step(settings, count, os.cpu_count() or 1, costs, gradient_bytes, pair.median)
            found.append(Finding(f"a step of {setting}", Spread.of(seconds), "s"))
            found.append(Finding("  estimated", exact(estimated), "s"))
            if name != "p = 1":
                ratio = Spread.of([
                    one / two * settings.schedule.mean_multiplier for one, two in zip(full, seconds, strict=True)
                ])  # fmt: skip
                limit = estimated_gain(settings, pixels_cost, count)
                found += gains(
                    f"gain of {setting}", ratio, settings, limit, WANTED[count] if name == "shared" else None
                )
    return found


def estimated_step(
    settings: StepSettings,
    count: int,
    cpus: int,
    seconds_of_crop: dict[int, float],
    gradient_bytes: int,
    reduce_s: float,
) -> float:
    """Seconds per step as `models/scaling.py` estimates them.

    Args:
        settings: the settings of the run.
        count: the number of workers.
        cpus: the number of cores.
        seconds_of_crop: seconds per crop, by size.
        gradient_bytes: bytes of an all-reduce.
        reduce_s: seconds of an all-reduce of two workers, which sends the gradients once each way.
    """
    workers = Workers(count, gradient_bytes / reduce_s, processors=min(count, cpus))
    return step_seconds(settings.schedule, settings.draw, BATCH // count, seconds_of_crop, gradient_bytes, workers)
