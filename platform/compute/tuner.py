"""Tuner: one function run with many configurations on Ray Tune, perhaps advised by Optuna or stopped early by ASHA."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.platform.compute.session import ray_session, session_cpus
from patchloom.platform.compute.workers import TRIAL_CPUS

NAME = "tune"
PLANNED = "planned"  # where a trial's own configuration stands in that of Ray Tune
RETRIES = 1  # of a trial whose process died
ALL_PERCENT = 100
STARTUP_TRIALS = 10  # drawn at random before Optuna advises, at most


@dataclass(frozen=True)
class Resources:
    """What trials run on. workers: 0 is a trial's own process; gpus: a part of one lets several trials share it."""

    concurrent: int | None = None
    workers: int = 0
    gpus: float | None = None

    def of_trial(self, gpus_there: float) -> dict[str, float]:
        """What Ray reserves for a trial itself; its workers reserve their own."""
        if self.workers:
            return {"cpu": TRIAL_CPUS}
        return {"cpu": 1, "gpu": (1 if self.gpus is None else self.gpus) if gpus_there else 0}

    def at_once(self, cpus: int, gpus_there: float) -> int:
        """How many trials run at once: no more than there is room for, so that none waits for another's workers."""
        room = cpus // max(1, self.workers)
        if gpus_there and self.workers:
            room = min(room, int(gpus_there) // self.workers)
        return max(1, min(self.concurrent or room, room))


@dataclass(frozen=True)
class OptunaSettings:
    """Configurations that follow from what earlier trials came to, by Optuna's TPE.

    space: makes one from an Optuna trial; it can be pickled, and gives the same for the same suggestions.
    objectives: what trials report, to be as low as possible; several ask for the frontier between them.
    """

    space: Callable[[Any], dict[str, Any]]
    trials: int
    objectives: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class AshaSettings:
    """ASHA: at each rung, trials below the best 1/reduction stop. spent: the reported name of a budget's percent."""

    metric: str
    spent: str
    grace_percent: float
    reduction: int


def run_on_tune(
    function: Callable[[dict[str, Any]], None],
    source: list[dict[str, Any]] | OptunaSettings,
    scratch: Path,
    resources: Resources,
    halving: AshaSettings | None = None,
) -> list[tuple[dict[str, Any], str | None]]:
    """Run `function(config)` for every configuration; returns each with what went wrong at last, or None.

    One whose process died is tried again once. Where advice or halving had begun in `scratch` before a kill, they go
    on with what they knew; the function must bear to be called again with a configuration that it had finished.
    """
    from ray import tune

    with ray_session(max(1, resources.workers)):
        import ray

        cpus, gpus = session_cpus(), ray.cluster_resources().get("GPU", 0)
        trainable = tune.with_resources(_trainable(function), resources.of_trial(gpus))
        place = str(scratch / NAME)
        if (isinstance(source, OptunaSettings) or halving) and tune.Tuner.can_restore(place):
            tuner = tune.Tuner.restore(place, trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = _new(tune, trainable, source, scratch, resources.at_once(cpus, gpus), halving)
        return [(result.config[PLANNED], _last_line(result.error)) for result in tuner.fit()]


def _trainable(function: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The function as Ray Tune calls it."""
    return lambda config: function(config[PLANNED])


def _new(
    tune: Any, trainable: Any, source: list[dict[str, Any]] | OptunaSettings, scratch: Path, at_once: int,
    halving: AshaSettings | None,
) -> Any:  # fmt: skip
    if isinstance(source, OptunaSettings):
        space, trials, searcher = {}, source.trials, _searcher(source)
    else:
        space, trials, searcher = {PLANNED: tune.grid_search(source)}, len(source), None
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            max_concurrent_trials=min(at_once, trials),
            num_samples=1 if searcher is None else trials,
            search_alg=searcher,
            scheduler=_scheduler(halving) if halving else None,
        ),
        run_config=tune.RunConfig(
            name=NAME, storage_path=str(scratch), verbose=0, failure_config=tune.FailureConfig(max_failures=RETRIES)
        ),
    )


def _scheduler(halving: AshaSettings) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr=halving.spent,
        metric=halving.metric,
        mode="min",
        max_t=ALL_PERCENT,
        grace_period=halving.grace_percent,
        reduction_factor=halving.reduction,
        stop_last_trials=False,
    )


def _searcher(advice: OptunaSettings) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental in some of Optuna's versions
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(STARTUP_TRIALS, max(2, advice.trials // 3)), seed=advice.seed, constant_liar=True
        )
    one = len(advice.objectives) == 1
    return OptunaSearch(
        space=_Space(advice.space),
        metric=advice.objectives[0] if one else list(advice.objectives),
        mode="min" if one else ["min"] * len(advice.objectives),
        sampler=sampler,
    )


@dataclass(frozen=True)
class _Space:
    """An Optuna trial's suggestions as Ray Tune wants them."""

    space: Callable[[Any], dict[str, Any]]

    def __call__(self, adviser: Any) -> dict[str, Any]:
        return {PLANNED: self.space(adviser)}


def _last_line(error: BaseException | None) -> str | None:
    """What a traceback ends with."""
    return None if error is None else str(error).strip().split("\n")[-1]
