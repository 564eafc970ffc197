"""Platform cost: what `patchloom train` adds to bare steps (data, logging, MLflow, Ray), by the clock.

A machine's speed drifts by more in a minute than is looked for here. So all ways begin, and then one at a time goes
on for some seconds while the others are stopped, in turns.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.paired import Spread
from patchloom.benchmarks.setups import Trainer, song_config, step_settings
from patchloom.models.step_plan import plan_step
from patchloom.pipelines.prepare import prepare
from patchloom.platform.compute.machine import keep_freed_memory
from patchloom.platform.recipe import check_recipe, recipe_yaml

LINE_STEPS, WARM_UP_LINES = 10, 6  # a line each so many steps; in the first, MLflow's client is imported meanwhile
LINES_A_TURN, TURNS_A_ROUND = 2, 4
ROWS = 256
WANTED = 3.0
LOOK_EVERY_S, PATIENCE_S = 0.02, 600.0
GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # a zombie is kept by who does not ask for its exit code
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # as the bare steps


def beside_bare_steps(scale: Scale, say: Say) -> list[Finding]:
    """Seconds of a step of `patchloom train`, in this process and on Ray, over those of its bare steps in a loop.

    Bare steps are `training_step` on rows in memory; the command reads its rows and logs a line every ten steps,
    far more often than a recipe asks by default. All use as many threads as there are cores, and keep freed memory.
    The network is half the scale's width, so that a step is near the shortest, .2 s, that the limit holds for.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = _dataset(folder / "data", scale)
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe_yaml(check_recipe(_recipe(scale))))
        with contextlib.ExitStack() as stack:
            ways = {}
            for way, workers in (("bare", None), ("in one process", 0), ("on a worker of Ray Train", 1)):
                say(f"beginning: {way}")
                run = folder / f"run-{workers}"
                began = _bare(scale, run) if workers is None else _command(recipe, dataset, run, workers)
                ways[way] = stack.enter_context(began)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            turns = TURNS_A_ROUND * scale.rounds
            for number in range(turns):
                say(f"turn {number + 1} of {turns}")
                for way in list(ways)[:: 1 if number % 2 else -1]:
                    seconds[way].append(ways[way].seconds_of_a_step())
    found = [Finding(f"a step, {way}", Spread.of(each), "s") for way, each in seconds.items()]
    for way, each in list(seconds.items())[1:]:
        added = [100 * (one / bare - 1) for one, bare in zip(each, seconds["bare"], strict=True)]
        name = f"`patchloom train` {way}: added to a bare step"
        found.append(Finding(name, Spread.of(added), "%", wanted=WANTED, is_cost=True))
    return found


@dataclass
class Paused:
    """A process (and all that it started) that steps only while it is asked to; it writes a line every few steps.

    log: where it writes its last words.
    """

    root: psutil.Process
    lines: Path
    log: Path | None = None
    _stopped: list[psutil.Process] = field(default_factory=list)
    _read_bytes: int = 0
    _steps: deque[int] = field(default_factory=deque)  # of lines that were read and not yet asked for

    def seconds_of_a_step(self, lines: int = LINES_A_TURN) -> float:
        """Go on until so many lines are there after a first one, stop again, and tell from the first to the last.

        What fell due while it was stopped is done before the first.
        """
        self._look()
        self._steps.clear()
        self._go_on()
        first = self._next_step()
        began = time.perf_counter()
        for _ in range(lines):
            last = self._next_step()
        seconds = time.perf_counter() - began
        self._stop()
        return seconds / (last - first)

    def end(self) -> None:
        """Kill them all."""
        self._stop()
        for process in self._stopped:
            _send(process, signal.SIGKILL)
        _wait_until(lambda: all(_state(process) in GONE for process in self._stopped))

    def _next_step(self) -> int:
        _wait_until(lambda: bool(self._steps) or self._look() or self._has_ended())
        if not self._steps:
            words = self.log.read_text() if self.log is not None else ""
            raise RuntimeError(f"a process that was to go on has ended: {words.strip() or 'without a word'}")
        return self._steps.popleft()

    def _look(self) -> bool:
        """Read the whole lines that are new, if any; cheap, as it is done beside what is measured."""
        if not self.lines.is_file():
            return False
        with self.lines.open("rb") as file:
            file.seek(self._read_bytes)
            whole = b"".join(line for line in file if line.endswith(b"\n"))
        self._read_bytes += len(whole)
        self._steps.extend(json.loads(line)["step"] for line in whole.splitlines())
        return bool(whole)

    def _has_ended(self) -> bool:
        return _state(self.root) in GONE

    def _go_on(self) -> None:
        for process in self._stopped:
            _send(process, signal.SIGCONT)

    def _stop(self) -> None:
        self._stopped = []
        while started := [each for each in self._tree() if each not in self._stopped]:
            for process in started:
                _send(process, signal.SIGSTOP)
            self._stopped += started
            _wait_until(lambda: all(_state(process) in (psutil.STATUS_STOPPED, *GONE) for process in self._stopped))

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _send(process: psutil.Process, what: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(what)


def _state(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


def _wait_until(happened: Callable[[], bool]) -> None:
    began = time.perf_counter()
    while not happened():
        if time.perf_counter() - began > PATIENCE_S:
            raise TimeoutError(f"a process did not go on, stop or end in {PATIENCE_S:.0f} s")
        time.sleep(LOOK_EVERY_S)


@contextlib.contextmanager
def _command(recipe: Path, dataset: Path, run: Path, workers: int) -> Iterator[Paused]:
    """The real command, warm and stopped."""
    command = [sys.executable, "-m", "patchloom.pipelines.cli", "train", str(recipe), "--data", str(dataset)]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{run.with_suffix('.db')}"}
    log = run.with_suffix(".log")
    with log.open("w") as words:
        process = subprocess.Popen(
            [*command, "--out", str(run), "--workers", str(workers)],
            env=os.environ | store | ON_THE_CPU, stdin=subprocess.DEVNULL, stdout=words, stderr=words,
        )  # fmt: skip
    with _warm(Paused(psutil.Process(process.pid), run / "progress.jsonl", log)) as paused:
        yield paused
    process.wait()


@contextlib.contextmanager
def _bare(scale: Scale, folder: Path) -> Iterator[Paused]:
    """Bare steps in a process of their own, warm and stopped."""
    lines = folder.with_suffix(".jsonl")
    process = get_context("spawn").Process(
        target=_bare_steps, args=(scale, lines, torch.get_num_threads()), daemon=True
    )
    process.start()
    assert process.pid is not None
    with _warm(Paused(psutil.Process(process.pid), lines)) as paused:
        yield paused
    process.join()


@contextlib.contextmanager
def _warm(paused: Paused) -> Iterator[Paused]:
    """A process once it has warmed up, stopped; it is killed after the block."""
    try:
        paused.seconds_of_a_step(WARM_UP_LINES)
        yield paused
    finally:
        paused.end()


def _bare_steps(scale: Scale, lines: Path, threads: int) -> None:
    """Steps without end."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    trainer = Trainer(_network(scale), replace(step_settings(scale), block_size=scale.batch))
    for step in itertools.count(LINE_STEPS, LINE_STEPS):
        trainer.steps([plan_step(trainer.method, step - LINE_STEPS + one, 0) for one in range(LINE_STEPS)])
        with lines.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")


def _network(scale: Scale) -> dict[str, Any]:
    config: dict[str, Any] = song_config(scale.side, scale.width // 2, 1)
    return config


def _recipe(scale: Scale) -> dict[str, Any]:
    """The steps of `_bare_steps`, many more than are taken."""
    options = _network(scale)["network_options"]
    batch = scale.batch
    return {
        "name": "benchmark",
        "model": {"network": "ddpmpp", "width": options["width"], "width_multipliers": options["width_multipliers"],
                  "blocks": 1, "attention": options["attention"], "dropout": options["dropout"]},
        "patches": {"p": 1.0},
        "ema": [{"halflife_images": 500_000}],
        "train": {"images": 10**6, "batch_size": batch, "block_size": batch, "log_every_images": LINE_STEPS * batch},
        "preview": {"every_images": 0},
    }  # fmt: skip


def _dataset(folder: Path, scale: Scale) -> Path:
    """Images of noise, prepared as a user's are."""
    images = np.random.default_rng(0).integers(0, 256, (ROWS, scale.side, scale.side, 3), np.uint8)
    np.savez(folder.with_suffix(".npz"), images=images)
    prepare(f"{folder}.npz", str(folder), resolution=scale.side, crop="none", workers=0)
    return folder
