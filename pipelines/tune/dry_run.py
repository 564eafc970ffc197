"""The dry run of a search: its trials and what they would cost, before anything starts."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean

from pydantic import JsonValue

from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.pipelines.train.data_shape import DataShape, opened
from patchloom.pipelines.train.dry_run import count_run, gpu_hours_text
from patchloom.pipelines.tune.planning import (
    CostUnit,
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


@dataclass(frozen=True)
class TrialEstimate:
    """What one trial of a setting is expected to do; all zero where the setting does not fit.

    Args:
        number: that of its first trial.
        settings: the recipe keys that the search sets.
        equal: the unit of a trial of `equal_costs`, None for a trial that spends the budget.
        problem: why it does not fit, or empty.
        updates: optimisation steps.
        crops: counted images.
        flops: FLOPs of training.
        held_out_flops: further FLOPs of held-out losses.
        seconds: how long it takes here; None if that was not measured.
    """

    number: int
    settings: Mapping[str, JsonValue]
    equal: CostUnit | None
    problem: str = ""
    updates: int = 0
    crops: int = 0
    flops: float = 0.0
    held_out_flops: float = 0.0
    seconds: float | None = None

    @property
    def text(self) -> str:
        """It as a sentence, without its settings."""
        if self.problem:
            return f"does not fit ({self.problem})"
        text = (
            f"{self.updates:,} updates, {self.crops:,} counted images, {self.flops / 1e12:,.3f} TFLOP and "
            f"{self.held_out_flops / 1e12:,.3f} for held-out losses"
        )
        return text if self.seconds is None else f"{text}, {clock(self.seconds)}"


@dataclass(frozen=True, kw_only=True)
class SearchEstimate:
    """What a search is expected to do: the result of `patchloom tune --dry-run`.

    Args:
        search: name of the search.
        recipe: name of its base recipe.
        searcher: what chooses the settings.
        is_adaptive: whether it chooses them during the search; then every trial counts like the base recipe.
        settings: number of settings; None if it is adaptive.
        trials: number of trials.
        of_settings: the cost of one trial per setting and unit of equal cost.
        flops: FLOPs of training of all trials.
        concurrent: trials that run in parallel.
        start_seconds: how long a process takes to start here; None if that was not measured.
        seconds: how long all trials take here; None if that was not measured.
        not_counted: what `seconds` leaves out.
    """

    search: str
    recipe: str
    searcher: str
    is_adaptive: bool
    settings: int | None
    trials: int
    of_settings: tuple[TrialEstimate, ...]
    flops: float
    concurrent: int
    start_seconds: float | None
    seconds: float | None
    not_counted: tuple[str, ...]

    @property
    def text(self) -> str:
        """It as a line per setting and a total."""
        title = f"{self.search}: {self.settings} settings, {self.trials} trials"
        if self.is_adaptive:
            title = f"{self.search}: {self.trials} trials with settings from Optuna ({self.searcher})"
        lines = [
            f"  {one.number:>3}  {setting_title(dict(one.settings)) or self.recipe}"
            f"{f', for equal {one.equal}' if one.equal else ''}: {one.text}"
            for one in self.of_settings
        ]
        total = f"  {self.flops / 1e12:,.3f} TFLOP in total, {gpu_hours_text(self.flops)}"
        if self.seconds is not None and self.start_seconds is not None:
            measured = f"Steps and the start of a process ({clock(self.start_seconds)}) were measured here"
            total += f", and here about {clock(self.seconds)} with {self.concurrent} in parallel. "
            total += "; ".join([measured, *self.not_counted]) + "."
        return "\n".join([title, *lines, total])


def describe_search(search: str, dataset: str | DataShape, concurrent: int = 1) -> SearchEstimate:
    """The settings of a search with their counts and costs, and the time that all trials would take.

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
    planned = _planned_trials(definition, base, opened(dataset))
    measured = None if isinstance(dataset, DataShape) else _measured_times(planned, dataset, concurrent)
    seconds = iter(measured.of_trials if measured else ())
    of_settings: list[TrialEstimate] = []
    flops, busy_seconds = 0.0, [0.0] * concurrent
    for number, trial in enumerate(planned):
        if trial.repeat == 0:
            of_settings.append(_trial_estimate(number, trial, dataset, next(seconds, None)))
        flops += of_settings[-1].flops
        # the next trial starts where a process is free first
        needed = (measured.start if measured else 0) + (of_settings[-1].seconds or 0)
        busy_seconds[busy_seconds.index(min(busy_seconds))] += needed
    settings = sum(trial.repeat == 0 and trial.equal is None for trial in planned)
    return SearchEstimate(
        search=definition.name,
        recipe=base.name,
        searcher=definition.searcher,
        is_adaptive=definition.is_adaptive,
        settings=None if definition.is_adaptive else settings,
        trials=len(planned),
        of_settings=tuple(of_settings),
        flops=flops,
        concurrent=concurrent,
        start_seconds=measured.start if measured else None,
        seconds=measured.start + max(busy_seconds) if measured else None,
        not_counted=_what_is_not_counted(definition),
    )


@dataclass(frozen=True)
class _MeasuredTimes:
    """Seconds to start a process, and of the steps of each trial that has another setting than the ones before."""

    start: float
    of_trials: list[float]


def _measured_times(planned: Sequence[Trial], dataset: str, concurrent: int) -> _MeasuredTimes:
    recipes = [trial.recipe for trial in planned if trial.repeat == 0]
    return _MeasuredTimes(seconds_to_start(), _measure_in_parallel(recipes, dataset, concurrent))


def _planned_trials(search: Search, base: Recipe, dataset: PlannedData) -> list[Trial]:
    if search.is_adaptive:
        check_space(search, base, dataset)
        typical = trial_recipe(search, recipe_of_setting(search, base, {}), dataset, {})
        return [Trial({}, repeat, typical) for repeat in range(search.trials)]
    return plan_trials(search, base, dataset)


def _what_is_not_counted(search: Search) -> tuple[str, ...]:
    early = ("trials that asha stops end earlier",) if search.stops_early else ()
    return early if search.final is None else (*early, f"{search.final.samples} samples per trial are not included")


def _trial_estimate(number: int, trial: Trial, dataset: str | DataShape, seconds: float | None) -> TrialEstimate:
    if trial.recipe is None:
        return TrialEstimate(number, trial.settings, trial.equal, problem=trial.problem.partition(": ")[2])
    plan = count_run(trial.recipe, dataset)
    held_out = held_out_flops(trial.recipe, opened(dataset))
    return TrialEstimate(
        number, trial.settings, trial.equal, "", plan.updates, plan.crops, plan.flops, held_out, seconds
    )


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
