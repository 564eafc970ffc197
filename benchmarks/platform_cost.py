"""Platform benchmark: the time that `patchloom train` adds to a bare step (data, logging, MLflow, Ray).

The speed of a machine drifts within a minute by more than this time. So all alternatives start, and then one at a time
runs for some seconds while the others are stopped.
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

import numpy as np
import psutil
import torch

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.interleaved import Spread
from patchloom.benchmarks.setups import Trainer, song_config, step_settings
from patchloom.models.cards import DenoiserConfig
from patchloom.models.step_plan import plan_step
from patchloom.pipelines.prepare import prepare
from patchloom.platform.compute.machine import keep_freed_memory
from patchloom.platform.recipe import Recipe, check_recipe, recipe_yaml

LINE_STEPS, WARM_UP_LINES = 10, 6  # steps per progress line; the MLflow client is imported during the first lines
TURN_LINES, ROUND_TURNS = 2, 4
ROWS = 256
WANTED = 3.0
POLL_EVERY_S, TIMEOUT_S = 0.02, 600.0
GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # a zombie stays until its parent asks for the exit code
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # as for the bare steps


def against_bare_steps(scale: Scale, say: Say) -> list[Finding]:
    """Seconds per step of `patchloom train`, in one process and on Ray, compared with bare steps in a loop.

    A bare step is `training_step` on rows in memory. The command also reads its rows and logs a line every ten steps,
    far more often than by default. All use one thread per core and keep freed memory. The network has half the width
    of the scale, so a step takes about .2 s, the shortest for which the target applies.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = _dataset(folder / "data", scale)
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe_yaml(_recipe(scale)))
        with contextlib.ExitStack() as stack:
            alternatives = {}
            for name, workers in (("bare", None), ("in one process", 0), ("on a worker of Ray Train", 1)):
                say(f"starting: {name}")
                run = folder / f"run-{workers}"
                paused = _bare(scale, run) if workers is None else _command(recipe, dataset, run, workers)
                alternatives[name] = stack.enter_context(paused)
            seconds: dict[str, list[float]] = {name: [] for name in alternatives}
            turns = ROUND_TURNS * scale.rounds
            for number in range(turns):
                say(f"turn {number + 1} of {turns}")
                for name in list(alternatives)[:: 1 if number % 2 else -1]:
                    seconds[name].append(alternatives[name].measure_step())
    found = [Finding(f"a step, {name}", Spread.of(each), "s") for name, each in seconds.items()]
    for name, each in list(seconds.items())[1:]:
        added = [100 * (one / bare - 1) for one, bare in zip(each, seconds["bare"], strict=True)]
        what = f"`patchloom train` {name}: added to a bare step"
        found.append(Finding(what, Spread.of(added), "%", wanted=WANTED, is_cost=True))
    return found


@dataclass
class PausedProcess:
    """A training process (and its child processes) that is stopped except while it is measured.

    Args:
        root: the process.
        lines: the file to which it writes a line every few steps.
        log: its output, shown if it fails.
    """

    root: psutil.Process
    lines: Path
    log: Path | None = None
    _stopped: list[psutil.Process] = field(default_factory=list)
    _read_bytes: int = 0
    _steps: deque[int] = field(default_factory=deque)  # of the lines that were read and not yet used

    def measure_step(self, lines: int = TURN_LINES) -> float:
        """Continue until `lines` lines follow a first one, then stop. Returns seconds per step from first to last line.

        Work that was due while the process was stopped is done before the first line.
        """
        self._read_lines()
        self._steps.clear()
        self._continue()
        first = self._next_step()
        start = time.perf_counter()
        for _ in range(lines):
            last = self._next_step()
        seconds = time.perf_counter() - start
        self._stop()
        return seconds / (last - first)

    def end(self) -> None:
        """Kill the process and its child processes."""
        self._stop()
        for process in self._stopped:
            _send(process, signal.SIGKILL)
        _wait_until(lambda: all(_state(process) in GONE for process in self._stopped))

    def _next_step(self) -> int:
        _wait_until(lambda: bool(self._steps) or self._read_lines() or self._has_ended())
        if not self._steps:
            output = self.log.read_text() if self.log is not None else ""
            raise RuntimeError(f"the measured process ended: {output.strip() or 'without output'}")
        return self._steps.popleft()

    def _read_lines(self) -> bool:
        """Read new complete lines. Returns whether there were any. It is cheap, as it runs during a measurement."""
        if not self.lines.is_file():
            return False
        with self.lines.open("rb") as file:
            file.seek(self._read_bytes)
            complete = b"".join(line for line in file if line.endswith(b"\n"))
        self._read_bytes += len(complete)
        self._steps.extend(json.loads(line)["step"] for line in complete.splitlines())
        return bool(complete)

    def _has_ended(self) -> bool:
        return _state(self.root) in GONE

    def _continue(self) -> None:
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


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _state(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


def _wait_until(condition: Callable[[], bool]) -> None:
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > TIMEOUT_S:
            raise TimeoutError(f"a process did not continue, stop or end within {TIMEOUT_S:.0f} s")
        time.sleep(POLL_EVERY_S)


@contextlib.contextmanager
def _command(recipe: Path, dataset: Path, run: Path, workers: int) -> Iterator[PausedProcess]:
    """`patchloom train`, warmed up and stopped."""
    command = [sys.executable, "-m", "patchloom.pipelines.cli", "train", str(recipe), "--data", str(dataset)]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{run.with_suffix('.db')}"}
    log = run.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--out", str(run), "--workers", str(workers)],
            env=os.environ | store | ON_THE_CPU, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    with _warm(PausedProcess(psutil.Process(process.pid), run / "progress.jsonl", log)) as paused:
        yield paused
    process.wait()


@contextlib.contextmanager
def _bare(scale: Scale, folder: Path) -> Iterator[PausedProcess]:
    """Bare steps in a new process, warmed up and stopped."""
    lines = folder.with_suffix(".jsonl")
    process = get_context("spawn").Process(
        target=_bare_steps, args=(scale, lines, torch.get_num_threads()), daemon=True
    )
    process.start()
    assert process.pid is not None
    with _warm(PausedProcess(psutil.Process(process.pid), lines)) as paused:
        yield paused
    process.join()


@contextlib.contextmanager
def _warm(paused: PausedProcess) -> Iterator[PausedProcess]:
    """Warm a process up and stop it; kill it after the block."""
    try:
        paused.measure_step(WARM_UP_LINES)
        yield paused
    finally:
        paused.end()


def _bare_steps(scale: Scale, lines: Path, threads: int) -> None:
    """Take steps until the process is killed."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    trainer = Trainer(_network(scale), replace(step_settings(scale), block_size=scale.batch))
    for first in itertools.count(0, LINE_STEPS):
        trainer.steps([plan_step(trainer.settings, first + number, 0) for number in range(LINE_STEPS)])
        with lines.open("a") as file:
            file.write(json.dumps({"step": first + LINE_STEPS}) + "\n")


def _network(scale: Scale) -> DenoiserConfig:
    return song_config(scale.side, scale.width // 2, 1)


def _recipe(scale: Scale) -> Recipe:
    """A recipe with the steps of `_bare_steps`, and more of them than are needed."""
    options = _network(scale).network_options
    batch = scale.batch
    return check_recipe({
        "name": "benchmark",
        "model": {"network": "ddpmpp", "width": options["width"], "width_multipliers": options["width_multipliers"],
                  "blocks": 1, "attention": options["attention"], "dropout": options["dropout"]},
        "patches": {"p": 1.0},
        "ema": [{"halflife_images": 500_000}],
        "train": {"images": 10**6, "batch_size": batch, "block_size": batch, "log_every_images": LINE_STEPS * batch},
        "preview": {"every_images": 0},
    })  # fmt: skip


def _dataset(folder: Path, scale: Scale) -> Path:
    """A prepared dataset of noise."""
    images = np.random.default_rng(0).integers(0, 256, (ROWS, scale.side, scale.side, 3), np.uint8)
    np.savez(folder.with_suffix(".npz"), images=images)
    prepare(f"{folder}.npz", str(folder), resolution=scale.side, crop="none", workers=0)
    return folder
