"""Workers: steps of one, two and four of them, how patch sizes are drawn across them, and what is foretold of both.

All settings run in one session of four gloo processes of one thread each, in turns: whoever is not of a setting waits.
The steps of a setting are the first of its run that together have Eq. 5's shares exactly where that can be.
"""

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from patchloom.benchmarks.findings import Finding, Say, Scale, exactly
from patchloom.benchmarks.paired import Spread
from patchloom.benchmarks.setups import Trainer, only, representative_steps, song_config, step_settings
from patchloom.benchmarks.training import gains
from patchloom.models.cost import estimated_gain
from patchloom.models.scaling import Workers, step_seconds
from patchloom.models.step import training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step
from patchloom.platform.compute.machine import keep_freed_memory

COUNTS = (1, 2, 4)
BATCH, P = 16, 0.5
EXACT_STEPS, STEPS = 100, 20  # of two ranks' draws, so that each pair of sizes has its share; of the others
REDUCTIONS = 10
CROP_OF = {1: "one worker", 2: "each of two workers"}  # which share the way to the memory
WANTED = {1: None, 2: 2.3, 4: None}  # the gain of `shared` over p = 1, a counted image
DRAWS = {1: ("p = 1", "shared"), 2: ("p = 1", "shared", "stratified", "independent"),
         4: ("p = 1", "shared", "stratified", "independent")}  # fmt: skip


def by_draw(scale: Scale, say: Say) -> list[Finding]:
    """Counted images a second of 1, 2 and 4 workers, by how sizes are drawn; gains; and seconds against the model."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "found.pt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        say("four workers in turns")
        spawn(_work, (scale, port, str(path)), nprocs=max(COUNTS))
        found = torch.load(path, weights_only=True)
    return _findings(scale, found)


def draws_of(scale: Scale, count: int) -> dict[str, StepSettings]:
    """The settings that so many workers run."""
    base = step_settings(replace(scale, batch=BATCH), P)
    every = {
        "p = 1": only(base, scale.side),
        "shared": base,
        "stratified": replace(base, draw="stratified"),
        "independent": replace(base, draw="independent", emulated_ranks=count),
    }
    return {name: every[name] for name in DRAWS[count]}


def _plans(scale: Scale, method: StepSettings, count: int) -> list[StepPlan]:
    if scale.rounds == 1:
        return [plan_step(method, step, 0) for step in range(2)]
    if method.draw == "independent" and count > 2:  # too many combinations to have their shares
        return [plan_step(method, step, 0) for step in range(2 * STEPS)]
    return representative_steps(method, EXACT_STEPS if count == 2 else STEPS)


def _work(rank: int, scale: Scale, port: int, path: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=max(COUNTS))
    groups = {count: dist.new_group(list(range(count))) for count in COUNTS}
    session = _Session(rank, scale, groups)
    found: dict[str, Any] = {"seconds": {}, "crop": {1: {}, 2: {}}, "reduce": {},
                             "gradient_bytes": session.gradient_bytes}  # fmt: skip
    for number in range(-1, scale.rounds):  # the first round warms up
        for size in session.trainer.method.schedule.sizes:
            method = only(session.trainer.method, size.pixels)
            for count, seconds_of in found["crop"].items():
                seconds = session.timed(count, method, [plan_step(method, 0, 0)], is_joint=False)
                _note(seconds_of, size.pixels, seconds * count / (BATCH * size.batch_multiplier), number)
        for count in COUNTS:
            _note(found["reduce"], count, session.timed_reduction(count), number)
            for name, method in draws_of(scale, count).items():
                some = session.plans[count, name][max(number, 0) :: scale.rounds]
                _note(found["seconds"], f"{count} {name}", session.timed(count, method, some) / len(some), number)
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


def _note(kept: dict[Any, list[float]], name: Any, value: float, number: int) -> None:
    if number >= 0:
        kept.setdefault(name, []).append(value)


class _Session:
    """One process of the four: it works where it belongs, and waits where it does not."""

    def __init__(self, rank: int, scale: Scale, groups: dict[int, Any]) -> None:
        self.rank, self.groups = rank, groups
        config = song_config(scale.side, scale.width // 2, 1, dropout=0.0)
        self.trainer = Trainer(config, step_settings(replace(scale, batch=BATCH), P))
        self.gradient_bytes = self.trainer.state.gradients.flat.numel() * 4
        self.plans = {
            (count, name): _plans(scale, method, count)
            for count in COUNTS
            for name, method in draws_of(scale, count).items()
        }

    def timed(self, count: int, method: StepSettings, plans: list[StepPlan], is_joint: bool = True) -> float:
        """Seconds that these steps take on the first `count` workers, which sum their gradients where `is_joint`."""
        trainer = self.trainer
        mine = plans if self.rank < count else []
        work = [[(group, trainer.rows(len(group.crops))) for group in plan.share(self.rank, count)] for plan in mine]

        def reduce(tensor: Tensor) -> None:
            if is_joint:
                dist.all_reduce(tensor, group=self.groups[count])

        dist.barrier()
        began = time.perf_counter()
        for plan, groups in zip(mine, work, strict=True):
            training_step(trainer.state, method, plan, groups, trainer.space, reduce)
        dist.barrier()
        return time.perf_counter() - began

    def timed_reduction(self, count: int) -> float:
        """Seconds of one all-reduce of the gradients."""
        flat = torch.zeros(self.gradient_bytes // 4)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(REDUCTIONS if self.rank < count else 0):
            dist.all_reduce(flat, group=self.groups[count])
        dist.barrier()
        return (time.perf_counter() - began) / REDUCTIONS


def _findings(scale: Scale, found: dict[str, Any]) -> list[Finding]:
    base = step_settings(replace(scale, batch=BATCH), P)
    crop = {CROP_OF[count]: {pixels: Spread.of(seconds) for pixels, seconds in found["crop"][count].items()}
            for count in found["crop"]}  # fmt: skip
    gradient_bytes = found["gradient_bytes"]
    out = [Finding(f"a crop of {pixels} pixels, {who}", spread, "s")
           for who, spreads in crop.items() for pixels, spread in spreads.items()]  # fmt: skip
    pair = Spread.of(found["reduce"][2])
    out.append(Finding("gradients", exactly(gradient_bytes), "bytes"))
    out.append(Finding("an all-reduce of two workers", pair, "s"))
    pixels_cost = {size.pixels: float(size.pixels**2) for size in base.schedule.sizes}
    for count in COUNTS:
        full = found["seconds"][f"{count} p = 1"]
        costs = {pixels: spread.median for pixels, spread in crop[CROP_OF[min(count, 2)]].items()}
        for name, method in draws_of(scale, count).items():
            seconds = found["seconds"][f"{count} {name}"]
            setting = f"{count} worker{'s' if count > 1 else ''}, {name}"
            foretold = foretold_step(method, count, os.cpu_count() or 1, costs, gradient_bytes, pair.median)
            out.append(Finding(f"a step of {setting}", Spread.of(seconds), "s"))
            out.append(Finding("  foretold", exactly(foretold), "s"))
            if name != "p = 1":
                ratio = Spread.of([
                    one / two * method.schedule.mean_multiplier for one, two in zip(full, seconds, strict=True)
                ])  # fmt: skip
                limit = estimated_gain(method, pixels_cost, count)
                out += gains(f"gain of {setting}", ratio, method, limit, WANTED[count] if name == "shared" else None)
    return out


def foretold_step(
    method: StepSettings, count: int, cpus: int, seconds_of_crop: dict[int, float], gradient_bytes: int, reduce_s: float
) -> float:
    """Seconds of a step of so many workers on so many cores, by `models/scaling.py`.

    reduce_s: of an all-reduce of two workers, which sends the gradients once each way.
    """
    workers = Workers(count, gradient_bytes / reduce_s, processors=min(count, cpus))
    return step_seconds(method.schedule, method.draw, BATCH // count, seconds_of_crop, gradient_bytes, workers)
