"""The training loop of one worker: plan a step, fetch its rows, take it, and now and then look up."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from patchloom.models.step import StoredRows, training_step
from patchloom.models.step_plan import CropGroup, StepPlan, plan_step
from patchloom.pipelines.train.checkpointer import CHECKPOINTS, without_old_tensors
from patchloom.pipelines.train.monitor import STOP_FILE, Monitor
from patchloom.pipelines.train.profiler import Profiler
from patchloom.pipelines.train.run import Run, open_run, save_run_model
from patchloom.platform.compute.workers import Worker
from patchloom.platform.files.copies import RemoteMirror, pull_folder, working_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import locked, sweep_partial

LEAVING_WORKER_S = 60.0  # an orphan of a killed session may still be writing


def train_worker(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
    """Train one worker's share of a run from its newest checkpoint to its end.

    Returns `line`, the last progress line, and `verdict`: "finished", "stopped" or "diverged".
    """
    with _run_here(worker, Folder(config["folder"])) as folder:
        here = config | {"folder": str(folder)}
        if worker.rank > 0:
            return _train(worker, here)
        with locked(folder, ".worker.lock", wait_s=LEAVING_WORKER_S):
            sweep_partial(folder)
            sweep_partial(folder / CHECKPOINTS)
            return _train(worker, here)


@contextmanager
def _run_here(worker: Worker, run: Folder) -> Iterator[Path]:
    """The run's folder on this node; worker 0 keeps a remote one equal to its own."""
    if not run.is_remote:
        yield run.path
        return
    here = working_copy(run, "worker")
    (here / STOP_FILE).unlink(missing_ok=True)
    pull_folder(run, here, without_old_tensors(run))
    with RemoteMirror(here, run, STOP_FILE) if worker.rank == 0 else nullcontext():
        yield here


def _train(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
    run = open_run(worker, config)
    state, method = run.state, run.method
    with Prefetcher(run) as ahead, Monitor(run) as monitor, Profiler(run.folder, off=not run.profiled) as profiler:
        while monitor.verdict == "training":
            plan = plan_step(method, state.step, state.images_seen)
            training_step(state, method, plan, ahead.work(plan), run.space, run.clock.timed("reduce", worker.reduce))
            monitor.after_step(plan)
            profiler.after_step()
    if worker.rank == 0 and monitor.verdict == "finished":
        save_run_model(run)
    return {"line": monitor.last_line, "verdict": monitor.verdict}


class Prefetcher:
    """Fetches the rows of the next step while this one is taken; which they are depends on no result."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reader = ThreadPoolExecutor(1, "rows")
        self._next: Future[list[tuple[CropGroup, StoredRows]]] | None = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def work(self, plan: StepPlan) -> list[tuple[CropGroup, StoredRows]]:
        """This worker's groups of a step with their rows; begins to fetch those of the step after it."""
        fetched = self._next or self._reader.submit(self._fetch, plan)
        found = self.run.clock.timed("data", fetched.result)()
        method = self.run.method
        if plan.step + 1 < method.updates:
            after = plan_step(method, plan.step + 1, plan.first_crop + plan.crops)
            self._next = self._reader.submit(self._fetch, after)
        return found

    def _fetch(self, plan: StepPlan) -> list[tuple[CropGroup, StoredRows]]:
        worker = self.run.worker
        groups = plan.share(worker.rank, worker.count, self.run.microbatch)
        return [(group, self.run.reader.rows(group.crops)) for group in groups]
