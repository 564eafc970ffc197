"""The training loop of one worker: plan a step, fetch its rows, take it, and call the hooks."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from patchloom.models.step import StoredRows, training_step
from patchloom.models.step_plan import CropGroup, StepPlan, plan_step
from patchloom.pipelines.train.agreement import check_agreement
from patchloom.pipelines.train.checkpointer import worker_lock
from patchloom.pipelines.train.control import show_training
from patchloom.pipelines.train.monitor import Monitor, Verdict
from patchloom.pipelines.train.node_copies import worker_copy
from patchloom.pipelines.train.profiler import Profiler
from patchloom.pipelines.train.row_copies import CopyStream
from patchloom.pipelines.train.run import TrainingRun, TrainJob, open_run, save_run_model
from patchloom.platform.compute.devices import device_thread
from patchloom.platform.compute.workers import Worker
from patchloom.platform.files.copies import UnsentWork
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe.run_recipe import recipe_yaml
from patchloom.platform.records.run import ProgressLine


@dataclass(frozen=True)
class TrainOutcome:
    """How a session of training ended, its last progress line, and why work of it was not sent to the store."""

    verdict: Verdict
    line: ProgressLine | None
    unsent: str | None = None


def train_worker(worker: Worker, job: TrainJob) -> TrainOutcome:
    """Train one worker's share of a run, from its newest checkpoint to its end."""
    there = Folder(job.folder)
    try:
        with worker_copy(worker, there, job.owner) as folder, worker_lock(worker, folder):
            run = open_run(worker, replace(job, folder=str(folder), address=job.folder))
            check_agreement(worker, recipe_yaml(job.recipe), run.state)
            if worker.rank == 0:
                show_training(there)
            outcome = _train(run)
    except UnsentWork as error:  # not a failure, after which Ray Train would start the workers again
        return replace(outcome, unsent=str(error))
    return outcome


def _train(run: TrainingRun) -> TrainOutcome:
    state, settings, is_first = run.state, run.settings, run.worker.rank == 0
    start_sum = partial(_start_sum, run) if run.worker.count > 1 else None
    profiler = Profiler(run.folder, off=not (run.job.profile and is_first))
    with Prefetcher(run) as prefetcher, Monitor(run) as monitor, profiler:
        while monitor.verdict == Verdict.TRAINING:
            plan = plan_step(settings, state.step, state.images_seen)
            training_step(state, settings, plan, prefetcher.fetch(plan), run.normalisation, start_sum)
            monitor.after_step(plan)
            profiler.after_step()
        run.worker.meet()  # after the same step on every verdict: none leaves while another still needs it
    if is_first and monitor.verdict == Verdict.FINISHED:
        save_run_model(run)
    return TrainOutcome(monitor.verdict, monitor.last_line)


def _start_sum(run: TrainingRun, bucket: Tensor) -> Callable[[], object]:
    """Start to sum a part of the gradients over the workers. The time spent waiting for it is measured."""
    return run.timer.timed("reduce", run.worker.start_sum(bucket))


@dataclass(frozen=True)
class FetchedRows:
    """The groups of a step with their rows, and the mark after their copies."""

    groups: list[tuple[CropGroup, StoredRows]]
    mark: Any


class Prefetcher:
    """Fetches the rows of the next step while the current step is taken."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self._executor = device_thread("rows")
        self._copies = CopyStream(run.device)
        self._next: Future[FetchedRows] | None = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)
        self.run.reader.plan.close()

    def fetch(self, plan: StepPlan) -> list[tuple[CropGroup, StoredRows]]:
        """This worker's groups of a step, with their rows. Starts to fetch those of the next step."""
        fetched = self._next or self._executor.submit(self._read, plan)
        groups = self.run.timer.timed("data", self._use)(fetched)
        settings = self.run.settings
        if plan.step + 1 < settings.updates:
            following = plan_step(settings, plan.step + 1, plan.first_crop + plan.crops)
            self._next = self._executor.submit(self._read, following)
        return groups

    def _read(self, plan: StepPlan) -> "FetchedRows":
        worker = self.run.worker
        groups = plan.share(worker.rank, worker.count, self.run.job.microbatch)
        with self._copies.copying():
            fetched = [(group, self.run.reader.rows(group.crops)) for group in groups]
        return FetchedRows(fetched, self._copies.copied_so_far())

    def _use(self, future: "Future[FetchedRows]") -> list[tuple[CropGroup, StoredRows]]:
        fetched = future.result()
        self._copies.use((rows for _, rows in fetched.groups), fetched.mark)
        return fetched.groups
