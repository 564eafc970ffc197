"""The tuner: runs a function with many configurations on Ray Tune, optionally with Optuna and ASHA."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from patchloom.platform.compute.session import ray_session, session_cpus
from patchloom.platform.compute.workers import TRIAL_CPUS

if TYPE_CHECKING:
    from optuna import Trial

Config = TypeVar("Config")

TUNE_RUN = "tune"  # name of the run in Ray Tune
TRIAL_CONFIG = "planned"  # the key of our configuration in that of Ray Tune
TRIAL_RETRIES = 1  # for a trial whose process died
MAX_STARTUP_TRIALS = 10  # random trials before Optuna suggests settings


@dataclass(frozen=True)
class TrialResources:
    """What the trials of a search run on.

    Args:
        concurrent: the largest number of trials at once. None: as many as the session has room for.
        workers: workers of each trial; 0: the process of the trial itself.
        gpus: GPUs of a trial without workers; 0.5 lets two trials share one. None: one, if there are any.
    """

    concurrent: int | None = None
    workers: int = 0
    gpus: float | None = None

    def of_trial(self, available_gpus: float) -> dict[str, float]:
        """What Ray reserves for the process of a trial. Workers reserve their own resources."""
        if self.workers:
            return {"cpu": TRIAL_CPUS}
        return {"cpu": 1, "gpu": (1 if self.gpus is None else self.gpus) if available_gpus else 0}

    def at_once(self, cpus: int, available_gpus: float) -> int:
        """The number of trials that run at once. Each has its workers, so that no trial waits for another one."""
        room = cpus // max(1, self.workers)
        if available_gpus and self.workers:
            room = min(room, int(available_gpus) // self.workers)
        return max(1, min(self.concurrent or room, room))


@dataclass(frozen=True)
class OptunaSettings(Generic[Config]):
    """Configurations from Optuna's TPE, which depend on the results of earlier trials.

    Args:
        space: makes a configuration from an Optuna trial. It can be pickled, and it depends only on the suggestions.
        trials: number of trials.
        objectives: names of reported metrics to minimise. With several, the search looks for their frontier.
        seed: seed of the sampler.
    """

    space: Callable[["Trial"], Config]
    trials: int
    objectives: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class AshaSettings:
    """Early stopping with ASHA: at each rung, only the best 1/reduction of the trials continue.

    Args:
        metric: name of the reported metric, which is minimised.
        spent: name of the reported percentage of the budget that is spent.
        grace_percent: percentage of the budget that each trial may spend at least.
        reduction: see above.
    """

    metric: str
    spent: str
    grace_percent: float
    reduction: int


def run_on_tune(
    function: Callable[[Config], None],
    source: list[Config] | OptunaSettings[Config],
    scratch: Path,
    resources: TrialResources,
    asha: AshaSettings | None = None,
) -> list[tuple[Config, str | None]]:
    """Run `function(config)` for each configuration. A trial whose process died is repeated once.

    If a search with Optuna or ASHA was killed, the next call with the same `scratch` continues it with the results
    so far. The function may then be called again with a configuration that it has finished.

    Args:
        function: runs one trial.
        source: the configurations, or the settings with which Optuna makes them.
        scratch: folder for the files of Ray Tune.
        resources: what the trials run on.
        asha: settings for early stopping. None: all trials run to their end.

    Returns:
        Each configuration, with the last line of its error or None.
    """
    from ray import tune

    with ray_session(max(1, resources.workers)):
        import ray

        cpus, gpus = session_cpus(), ray.cluster_resources().get("GPU", 0)
        trainable = tune.with_resources(_trainable(function), resources.of_trial(gpus))
        stored = str(scratch / TUNE_RUN)
        if (isinstance(source, OptunaSettings) or asha) and tune.Tuner.can_restore(stored):
            tuner = tune.Tuner.restore(stored, trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = _new_tuner(tune, trainable, source, scratch, resources.at_once(cpus, gpus), asha)
        return [(result.config[TRIAL_CONFIG], _last_line(result.error)) for result in tuner.fit()]


def _trainable(function: Callable[[Config], None]) -> Callable[[dict[str, Any]], None]:
    """The function with the signature that Ray Tune calls."""
    return lambda config: function(config[TRIAL_CONFIG])


def _new_tuner(
    tune: Any, trainable: Any, source: list[Config] | OptunaSettings[Config], scratch: Path, at_once: int,
    asha: AshaSettings | None,
) -> Any:  # fmt: skip
    if isinstance(source, OptunaSettings):
        space, trials, searcher = {}, source.trials, _searcher(source)
    else:
        space, trials, searcher = {TRIAL_CONFIG: tune.grid_search(source)}, len(source), None
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            max_concurrent_trials=min(at_once, trials),
            num_samples=1 if searcher is None else trials,
            search_alg=searcher,
            scheduler=_scheduler(asha) if asha else None,
        ),
        run_config=tune.RunConfig(
            name=TUNE_RUN,
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_RETRIES),
        ),
    )


def _scheduler(asha: AshaSettings) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr=asha.spent,
        metric=asha.metric,
        mode="min",
        max_t=100,
        grace_period=asha.grace_percent,
        reduction_factor=asha.reduction,
        stop_last_trials=False,
    )


def _searcher(settings: OptunaSettings[Any]) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about features that are experimental in some versions of Optuna
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(MAX_STARTUP_TRIALS, max(2, settings.trials // 3)),
            seed=settings.seed,
            constant_liar=True,
        )
    is_single = len(settings.objectives) == 1
    return OptunaSearch(
        space=_SuggestedConfig(settings.space),
        metric=settings.objectives[0] if is_single else list(settings.objectives),
        mode="min" if is_single else ["min"] * len(settings.objectives),
        sampler=sampler,
    )


@dataclass(frozen=True)
class _SuggestedConfig:
    """A configuration for Ray Tune from the suggestions of an Optuna trial."""

    space: Callable[["Trial"], object]

    def __call__(self, trial: "Trial") -> dict[str, object]:
        return {TRIAL_CONFIG: self.space(trial)}


def _last_line(error: BaseException | None) -> str | None:
    """The last line of a traceback."""
    return None if error is None else str(error).strip().split("\n")[-1]
