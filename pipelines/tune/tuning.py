"""Tune: many short runs of one recipe on Ray Tune, with equal budgets, ranked by one number."""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample.sampling import sample
from patchloom.pipelines.train.mlflow_run import end_tracking
from patchloom.pipelines.tune.frontier import cost_of_best
from patchloom.pipelines.tune.page import write_search_page
from patchloom.pipelines.tune.planning import Trial, check_space, full_length_recipe, plan_trials, search_flops
from patchloom.pipelines.tune.ranking import RankedSetting, ranked, setting_title
from patchloom.pipelines.tune.trials import (
    TRIAL_FILE,
    SearchJob,
    asha_settings,
    is_finished,
    optuna_settings,
    row_of_ended_trial,
    run_trial,
    search_job,
    trial_job,
)
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.compute.tuner import EndedJob, TuneResources, room_for_trials, run_on_tune
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.storage import local_path, locked, make_folder, write_atomic, write_json
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.recipe.run_recipe import Recipe, recipe_yaml
from patchloom.platform.recipe.search import FinalEvaluation, Search, load_search
from patchloom.platform.records.run import PROGRESS_FILE
from patchloom.platform.records.search import (
    SEARCH_FILE,
    TRIALS_FILE,
    SearchCard,
    TrialRow,
    read_trials,
    write_trials,
)
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.forwarder import JsonLinesTail
from patchloom.platform.tracking.names import check_name
from patchloom.platform.tracking.runs import (
    begin_run,
    end_run,
    log_artifacts,
    log_dataset,
    log_metrics,
    run_exists,
)

STATUS_ORDER = ("finished", "stopped", "failed")
PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True)
class TuneResult:
    """A finished search: its trials, best first, and the recipe of the best one at full length."""

    folder: Path
    run_id: str
    trials: list[TrialRow]
    best: Recipe


def tune(
    search: str,
    dataset: str,
    out: str,
    *,
    restore: bool = False,
    concurrent: int | None = None,
    workers: int = 0,
    gpus: float | None = None,
    register_best: str | None = None,
    resources: Resources = DEFAULT_RESOURCES,
) -> TuneResult:
    """Compare recipe keys in short runs of equal cost, and write a page with the ranking.

    Each trial is a run folder in `out` and an MLflow run below the search's.

    Args:
        search: the path of a YAML file, or the name of a shipped search.
        dataset: a prepared dataset; may be remote.
        out: the search folder to write.
        restore: continue a stopped search: finished trials are kept, others resume from their checkpoints.
        concurrent: trials that run in parallel. By default as many as fit.
        workers: Ray Train workers per trial; 0 trains in the trial's own process.
        gpus: GPUs per trial, such as 0.25 for four trials on one GPU. By default 1 if there are GPUs.
        register_best: register the model of the best trial under this name.
        resources: the nodes that the trials may use. By default all.

    Returns:
        The trials, best first, and the recipe of the best trial at full length.

    Raises:
        UserError: the search does not fit the dataset, the folder has another search in it, or every trial failed.

    Example:
        result = patchloom.tune("search.yaml", "dataset", "search")
        print(result.best.patches.p)
    """
    if register_best is not None:
        check_name(register_best)
    require_reachable()
    definition, base = load_search(search)
    rows = open_dataset(dataset)
    if not len(rows.indices("held_out", base.data.held_out_fraction)):
        raise UserError("data.held_out_fraction leaves no held-out row, so trials cannot be compared: raise it")
    planned = _planned_trials(definition, base, rows, local_path(out))
    where = TuneResources(concurrent, workers, gpus, resources)
    with ExitStack() as stack:
        if not (local_path(out) / SEARCH_FILE).is_file():
            stack.enter_context(room_for_trials(where, UsedPaths(read=(rows.address,), written=(out,))))
        folder = make_folder(local_path(out))
        stack.enter_context(locked(folder))
        run_id = _open_folder(folder, definition, rows, restore, planned)
        with _mlflow_run(folder, run_id):
            started = time.monotonic()
            shared = search_job(definition, base, rows, folder, run_id, workers, resources)
            flops = search_flops(definition, base, rows, planned)
            trials = _run_trials(folder, shared, planned, where, flops)
            if definition.final is not None:
                trials = measure_final_distances(folder, trials, definition.final, rows)
            order = ranked(trials, definition.metric)
            table, best = _write_results(folder, base, trials, order)
            spent = {"trials": len(trials), "seconds": time.monotonic() - started}
            log_metrics(run_id, {definition.metric: order[0].mean, **spent})
            page = write_search_page(folder, folder / "report.html")
            log_artifacts(run_id, folder / TRIALS_FILE, folder / "best.yaml", page)
    say(f"  best of {len(order)} settings: {order[0].title}, {definition.metric} {order[0].value_of_n()}")
    if cost := cost_of_best(order):
        say(f"  {cost}")
    say(f"  open {page}")
    if register_best:
        register(str(folder / "trials" / order[0].best.name), register_best)
    return TuneResult(folder, run_id, table, best)


def _planned_trials(search: Search, base: Recipe, dataset: Dataset, folder: Path) -> list[Trial]:
    """The trials of a grid search. An adaptive search has none yet; a few of its settings are tried instead."""
    if search.is_adaptive:
        check_space(search, base, dataset)
        return []
    known = SearchCard.read(folder).images if (folder / SEARCH_FILE).is_file() else None
    return plan_trials(search, base, dataset, known)


def _open_folder(folder: Path, search: Search, dataset: Dataset, restore: bool, planned: list[Trial]) -> str:
    """Start the folder of a search, or check that it has the same search; returns the MLflow run."""
    if (folder / SEARCH_FILE).is_file():
        if not restore:
            raise UserError(f"{folder} has a search in it: pass --restore to continue it, or choose another folder")
        card = SearchCard.read(folder)
        if (card.search, card.dataset_fingerprint) != (search, dataset.fingerprint):
            raise UserError(f"{folder} has another search or dataset: pass the same ones, or choose another folder")
        if run_exists(card.run_id):
            return card.run_id
        card = card.model_copy(update={"run_id": _begin_mlflow_run(folder, search, dataset)})  # another store
        card.write(folder)
        return card.run_id
    run_id = _begin_mlflow_run(folder, search, dataset)
    write_atomic(folder / "search.yaml", yaml.safe_dump(search.model_dump(mode="json"), sort_keys=False))
    lengths = [trial.recipe.train.images if trial.recipe else None for trial in planned if trial.repeat == 0]
    SearchCard(run_id=run_id, images=lengths, search=search, dataset_fingerprint=dataset.fingerprint).write(folder)
    return run_id


def _begin_mlflow_run(folder: Path, search: Search, dataset: Dataset) -> str:
    values = search.model_dump(mode="json")
    tags = {"patchloom.dataset": dataset.fingerprint, "patchloom.version": __version__, "patchloom.folder": str(folder)}
    run_id = begin_run(search.name, "search", values, tags)
    log_dataset(run_id, dataset.address, dataset.fingerprint)
    return run_id


@contextmanager
def _mlflow_run(folder: Path, run_id: str) -> Iterator[None]:
    """End the MLflow run of the search after the block, and those of trials that the block left unfinished."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # the error of the block is the one to report
            for run in sorted((folder / "trials").glob("*/run.json")):
                if not (run.parent / TRIAL_FILE).is_file():
                    end_tracking(run.parent, "KILLED")
            end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    end_run(run_id)


def _run_trials(
    folder: Path, shared: SearchJob, planned: list[Trial], resources: TuneResources, flops: float
) -> list[TrialRow]:
    """Run the trials that are not finished; returns the rows of all in order. flops: expected for all together."""
    search = shared.search
    is_dynamic = search.is_adaptive or search.stops_early
    if is_dynamic and (folder / TRIALS_FILE).is_file():
        return sorted(read_trials(folder), key=lambda row: row.name)
    jobs = [trial_job(shared, number, trial) for number, trial in enumerate(planned)]
    # asha compares all trials, so all run again; a finished one returns at once
    done = [] if is_dynamic else [job for job in jobs if is_finished(job.folder, job.settings)]
    todo = [job for job in jobs if job not in done]
    ended = [EndedJob(job) for job in done]
    with progress(f"searching {search.name}", flops / 1e9, "GFLOP") as meter, _watched(folder / "trials", meter):
        if todo or search.is_adaptive:
            source = todo or optuna_settings(shared)
            ended += run_on_tune(run_trial, source, folder / ".ray", resources, asha_settings(search))
    shutil.rmtree(folder / ".ray", ignore_errors=True)
    rows = [row_of_ended_trial(found.job, found.problem) for found in ended]
    return sorted(rows, key=lambda row: row.name)


def _write_results(
    folder: Path, base: Recipe, trials: list[TrialRow], order: list[RankedSetting]
) -> tuple[list[TrialRow], Recipe]:
    """Write the table and the best recipe; returns the trials, best first, and that recipe."""
    for trial in trials:
        if trial.status == "failed":
            say(f"  trial {trial.name} ({setting_title(trial.settings)}) failed: {trial.error}")
    best_first = [trial for setting in order for trial in setting.trials]
    rest = [trial for trial in trials if trial not in best_first]
    table = best_first + sorted(rest, key=lambda trial: STATUS_ORDER.index(trial.status))
    write_trials(folder, table)
    if not order:
        raise UserError(f"all {len(trials)} trials failed; the first one: {trials[0].error}")
    best = full_length_recipe(base, order[0].settings)
    write_atomic(folder / "best.yaml", recipe_yaml(best))
    return table, best


@contextmanager
def _watched(trials: Path, meter: Meter) -> Iterator[None]:
    """Show the progress of many runs while the block runs, from their progress files."""
    stop = threading.Event()
    tails: dict[Path, JsonLinesTail] = {}
    gflops: dict[Path, float] = {}

    def update() -> None:
        for path in trials.glob(f"*/{PROGRESS_FILE}"):
            for line in tails.setdefault(path, JsonLinesTail(path)).new_lines():
                gflops[path] = line.flops / 1e9
        if gflops:
            meter.update(sum(gflops.values()), f"{len(gflops)} trials started")

    def watch() -> None:
        while not stop.wait(PROGRESS_INTERVAL_S):
            update()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        update()


def measure_final_distances(
    folder: Path, trials: list[TrialRow], final: FinalEvaluation, dataset: Dataset
) -> list[TrialRow]:
    """Sample the model of every finished trial and measure the distance of its samples to the dataset.

    Distances from an earlier call are kept. Returns the rows with their `final_distance`.
    """
    return [
        _with_final_distance(folder / "trials" / trial.name, trial, final, dataset)
        if trial.status == "finished" and trial.final_distance is None
        else trial
        for trial in trials
    ]


def _with_final_distance(run: Path, trial: TrialRow, final: FinalEvaluation, dataset: Dataset) -> TrialRow:
    say(f"  trial {trial.name}: {final.samples} samples for the final distance")
    sample(str(run), str(run / "samples"), f"0-{final.samples - 1}", steps=final.steps)
    metric, name = ("fid", "fid") if final.features == "inception" else ("fd", "frechet_distance")
    measured = evaluate(str(run / "samples"), dataset.address, metrics=(metric,), features=final.features)
    distance = measured.metrics[name]
    assert isinstance(distance, float)
    row = trial.model_copy(update={"final_distance": distance})
    write_json(run / TRIAL_FILE, row.to_dict())
    if row.run_id is not None:
        log_metrics(row.run_id, {"final_distance": distance})
    return row
