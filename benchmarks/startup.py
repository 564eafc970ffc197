"""Startup benchmarks: the seconds that commands need to start, each in a new process."""

import contextlib
import io
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.interleaved import Spread, Work, interleave, now
from patchloom.benchmarks.setups import BLOCK, DROPOUT, song_config
from patchloom.pipelines.prepare import prepare
from patchloom.platform.recipe import Recipe, check_recipe, recipe_yaml
from patchloom.platform.records.run import PROGRESS_FILE

IMAGES = 64
LONG_RUN_IMAGES = 1_000_000  # the run is killed long before
HELP_WANTED_S, DRY_RUN_WANTED_S, FIRST_STEP_WANTED_S = 0.5, 5.0, 10.0
HELD_OUT = 0.2  # of the images
POLL_EVERY_S = 0.005
TIMEOUT_S = 300.0


def commands(scale: Scale, say: Say) -> list[Finding]:
    """Seconds of `patchloom --help`, of a dry run, and of a run until its first progress line."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.create(Path(folder), scale)
        recipe = workspace.write_recipe("recipe", small_recipe(scale))
        first_step = FirstStep(workspace, recipe)
        alternatives: dict[str, Work] = {
            "python": lambda: workspace.run(sys.executable, "-c", "pass"),
            "torch": lambda: workspace.run(sys.executable, "-c", "import torch"),
            "help": lambda: workspace.run(*patchloom("--help")),
            "dry run": lambda: workspace.run(*patchloom("train", recipe, "--data", workspace.dataset, "--dry-run")),
            "first step": first_step,
        }
        timings = interleave(alternatives, scale.rounds, 1, say)
    python, torch = timings.seconds("python"), timings.seconds("torch")
    first = Spread.of(first_step.seconds[-scale.rounds :])  # without the time to kill the run
    bare, imported = (python.median, "python -c pass"), (torch.median, 'python -c "import torch"')
    return [
        Finding("patchloom --help", timings.seconds("help"), "s", *bare, HELP_WANTED_S, True),
        Finding("patchloom train --dry-run", timings.seconds("dry run"), "s", *imported, DRY_RUN_WANTED_S, True),
        Finding("patchloom train --workers 0, until the first step", first, "s", *imported, FIRST_STEP_WANTED_S, True),
        Finding("python -c pass", python, "s", is_cost=True),
        Finding('python -c "import torch"', torch, "s", is_cost=True),
    ]


@dataclass(frozen=True)
class Workspace:
    """A folder with a small dataset, recipes and its own MLflow store, in which commands run."""

    folder: Path

    @staticmethod
    def create(folder: Path, scale: Scale) -> "Workspace":
        """Make one with a prepared dataset of noise."""
        workspace = Workspace(folder)
        generator = np.random.default_rng(0)
        (folder / "images").mkdir()
        for number in range(IMAGES):
            pixels = generator.integers(0, 256, (scale.side, scale.side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(str(folder / "images"), workspace.dataset, resolution=scale.side, autoencoder="none", workers=0)
        return workspace

    @property
    def dataset(self) -> str:
        return str(self.folder / "dataset")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}"}

    def write_recipe(self, name: str, recipe: Recipe) -> str:
        """Write a recipe. Returns the path of its file."""
        path = self.folder / f"{name}.yaml"
        path.write_text(recipe_yaml(recipe))
        return str(path)

    @contextlib.contextmanager
    def running(self, *command: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a command in the background and kill it at the end of the block.

        Raises:
            RuntimeError: the command has failed by then.
        """
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment | environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                yield process
            finally:
                code = process.poll()
                process.kill()
                process.wait()
            if code:
                log.seek(0)
                output = log.read().decode(errors="replace").strip()
                raise RuntimeError(f"{' '.join(command)} failed with exit code {code}: {output}")

    def run(self, *command: str, **environment: str) -> int:
        """Run a command to its end. Returns 1, its units of work."""
        with self.running(*command, **environment) as process:
            process.wait()
        return 1


def patchloom(*arguments: str) -> Sequence[str]:
    """The command line: the console script if it is installed, else its module."""
    script = Path(sys.executable).with_name("patchloom")
    return (
        [str(script), *arguments] if script.is_file() else [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
    )


def small_recipe(scale: Scale, **changes: Any) -> Recipe:
    """A recipe on pixels that writes a progress line after every step; `changes` override keys of `train`."""
    options = song_config(scale.side, scale.width, scale.blocks).network_options
    train = {"images": LONG_RUN_IMAGES, "batch_size": scale.batch, "block_size": BLOCK,
             "checkpoint_every_images": LONG_RUN_IMAGES, "log_every_images": scale.batch}  # fmt: skip
    return check_recipe({
        "name": "benchmark",
        "data": {"held_out_fraction": HELD_OUT},
        "model": {**options, "dropout": DROPOUT},
        "optimizer": {"lr_rampup_images": 0},
        "train": train | changes,
        "preview": {"every_images": 0},
    })  # fmt: skip


class FirstStep:
    """Runs `train --workers 0` into a new folder, kills it after its first step and records the seconds."""

    def __init__(self, workspace: Workspace, recipe: str) -> None:
        self.workspace, self.recipe = workspace, recipe
        self.seconds: list[float] = []
        self._names = (f"run-{number}" for number in itertools.count())

    def __call__(self) -> int:
        run, start = self.workspace.folder / next(self._names), now()
        command = patchloom("train", self.recipe, "--data", self.workspace.dataset, "--out", str(run), "--workers", "0")
        with self.workspace.running(*command) as process:
            wait_for(lambda: is_not_empty(run / PROGRESS_FILE), process)
            self.seconds.append(now() - start)
        return 1


def is_not_empty(path: Path) -> bool:
    """Whether a file exists and has content."""
    return path.is_file() and path.stat().st_size > 0


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Wait until a condition holds or the process has ended.

    Raises:
        RuntimeError: neither happened within `TIMEOUT_S`.
    """
    deadline = now() + TIMEOUT_S
    while not condition() and process.poll() is None:
        if now() > deadline:
            raise RuntimeError(f"a command did not get ready within {TIMEOUT_S:.0f} s")
        time.sleep(POLL_EVERY_S)
