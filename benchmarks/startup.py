"""Startup: how soon commands answer, each a process of its own, beside a bare Python and an import of torch."""

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
from patchloom.benchmarks.paired import Spread, Work, in_turns, now
from patchloom.benchmarks.setups import BLOCK, DROPOUT, song_config
from patchloom.pipelines.prepare import prepare
from patchloom.platform.recipe import Recipe, check_recipe, recipe_yaml
from patchloom.platform.tracking.runs import PROGRESS_FILE

IMAGES = 64
LONG_RUN_IMAGES = 1_000_000  # it is ended from outside
HELP_WANTED_S, DRY_RUN_WANTED_S, FIRST_STEP_WANTED_S = 0.5, 5.0, 10.0
LOOK_EVERY_S = 0.005
PATIENCE_S = 300.0


def commands(scale: Scale, say: Say) -> list[Finding]:
    """Seconds of `patchloom --help`, of a dry run, and of a run until its first step is in its progress file."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk.laid(Path(folder), scale)
        recipe = desk.write_recipe("recipe", small_recipe(scale))
        first_step = FirstStep(desk, recipe)
        ways: dict[str, Work] = {
            "python": lambda: desk.run(sys.executable, "-c", "pass"),
            "torch": lambda: desk.run(sys.executable, "-c", "import torch"),
            "help": lambda: desk.run(*patchloom("--help")),
            "dry run": lambda: desk.run(*patchloom("train", recipe, "--data", desk.dataset, "--dry-run")),
            "first step": first_step,
        }
        turns = in_turns(ways, scale.rounds, 1, say)
    python, torch = turns.seconds("python"), turns.seconds("torch")
    first = Spread.of(first_step.seconds[-scale.rounds :])  # without the end of the run
    bare, imported = (python.median, "python -c pass"), (torch.median, 'python -c "import torch"')
    return [
        Finding("patchloom --help", turns.seconds("help"), "s", *bare, HELP_WANTED_S, True),
        Finding("patchloom train --dry-run", turns.seconds("dry run"), "s", *imported, DRY_RUN_WANTED_S, True),
        Finding("patchloom train --workers 0, until its first step", first, "s", *imported, FIRST_STEP_WANTED_S, True),
        Finding("python -c pass", python, "s", is_cost=True),
        Finding('python -c "import torch"', torch, "s", is_cost=True),
    ]


@dataclass(frozen=True)
class Desk:
    """A folder to work in as a user would: a small dataset, recipes, and an MLflow store of its own."""

    folder: Path

    @staticmethod
    def laid(folder: Path, scale: Scale) -> "Desk":
        """One with images of noise, prepared."""
        desk = Desk(folder)
        generator = np.random.default_rng(0)
        (folder / "images").mkdir()
        for number in range(IMAGES):
            pixels = generator.integers(0, 256, (scale.side, scale.side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(str(folder / "images"), desk.dataset, resolution=scale.side, autoencoder="none", workers=0)
        return desk

    @property
    def dataset(self) -> str:
        return str(self.folder / "dataset")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}"}

    def write_recipe(self, name: str, recipe: Recipe) -> str:
        """The path of a recipe's file."""
        path = self.folder / f"{name}.yaml"
        path.write_text(recipe_yaml(recipe))
        return str(path)

    @contextlib.contextmanager
    def begun(self, *command: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A command at work, which is ended hard with the block; raises RuntimeError where it has failed by then."""
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
                words = log.read().decode(errors="replace").strip()
                raise RuntimeError(f"{' '.join(command)} ended with {code}: {words}")

    def run(self, *command: str, **environment: str) -> int:
        """Run a command to its end: one unit of work."""
        with self.begun(*command, **environment) as process:
            process.wait()
        return 1


def patchloom(*arguments: str) -> Sequence[str]:
    """The command line as a user calls it: the console script, or its module where the package is only on the path."""
    script = Path(sys.executable).with_name("patchloom")
    return (
        [str(script), *arguments] if script.is_file() else [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
    )


def small_recipe(scale: Scale, **changes: Any) -> Recipe:
    """A run of the measured network on pixels that writes a line after every step; `changes` of its `train`."""
    options = song_config(scale.side, scale.width, scale.blocks)["network_options"]
    train = {"images": LONG_RUN_IMAGES, "batch_size": scale.batch, "block_size": BLOCK,
             "checkpoint_every_images": LONG_RUN_IMAGES, "log_every_images": scale.batch}  # fmt: skip
    return check_recipe({
        "name": "benchmark",
        "data": {"held_out_fraction": 0.2},
        "model": options | {"dropout": DROPOUT},
        "optimizer": {"lr_rampup_images": 0},
        "train": train | changes,
        "preview": {"every_images": 0},
    })  # fmt: skip


class FirstStep:
    """Runs of `train` in one process, each into a new folder and ended after its first step; notes their seconds."""

    def __init__(self, desk: Desk, recipe: str) -> None:
        self.desk, self.recipe = desk, recipe
        self.seconds: list[float] = []
        self._names = (f"run-{number}" for number in itertools.count())

    def __call__(self) -> int:
        run, began = self.desk.folder / next(self._names), now()
        command = patchloom("train", self.recipe, "--data", self.desk.dataset, "--out", str(run), "--workers", "0")
        with self.desk.begun(*command) as process:
            wait_for(lambda: has_lines(run / PROGRESS_FILE), process)
            self.seconds.append(now() - began)
        return 1


def has_lines(path: Path) -> bool:
    """Whether something stands in a file."""
    return path.is_file() and path.stat().st_size > 0


def wait_for(happened: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Look again and again until something has happened, or the process has ended; raises RuntimeError after long."""
    deadline = now() + PATIENCE_S
    while not happened() and process.poll() is None:
        if now() > deadline:
            raise RuntimeError(f"a command did not do in {PATIENCE_S:.0f} s what was waited for")
        time.sleep(LOOK_EVERY_S)
