"""The dry run of a search: its trials and what they would cost, before anything starts."""

import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean
from typing import Any

from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.pipelines.tune.ranking import setting_words
from patchloom.pipelines.tune.trials import (
    Trial,
    check_space,
    plan_trials,
    seconds_of_trial,
    set_recipe,
    trial_recipe,
)
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.progress import clock
from patchloom.platform.recipe.run_recipe import Recipe, check_recipe
from patchloom.platform.recipe.search import load_search


def search_plan(search: str, dataset: str, concurrent: int = 1) -> str:
    """Each setting of a search with its counts and cost, and how long all trials would take, so many at once.

    Of a search that is advised, the base recipe stands for the settings that are not known yet.
    """
    definition, base = load_search(search)
    rows = open_dataset(dataset)
    if definition.is_adaptive:
        check_space(definition, base, rows)
        typical = trial_recipe(definition, set_recipe(definition, base, {}), rows, {})
        planned = [Trial({}, repeat, typical) for repeat in range(definition.trials)]
        lines = [f"{definition.name}: {len(planned)} trials, whose settings {definition.searcher} will choose"]
    else:
        planned = plan_trials(definition, base, rows)
        settings = sum(trial.repeat == 0 for trial in planned)
        lines = [f"{definition.name}: {settings} settings, {len(planned)} trials"]
    start, flops, queue = seconds_to_start(), 0.0, [0.0] * concurrent
    seconds = iter(_measured_together([trial.recipe for trial in planned if trial.repeat == 0], dataset, concurrent))
    for number, trial in enumerate(planned):
        if trial.repeat == 0:
            name = setting_words(trial.settings) or f"{base.name} as it is"
            cost = _trial_cost(trial, dataset, next(seconds))
            lines.append(f"  {number:>3}  {name}: {cost.words}")
        flops += cost.flops
        queue[queue.index(min(queue))] += start + cost.seconds  # whoever is free takes the next
    ends = "; those that asha stops end sooner" if definition.stops_early else ""
    if definition.final is not None:
        ends += f"; {definition.final.samples} samples a trial come on top"
    return "\n".join([
        *lines,
        f"  {flops / 1e12:,.3f} TFLOP in all; about {clock(start + max(queue))} with {concurrent} at once, by steps "
        f"and a start ({clock(start)}) measured here{ends}",
    ])  # fmt: skip


@dataclass(frozen=True)
class _Cost:
    flops: float
    seconds: float
    words: str


def _trial_cost(trial: Trial, dataset: str, seconds: float) -> _Cost:
    if trial.recipe is None:
        return _Cost(0.0, 0.0, f"cannot be ({trial.problem.partition(': ')[2]})")
    plan = describe_plan(trial.recipe, dataset)
    words = f"{plan['updates']:,} updates, {plan['crops']:,} counted images, {plan['flops'] / 1e12:,.3f} TFLOP"
    return _Cost(plan["flops"], seconds, f"{words}, {clock(seconds)}")


def _measured_together(recipes: list[Recipe | None], dataset: str, concurrent: int) -> list[float]:
    """Seconds of each trial, measured by as many processes at once as trials will run: these slow one another."""
    values = [recipe and recipe.model_dump(mode="json") for recipe in recipes]
    argument = values, dataset, allowed_backbones()
    with ProcessPoolExecutor(concurrent, get_context("spawn")) as pool:
        found = list(pool.map(_measured_here, [argument] * concurrent))
    return [mean(seconds) for seconds in zip(*found, strict=True)]


def _measured_here(argument: tuple[list[dict[str, Any] | None], str, list[str]]) -> list[float]:
    values, dataset, backbones = argument
    allow_backbones(*backbones)
    rows = open_dataset(dataset)
    return [seconds_of_trial(check_recipe(recipe), rows) if recipe else 0.0 for recipe in values]


def seconds_to_start() -> float:
    """How long a process takes to import what a trial needs, measured now."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import patchloom.pipelines.tune.trials, mlflow, ray.tune"], check=True)
    return time.perf_counter() - began
