"""Tuner: run a function with many configurations on Ray Tune, chosen by a grid or Optuna, stopped early by ASHA."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from patchloom.errors import UserError
from patchloom.platform.compute.resources import (
    DEFAULT_RESOURCES,
    Resources,
    WorkerShape,
    autoscaler_state,
    wait_for_workers,
    workers_that_fit,
)
from patchloom.platform.compute.session import check_cluster, ray_session
from patchloom.platform.compute.shared_paths import UsedPaths, check_shared
from patchloom.platform.compute.supply import may_need_session, session_shape
from patchloom.platform.compute.versions import COMMAND, check_versions, own_versions
from patchloom.platform.compute.workers import TRIAL_CPUS, train_worker_shape
from patchloom.platform.files.folder import Folder

if TYPE_CHECKING:
    from optuna import Trial

TrialJob = TypeVar("TrialJob")
EXPERIMENT_NAME = "tune"
JOB_KEY = "planned"  # the key of a job in the configuration that Ray Tune keeps
ALL_PERCENT = 100
MAX_RANDOM_TRIALS = 10  # before Optuna uses earlier results


@dataclass(frozen=True)
class TuneResources:
    """What trials run on.

    Args:
        concurrent: trials that run in parallel; as many as fit by default.
        workers: Ray Train workers per trial; 0 trains in the trial's own process.
        nodes: the nodes that the trials may use, and how long to wait for them.
    """

    concurrent: int | None = None
    workers: int = 0
    nodes: Resources = DEFAULT_RESOURCES

    def shape(self) -> WorkerShape:
        """What the process of a trial reserves, or each of its workers.

        Raises:
            UserError: the nodes can never have as many GPUs.
        """
        if self.workers:
            return train_worker_shape(self.workers, self.nodes, in_trial=True)[0]
        return session_shape(self.nodes, self.nodes.cpus_per_worker or 1)

    def parallel_trials(self, room: int, grows: bool = False) -> int | None:
        """How many trials run in parallel; no more than fit, so that no trial waits for the workers of another.

        Args:
            room: how many of the shapes of a trial fit on the nodes.
            grows: whether an autoscaler adds nodes, for which trials without workers wait.

        Returns:
            The number. None: as many as nodes come.
        """
        room //= max(1, self.workers)
        if grows and (self.concurrent or not self.workers):
            return self.concurrent
        return max(1, min(self.concurrent or room, room))

    def wait_for_room(self) -> WorkerShape:
        """Wait until the session has room for one trial; returns the shape of its process or workers."""
        shape = self.shape()
        wait_for_workers(max(1, self.workers), shape, self.nodes.wait_minutes)
        return shape


@dataclass(frozen=True)
class OptunaSettings(Generic[TrialJob]):
    """A search whose settings follow from the results of earlier trials, by Optuna's TPE.

    Args:
        suggest: makes a job from an Optuna trial. It can be pickled, and depends only on the suggestions.
        trials: how many jobs to run.
        objectives: names of reported numbers to minimise; with several, Optuna looks for their Pareto front.
        seed: seed of the sampler.
    """

    suggest: "Callable[[Trial], TrialJob]"
    trials: int
    objectives: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class AshaSettings:
    """Early stopping by ASHA: at each rung, trials that are not among the best 1/reduction stop.

    Args:
        metric: name of the reported number to minimise.
        spent: name of the reported percentage of its budget that a trial has spent.
        grace_percent: percentage of the budget that every trial spends.
        reduction: one in so many trials continues at each rung.
    """

    metric: str
    spent: str
    grace_percent: float
    reduction: int


@dataclass(frozen=True)
class EndedJob(Generic[TrialJob]):
    """A job that has ended, and the last line of its error if it failed."""

    job: TrialJob
    problem: str | None = None


@contextlib.contextmanager
def room_for_trials(resources: TuneResources, paths: UsedPaths) -> Iterator[TuneResources]:
    """A session that has room for a trial, before anything is written. On a cluster, waits for nodes.

    Yields:
        The resources, with the number of GPUs of each trial or worker if it was decided.

    Raises:
        UserError: the cluster does not answer, has no room for a trial, did not have it within the time, or its nodes
            do not see the paths.
    """
    check_cluster()
    if not os.environ.get("RAY_ADDRESS") and not may_need_session(resources.nodes):
        yield resources  # a session on this machine has room
        return
    with ray_session(max(1, resources.workers), resources.nodes.object_store_gib):
        gpus = resources.wait_for_room().bundle.get("GPU", 0)
        check_shared(paths)
        yield replace(resources, nodes=resources.nodes.with_values(gpus_per_worker=gpus))


def run_on_tune(
    function: Callable[[TrialJob], None],
    source: list[TrialJob] | OptunaSettings[TrialJob],
    scratch: Folder,
    resources: TuneResources,
    newest_step: Callable[[TrialJob], int],
    asha: AshaSettings | None = None,
) -> list[EndedJob[TrialJob]]:
    """Run a function for every job on Ray Tune.

    A job whose process or node died runs again, unless that happens again and again without a newer checkpoint. A
    search with Optuna or ASHA that was killed continues from its state in `scratch`; the function may then be called
    again with a job that it has finished.

    Args:
        function: called in a process of its own with each job.
        source: the jobs, or how Optuna makes them.
        scratch: folder for the state of Ray Tune; may be remote.
        resources: what the trials run on.
        newest_step: the step of the newest checkpoint of a job; an error counts as no checkpoint.
        asha: how jobs are stopped early.
    """
    from ray import tune

    from patchloom.platform.compute.trial_failures import TrialFailures, describe_problem

    with ray_session(max(1, resources.workers), resources.nodes.object_store_gib):
        _keep_secrets_from_trials()
        shape = resources.wait_for_room()
        trainable = tune.with_resources(_trainable(function), _placement(shape, resources.workers))
        system, path = scratch.system()
        place = f"{path}/{EXPERIMENT_NAME}"
        if (isinstance(source, OptunaSettings) or asha) and tune.Tuner.can_restore(place, system):
            tuner = tune.Tuner.restore(
                place, trainable, resume_unfinished=True, restart_errored=True, storage_filesystem=system
            )
        else:
            parallel = resources.parallel_trials(workers_that_fit(shape), autoscaler_state().exists)
            failures = TrialFailures(_StepOfConfig(newest_step))
            run = tune.RunConfig(
                name=EXPERIMENT_NAME,
                storage_path=path,
                storage_filesystem=system,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=-1),  # TrialFailures sets the limit
                callbacks=[failures],
            )
            tuner = _new_tuner(trainable, source, run, parallel, asha)
        return [EndedJob(result.config[JOB_KEY], describe_problem(result.error)) for result in tuner.fit()]


def _keep_secrets_from_trials() -> None:
    """Ray Tune gives the AWS keys of this process to its trials, and Ray logs them. Nodes have keys of their own."""
    from ray.tune.execution import class_cache

    secret = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(secret)


def _placement(shape: WorkerShape, workers: int) -> Any:
    """What Ray reserves for the process of a trial, and where; its workers reserve their own."""
    from ray import tune

    if workers:
        return tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}])
    return tune.PlacementGroupFactory([shape.bundle], bundle_label_selector=[shape.labels])


@dataclass(frozen=True)
class _StepOfConfig(Generic[TrialJob]):
    """The step of the newest checkpoint of a trial, from the configuration that Ray Tune keeps."""

    newest_step: Callable[[TrialJob], int]

    def __call__(self, config: dict[str, TrialJob]) -> int:
        try:
            return self.newest_step(config[JOB_KEY])
        except (UserError, OSError):  # an error here would end the search
            return 0


def _trainable(function: Callable[[TrialJob], None]) -> Callable[[dict[str, TrialJob]], None]:
    """The function with the signature that Ray Tune calls."""
    versions = own_versions(COMMAND)

    def run(config: dict[str, TrialJob]) -> None:
        check_versions([versions, own_versions()])
        function(config[JOB_KEY])

    return run


def _new_tuner(
    trainable: Any,
    source: list[TrialJob] | OptunaSettings[TrialJob],
    run: Any,
    parallel: int | None,
    asha: AshaSettings | None,
) -> Any:
    from ray import tune

    if isinstance(source, OptunaSettings):
        space, trials, searcher = {}, source.trials, _searcher(source)
    else:
        space, trials, searcher = {JOB_KEY: tune.grid_search(source)}, len(source), None
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            max_concurrent_trials=min(parallel or trials, trials),
            num_samples=1 if searcher is None else trials,
            search_alg=searcher,
            scheduler=_scheduler(asha) if asha else None,
        ),
        run_config=run,
    )


def _scheduler(asha: AshaSettings) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr=asha.spent,
        metric=asha.metric,
        mode="min",
        max_t=ALL_PERCENT,
        grace_period=asha.grace_percent,
        reduction_factor=asha.reduction,
        stop_last_trials=False,
    )


def _searcher(settings: OptunaSettings[TrialJob]) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of Optuna warn that an option is experimental
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(MAX_RANDOM_TRIALS, max(2, settings.trials // 3)),
            seed=settings.seed,
            constant_liar=True,
        )
    is_single = len(settings.objectives) == 1
    return OptunaSearch(
        space=_DefineByRun(settings.suggest),
        metric=settings.objectives[0] if is_single else list(settings.objectives),
        mode="min" if is_single else ["min"] * len(settings.objectives),
        sampler=sampler,
    )


@dataclass(frozen=True)
class _DefineByRun(Generic[TrialJob]):
    """The suggestions of an Optuna trial in the form that Ray Tune expects."""

    suggest: "Callable[[Trial], TrialJob]"

    def __call__(self, optuna_trial: "Trial") -> dict[str, TrialJob]:
        return {JOB_KEY: self.suggest(optuna_trial)}
