"""Train a recipe on a dataset, with Ray Train or in this process."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from patchloom.errors import Stopped, UserError
from patchloom.models.backbones import allowed_backbones
from patchloom.models.checkpoints import read_checkpoint_card
from patchloom.pipelines.train.checkpointer import newest_checkpoint, whole_checkpoints
from patchloom.pipelines.train.control import prepare_control
from patchloom.pipelines.train.hooks.loss_scale import LEAST_LOSS_SCALE
from patchloom.pipelines.train.loop import TrainOutcome, train_worker
from patchloom.pipelines.train.mlflow_run import end_tracking
from patchloom.pipelines.train.model_card import new_model_card, unexpected_data
from patchloom.pipelines.train.monitor import Verdict
from patchloom.pipelines.train.resuming import dataset_of_run, recipe_of_run
from patchloom.pipelines.train.run import TrainJob
from patchloom.pipelines.train.run_folder import OpenRun, open_run_folder
from patchloom.pipelines.train.shard_plan import recipe_plan
from patchloom.platform.compute.metrics import UNSENT_LINES, MetricRecorder
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.compute.stopping import stop_time
from patchloom.platform.compute.workers import room_for_workers, run_workers
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.copies import ProgressFetcher
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.records.run import RUN_FILE, ProgressLine, RunCard, last_progress
from patchloom.platform.tracking.forwarder import MlflowForwarder

ShowLine = Callable[[ProgressLine], None]
SHOWN_WAIT_SHARE = 0.05  # of the time, spent waiting for data


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        folder: the run folder; for a remote run a local copy.
        run_id: id of the MLflow run. None if MLflow did not answer during the run; `--resume` then sends it.
        last: the last progress line.
        address: the run folder as other commands take it.
    """

    folder: Path
    run_id: str | None
    last: ProgressLine
    address: str

    @property
    def model(self) -> Path:
        """The model folder with the averaged weights."""
        return self.folder / "model"


def train(
    recipe: Recipe | str | Path | None,
    dataset: str | None,
    out: str,
    *,
    workers: int = 1,
    min_workers: int | None = None,
    microbatch: int | None = None,
    compile: bool = False,
    profile: bool = False,
    resume: bool = False,
    parent_run: str | None = None,
    run_name: str | None = None,
    show: ShowLine | None = None,
    resources: Resources = DEFAULT_RESOURCES,
    max_hours: float | None = None,
) -> TrainResult:
    """Train a recipe on a prepared dataset. The model is in `out/model` when the function returns.

    Args:
        recipe: a recipe, the path of a YAML file, or the name of a shipped recipe. With `resume`, None for the run's.
        dataset: a prepared dataset; may be remote. With `resume`, None for the run's.
        out: the run folder to write; may be remote.
        workers: Ray Train workers; 0 trains in this process, without Ray.
        min_workers: continue with at least this many workers after a node is lost. The steps stay the same, up to
            summation order. By default `workers`.
        microbatch: most crops on a device at once, to save memory; the batch stays the same. By default all.
        compile: compile the network for each patch size with torch.compile.
        profile: report the three most expensive parts of a step and write a trace.
        resume: continue from the newest checkpoint in `out`; a finished run returns at once. A larger `train.images`
            makes a run with the stochastic schedule longer, with the result of a run that had it from the start.
        parent_run: the id of the MLflow run that this run is a trial of.
        run_name: the name of the run on MLflow's pages. By default that of the recipe with its p and schedule.
        show: called with each progress line, instead of showing a progress bar.
        resources: the nodes that the workers may use. By default all.
        max_hours: stop with a checkpoint before so many hours have passed since the call. By default never.

    Returns:
        The run folder, its model and its last progress line.

    Raises:
        UserError: the recipe does not fit the dataset, the folder has another run in it, or the loss diverged.
        Stopped: SIGTERM arrived or `max_hours` are over; a checkpoint was written if the workers were training.
        WorkersFailed: workers failed again and again without a newer checkpoint.

    Example:
        run = patchloom.train("recipe.yaml", "dataset", "run", workers=0)
        print(run.model, run.last.loss)
        patchloom.train(None, None, "run", resume=True, workers=0)  # continues it, if it was stopped
    """
    stop_at = stop_time(max_hours)
    if not resume and (recipe is None or dataset is None):
        raise UserError("recipe and dataset: one is missing; only a run that is resumed knows them")
    if not isinstance(recipe, Recipe):
        recipe = recipe_of_run(out) if recipe is None else load_recipe(recipe)
    if min_workers is not None and not 1 <= min_workers <= workers:
        raise UserError(f"--min-workers {min_workers} is not between 1 and --workers {workers}: lower it")
    rows = open_dataset(dataset_of_run(out) if dataset is None else dataset)
    card = new_model_card(recipe, rows)
    warning = unexpected_data(recipe, rows.card)
    if warning:
        say(f"  warning: {warning}")
    if not (workers and os.environ.get("RAY_ADDRESS")):  # on a cluster, each node checks its own cache
        recipe_plan(rows, recipe)
    paths = UsedPaths(read=(rows.address,), written=(out,))
    with ExitStack() as stack:
        if workers and not Folder.at(out).has(RUN_FILE):
            resources = stack.enter_context(room_for_workers(workers, min_workers, resources, paths))
        folder = stack.enter_context(open_run_folder(Folder.at(out), recipe, card, rows, resume, parent_run, run_name))
        job = TrainJob(
            recipe, card, rows.address, folder.address.address, allowed_backbones(), microbatch, compile, profile,
            folder.owner, draws_version=RunCard.read(folder.path).format_version,
        )  # fmt: skip
        with _closing_run(folder.path):
            if folder.is_finished:
                say(f"{out} is finished: its model is {out}/model")
                with MlflowForwarder(folder.path, folder.ensure_run, lambda _: None):
                    pass  # sends lines that MLflow has not received yet
            else:
                _launch(job, folder, workers, min_workers, show, resources, stop_at)
    return TrainResult(folder.path, RunCard.read(folder.path).run_id, last_progress(folder.path), out)


@contextmanager
def _closing_run(folder: Path) -> Iterator[None]:
    """End the MLflow run with the status of the block."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Stopped, SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        end_tracking(folder, status)


def _launch(
    job: TrainJob,
    folder: OpenRun,
    workers: int,
    min_workers: int | None,
    show: ShowLine | None,
    resources: Resources,
    stop_at: float | None,
) -> None:
    """Run the workers, and show and forward their progress lines."""
    control = prepare_control(folder.address, stop_at)
    watch_unsent = partial(MetricRecorder("train", job.recipe.name, folder.address).record, UNSENT_LINES)
    with nullcontext(show) if show else _progress_bar(job.recipe, folder.path) as show_line:
        with (
            MlflowForwarder(folder.path, folder.ensure_run, show_line, folder.mlflow_answers, watch_unsent),
            ProgressFetcher(folder.address, folder.path) if folder.address.is_remote else nullcontext(),
        ):
            outcome = run_workers(
                train_worker,
                job,
                workers,
                folder.path / ".ray",
                "train",
                control,
                min_workers,
                resources=resources,
                paths=UsedPaths(read=(job.dataset,), written=(job.folder,)),
            )
        _check_outcome(folder.address, outcome)
    control.reset()  # a finished run folder has no files of control


@contextmanager
def _progress_bar(recipe: Recipe, folder: Path) -> Iterator[ShowLine]:
    """A progress bar, and the function that updates it with a progress line."""
    with progress(f"training {recipe.name}", recipe.train.images, "images") as meter:
        first_step = resume_meter(meter, folder)

        def show(line: ProgressLine) -> None:
            if line.step > first_step:
                sizes = (f"{size}px {loss:.3f}" for size, loss in line.loss_by_patch_size.items())
                loss = "not finite" if line.loss is None else f"{line.loss:.3f}"
                waits = (
                    f"{line.data_wait_share:.0%} waiting for data" if line.data_wait_share >= SHOWN_WAIT_SHARE else ""
                )
                share = f"{line.model_flops_utilisation:.0%} of peak FLOP/s" if line.has_utilisation else ""
                last = "" if line.eta_seconds else "writing the model"  # steps are planned, counted images are not
                meter.update(line.images_seen, last, f"loss {loss}", waits, share, *sizes)

        yield show


def resume_meter(meter: Meter, folder: Path) -> int:
    """Start a progress bar at the newest checkpoint of a run; returns its step, 0 for a new run."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return 0
    card = read_checkpoint_card(newest)
    say(f"  continuing from step {card.step:,} ({card.images_seen:,} images)")
    meter.begin(card.images_seen)
    return card.step


def _check_outcome(folder: Folder, outcome: TrainOutcome) -> None:
    """Raise Stopped or UserError unless the run is finished."""
    if outcome.unsent:
        raise UserError(outcome.unsent)
    complete = whole_checkpoints(folder)
    if outcome.verdict == Verdict.FINISHED and not complete:
        say(f"  warning: {folder} has its model, but no checkpoint could be written: it cannot be made longer")
    if outcome.verdict == Verdict.STOPPED:
        if not complete:  # the disk was full
            raise Stopped(f"{folder} has no checkpoint, because none could be written: free disk space and start again")
        step = int(complete[-1].rsplit("-", 1)[-1])
        raise Stopped(f"{folder} has a checkpoint of step {step:,}: continue with --resume")
    if outcome.verdict == Verdict.DIVERGED:
        checkpoint = f"the newest checkpoint is {folder}/{complete[-1]}" if complete else "there is no checkpoint"
        line = outcome.line
        assert line is not None  # worker 0 wrote it
        loss = "not finite" if line.loss is None else f"{line.loss:g}"
        if line.loss_scale is not None and line.loss_scale < LEAST_LOSS_SCALE:
            raise UserError(
                f"{folder}: the gradients of fp16 overflow at every loss scale, which fell to {line.loss_scale:.0e} by "
                f"step {line.step:,} (loss {loss}), and {checkpoint}: start again with train.precision bf16 or fp32"
            )
        raise UserError(
            f"{folder}: the loss diverged by step {line.step:,} (loss {loss}), and {checkpoint}: "
            "start again with a lower optimizer.lr or a longer optimizer.lr_rampup_images"
        )
