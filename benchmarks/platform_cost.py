"""Platform cost: what `patchloom train` adds to bare steps (data, logging, checkpoints, MLflow, Ray), by the clock."""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom.benchmarks.findings import TINY, Finding, Say, Scale
from patchloom.benchmarks.paired import Spread
from patchloom.benchmarks.setups import Trainer, method_of, song_config
from patchloom.models.plan import plan_step
from patchloom.pipelines.prepare import prepare
from patchloom.platform.recipe import check_recipe, recipe_yaml

LOG_STEPS, WARM_UP_LINES = 5, 6  # a line each so many steps; in the first, MLflow's client is imported meanwhile
STEPS, TINY_STEPS = 60, 40
MOST_ROUNDS = 3
ROWS = 256
WANTED = 3.0


def beside_bare_steps(scale: Scale, say: Say) -> list[Finding]:
    """Seconds of a step of `patchloom train`, in this process and on Ray, over those of its bare steps in a loop.

    All run as processes of their own, one after the other, in turns. Bare steps are `training_step` on rows in
    memory; the command reads its rows, logs a line every five steps and keeps a checkpoint half way.
    """
    steps = TINY_STEPS if scale == TINY else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = _dataset(folder / "data", scale)
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe_yaml(check_recipe(_recipe(scale, steps))))
        seconds: dict[str, list[float]] = {"bare": [], "in one process": [], "on a worker of Ray Train": []}
        rounds = min(scale.rounds, MOST_ROUNDS)
        for number in range(rounds):
            for way in list(seconds)[:: 1 if number % 2 else -1]:
                say(f"round {number + 1} of {rounds}: {way}")
                if way == "bare":
                    seconds[way].append(_in_its_own_process(scale, steps))
                else:
                    run = folder / f"run-{number}-{way.split()[0]}"
                    workers = 1 if "Ray" in way else 0
                    seconds[way].append(_trained(recipe, dataset, run, workers))
    found = [Finding(f"a step, {way}", Spread.of(each), "s") for way, each in seconds.items()]
    for way, each in list(seconds.items())[1:]:
        added = [100 * (one / bare - 1) for one, bare in zip(each, seconds["bare"], strict=True)]
        name = f"`patchloom train` {way}: added to a bare step"
        found.append(Finding(name, Spread.of(added), "%", wanted=WANTED, is_cost=True))
    return found


def _recipe(scale: Scale, steps: int) -> dict[str, Any]:
    options = song_config(scale.side, scale.width, 1)["network_options"]
    batch = scale.batch
    return {
        "name": "benchmark",
        "model": {"network": "ddpmpp", "width": scale.width, "width_multipliers": options["width_multipliers"],
                  "blocks": 1, "attention": options["attention"], "dropout": options["dropout"]},
        "patches": {"p": 1.0},
        "ema": [{"halflife_images": 500_000}],
        "train": {"images": steps * batch, "batch_size": batch, "block_size": batch,
                  "log_every_images": LOG_STEPS * batch, "checkpoint_every_images": steps * batch // 2},
        "preview": {"every_images": 0},
    }  # fmt: skip


def _dataset(folder: Path, scale: Scale) -> Path:
    """Images of noise, prepared as a user's are."""
    images = np.random.default_rng(0).integers(0, 256, (ROWS, scale.side, scale.side, 3), np.uint8)
    np.savez(folder.with_suffix(".npz"), images=images)
    prepare(f"{folder}.npz", str(folder), resolution=scale.side, crop="none", workers=0)
    return folder


def _in_its_own_process(scale: Scale, steps: int) -> float:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_bare_seconds, scale, steps, torch.get_num_threads()).result()


def _bare_seconds(scale: Scale, steps: int, threads: int) -> float:
    """Seconds of a step, without the first ones that warm up."""
    torch.set_num_threads(threads)
    trainer = Trainer(song_config(scale.side, scale.width, 1), replace(method_of(scale), block_size=scale.batch))
    warm_up = WARM_UP_LINES * LOG_STEPS
    trainer.steps([plan_step(trainer.method, step, 0) for step in range(warm_up)])
    began = time.perf_counter()
    trainer.steps([plan_step(trainer.method, step, 0) for step in range(warm_up, steps)])
    return (time.perf_counter() - began) / (steps - warm_up)


def _trained(recipe: Path, dataset: Path, run: Path, workers: int) -> float:
    """Seconds of a step of the real command, by the times that its progress lines were written at."""
    command = [sys.executable, "-m", "patchloom.pipelines.cli", "train", str(recipe), "--data", str(dataset)]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{run.parent / 'mlflow.db'}"}
    done = subprocess.run(
        [*command, "--out", str(run), "--workers", str(workers)],
        env=os.environ | store, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    first, last = lines[WARM_UP_LINES - 1], lines[-2]  # the last line waits for the held-out loss
    return float((last["time_unix_s"] - first["time_unix_s"]) / (last["step"] - first["step"]))
