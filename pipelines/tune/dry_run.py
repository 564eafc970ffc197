"""The dry run of a search: its trials and what they would cost, before anything starts."""

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean

from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.pipelines.train.data_shape import DataShape, opened
from patchloom.pipelines.train.dry_run import count_run, gpu_hours_text
from patchloom.pipelines.tune.planning import (
    PlannedData,
    Trial,
    check_space,
    held_out_flops,
    plan_trials,
    recipe_of_setting,
    seconds_of_trial,
    trial_recipe,
)
from patchloom.pipelines.tune.ranking import setting_title
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.progress import clock, say
from patchloom.platform.recipe.run_recipe import Recipe
from patchloom.platform.recipe.search import Search, load_search


def search_plan(search: str, dataset: str | DataShape, concurrent: int = 1) -> str:
    """The settings of a search with their counts and costs, and the time that all trials would take, as text.

    The time is measured with a dataset only: a shape can be that of a search for another machine.

    For an adaptive search, whose settings are not known yet, every trial counts like the base recipe.

    Args:
        search: the path of a YAML file, or the name of a shipped search.
        dataset: a prepared dataset, or the shape of one that does not exist yet.
        concurrent: trials that run in parallel.

    Raises:
        UserError: the search does not fit the dataset.
    """
    definition, base = load_search(search)
    planned, title = _planned_trials(definition, base, opened(dataset))
    measured = None if isinstance(dataset, DataShape) else _measured_times(planned, dataset, concurrent)
    seconds = iter(measured.of_trials if measured else ())
    lines, flops, busy_seconds = [title], 0.0, [0.0] * concurrent
    for number, trial in enumerate(planned):
        if trial.repeat == 0:
            cost = _trial_cost(trial, dataset, next(seconds, None))
            title = setting_title(trial.settings) or base.name
            equal = f", for equal {trial.equal}" if trial.equal else ""
            lines.append(f"  {number:>3}  {title}{equal}: {cost.text}")
        flops += cost.flops
        # the next trial starts where a process is free first
        busy_seconds[busy_seconds.index(min(busy_seconds))] += (measured.start if measured else 0) + cost.seconds
    total = f"  {flops / 1e12:,.3f} TFLOP in total, {gpu_hours_text(flops)}"
    if measured:
        total += (
            f", and here about {clock(measured.start + max(busy_seconds))} with {concurrent} in parallel. Steps and "
            f"the start of a process ({clock(measured.start)}) were measured here{_what_is_not_counted(definition)}."
        )
    return "\n".join([*lines, total])


@dataclass(frozen=True)
class _MeasuredTimes:
    """Seconds to start a process, and of the steps of each trial that has another setting than the ones before."""

    start: float
    of_trials: list[float]


def _measured_times(planned: Sequence[Trial], dataset: str, concurrent: int) -> _MeasuredTimes:
    recipes = [trial.recipe for trial in planned if trial.repeat == 0]
    return _MeasuredTimes(seconds_to_start(), _measure_in_parallel(recipes, dataset, concurrent))


def _planned_trials(search: Search, base: Recipe, dataset: PlannedData) -> tuple[list[Trial], str]:
    """The trials, and a title that says how many there are."""
    if search.is_adaptive:
        check_space(search, base, dataset)
        typical = trial_recipe(search, recipe_of_setting(search, base, {}), dataset, {})
        trials = [Trial({}, repeat, typical) for repeat in range(search.trials)]
        return trials, f"{search.name}: {len(trials)} trials with settings from Optuna ({search.searcher})"
    trials = plan_trials(search, base, dataset)
    settings = sum(trial.repeat == 0 and trial.equal is None for trial in trials)
    return trials, f"{search.name}: {settings} settings, {len(trials)} trials"


def _what_is_not_counted(search: Search) -> str:
    text = "; trials that asha stops end earlier" if search.stops_early else ""
    if search.final is not None:
        text += f"; {search.final.samples} samples per trial are not included"
    return text


@dataclass(frozen=True)
class _TrialCost:
    flops: float
    seconds: float
    text: str


def _trial_cost(trial: Trial, dataset: str | DataShape, seconds: float | None) -> _TrialCost:
    """The cost of a trial; without the seconds where nothing was measured."""
    if trial.recipe is None:
        return _TrialCost(0.0, 0.0, f"does not fit ({trial.problem.partition(': ')[2]})")
    plan = count_run(trial.recipe, dataset)
    held_out = held_out_flops(trial.recipe, opened(dataset))
    text = (
        f"{plan.updates:,} updates, {plan.crops:,} counted images, {plan.flops / 1e12:,.3f} TFLOP and "
        f"{held_out / 1e12:,.3f} for held-out losses"
    )
    return _TrialCost(plan.flops, seconds or 0.0, text if seconds is None else f"{text}, {clock(seconds)}")


def _measure_in_parallel(recipes: Sequence[Recipe | None], dataset: str, concurrent: int) -> list[float]:
    """Seconds per trial, measured in as many processes as trials run in parallel, because these slow each other."""
    say("  measuring some steps of each trial on this machine ...")
    job = _MeasurementJob(recipes, dataset, allowed_backbones())
    with ProcessPoolExecutor(concurrent, get_context("spawn")) as pool:
        measured = list(pool.map(_measure, [job] * concurrent))
    return [mean(seconds) for seconds in zip(*measured, strict=True)]


@dataclass(frozen=True)
class _MeasurementJob:
    recipes: Sequence[Recipe | None]
    dataset: str
    backbones: tuple[str, ...]


def _measure(job: _MeasurementJob) -> list[float]:
    allow_backbones(*job.backbones)
    rows = open_dataset(job.dataset)
    return [seconds_of_trial(recipe, rows) if recipe else 0.0 for recipe in job.recipes]


def seconds_to_start() -> float:
    """How long a process takes to import what a trial needs, measured now."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import patchloom.pipelines.tune.trials, mlflow, ray.tune"], check=True)
    return time.perf_counter() - started
