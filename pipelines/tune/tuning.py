"""Tune: many short runs of one recipe on Ray Tune, at an equal budget, ranked by one number."""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample.sampling import sample
from patchloom.pipelines.train.mlflow_run import end_tracking
from patchloom.pipelines.tune.page import write_search_page
from patchloom.pipelines.tune.ranking import SEARCH_FILE, SEARCH_FORMAT, TRIALS_FILE, Ranked, ranked, setting_words
from patchloom.pipelines.tune.trials import (
    TRIAL,
    Trial,
    advice,
    check_space,
    full_length,
    halving,
    is_finished,
    plan_trials,
    planned_config,
    run_trial,
    search_flops,
    trial_config,
    trial_row,
)
from patchloom.platform.compute.tuner import TrialResources, run_on_tune
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.storage import (
    local_path,
    locked,
    make_folder,
    read_json,
    read_json_lines,
    write_atomic,
    write_json,
    write_json_lines,
)
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.recipe.run_recipe import Recipe, recipe_yaml
from patchloom.platform.recipe.search import FinalEvaluation, Search, load_search
from patchloom.platform.records.run import PROGRESS_FILE
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.forwarder import JsonLinesTail
from patchloom.platform.tracking.runs import (
    begin_run,
    end_run,
    flat_parameters,
    log_artifacts,
    log_dataset,
    log_metrics,
)

ORDER = ("finished", "stopped", "failed")
WATCH_EVERY_S = 1.0


@dataclass(frozen=True)
class TuneResult:
    """A finished search: its trials, best first, and the recipe of the best at full length."""

    folder: Path
    run_id: str
    trials: list[dict[str, Any]]
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

    Returns:
        The trials, best first, and the recipe of the best trial at full length.

    Raises:
        UserError: the search does not fit the dataset, the folder has another search in it, or every trial failed.

    Example:
        result = patchloom.tune("search.yaml", "dataset", "search")
        print(result.best.patches.p)
    """
    definition, base = load_search(search)
    rows = open_dataset(dataset)
    if not len(rows.indices("held_out", base.data.held_out_fraction)):
        raise UserError("data.held_out_fraction holds no row out, so trials cannot be compared: raise it")
    planned = _planned(definition, base, rows, local_path(out))
    folder = make_folder(local_path(out))
    with locked(folder):
        lengths = [trial.recipe.train.images if trial.recipe else None for trial in planned if trial.repeat == 0]
        run_id = _open_folder(folder, definition, rows, restore, lengths)
        with _closing(folder, run_id):
            began = time.monotonic()
            common = trial_config(definition, base, rows, folder, run_id, workers)
            flops = search_flops(definition, base, rows, planned)
            trials = _run_trials(folder, definition, planned, common, TrialResources(concurrent, workers, gpus), flops)
            if definition.final is not None:
                trials = measure_finals(folder, trials, definition.final, rows)
            order = ranked(trials, definition.metric)
            table, best = _conclude(folder, base, trials, order)
            spent = {"trials": len(trials), "seconds": time.monotonic() - began}
            log_metrics(run_id, {definition.metric: order[0].mean, **spent})
            page = write_search_page(folder, folder / "report.html")
            log_artifacts(run_id, folder / TRIALS_FILE, folder / "best.yaml", page)
    say(f"  best of {len(order)} settings: {order[0].words()}, {definition.metric} {order[0].value_of_n()}")
    say(f"  open {page}")
    if register_best:
        register(str(folder / "trials" / order[0].best["name"]), register_best)
    return TuneResult(folder, run_id, table, best)


def _planned(search: Search, base: Recipe, dataset: Dataset, folder: Path) -> list[Trial]:
    """The trials of a grid search; one that is advised is tried on a few settings, and its trials follow later."""
    if not search.is_adaptive:
        known = folder / SEARCH_FILE
        return plan_trials(search, base, dataset, read_json(known).get("images") if known.is_file() else None)
    check_space(search, base, dataset)
    return []


def _open_folder(folder: Path, search: Search, dataset: Dataset, restore: bool, images: list[int | None]) -> str:
    wanted = {"search": search.model_dump(mode="json"), "dataset_fingerprint": dataset.fingerprint}
    path = folder / SEARCH_FILE
    if path.is_file():
        if not restore:
            raise UserError(f"{folder} holds a search: give --restore to go on with it, or choose another folder")
        found = read_json(path)
        if {key: found.get(key) for key in wanted} != wanted:
            raise UserError(f"{folder} holds another search or dataset: give the same, or choose another folder")
        return str(found["run_id"])
    require_reachable()
    tags = {"patchloom.dataset": dataset.fingerprint, "patchloom.version": __version__, "patchloom.folder": str(folder)}
    run_id = begin_run(search.name, "search", flat_parameters(search.model_dump(mode="json")), tags)
    log_dataset(run_id, dataset.address, dataset.fingerprint)
    write_atomic(folder / "search.yaml", yaml.safe_dump(wanted["search"], sort_keys=False))
    card = {"format_version": SEARCH_FORMAT, "kind": "search", "run_id": run_id, "images": images, **wanted}
    write_json(path, card)
    return run_id


@contextmanager
def _closing(folder: Path, run_id: str) -> Iterator[None]:
    """Ends the search's MLflow run with the block, and those of trials that the block left unfinished."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # what went wrong in the block is what is told
            for run in sorted((folder / "trials").glob("*/run.json")):
                if not (run.parent / TRIAL).is_file():
                    end_tracking(run.parent, "KILLED")
            end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    end_run(run_id)


def _run_trials(
    folder: Path, search: Search, planned: list[Trial], common: dict[str, Any], resources: TrialResources, flops: float
) -> list[dict[str, Any]]:
    """Every trial's row, in their order; finished ones of an earlier call as they are. flops: of all together."""
    adapts = search.is_adaptive or search.stops_early
    if adapts and (folder / TRIALS_FILE).is_file():
        return sorted(read_json_lines(folder / TRIALS_FILE), key=lambda row: str(row["name"]))
    configs = [planned_config(common, number, trial) for number, trial in enumerate(planned)]
    done = {config["name"] for config in configs if is_finished(folder / "trials" / config["name"], config["settings"])}
    # those of a bracket belong together, and one that is finished returns at once
    todo = [config for config in configs if adapts or config["name"] not in done]
    ended: list[tuple[dict[str, Any], str | None]] = [(config, None) for config in configs if config not in todo]
    with progress(f"searching {search.name}", flops / 1e9, "GFLOP") as meter, _watched(folder / "trials", meter):
        if todo or search.is_adaptive:
            ended += run_on_tune(run_trial, todo or advice(search, common), folder / ".ray", resources, halving(search))
    shutil.rmtree(folder / ".ray", ignore_errors=True)
    rows = [trial_row(folder / "trials" / config["name"], config, problem) for config, problem in ended]
    return sorted(rows, key=lambda row: str(row["name"]))


def _conclude(
    folder: Path, base: Recipe, trials: list[dict[str, Any]], order: list[Ranked]
) -> tuple[list[dict[str, Any]], Recipe]:
    """Write the table and the best recipe; returns the trials, best first, and that recipe."""
    for trial in trials:
        if trial["status"] == "failed":
            say(f"  trial {trial['name']} ({setting_words(trial['settings'])}) failed: {trial['error']}")
    best_first = [trial for setting in order for trial in setting.trials]
    rest = [trial for trial in trials if trial not in best_first]
    table = best_first + sorted(rest, key=lambda trial: ORDER.index(trial["status"]))
    write_json_lines(folder / TRIALS_FILE, table)
    if not order:
        raise UserError(f"all {len(trials)} trials failed; the first: {trials[0]['error']}")
    best = full_length(base, order[0].settings)
    write_atomic(folder / "best.yaml", recipe_yaml(best))
    return table, best


@contextmanager
def _watched(trials: Path, meter: Meter) -> Iterator[None]:
    """Feed a meter from the progress files of many runs while the block runs."""
    stop = threading.Event()
    tails: dict[Path, JsonLinesTail] = {}
    seen: dict[Path, float] = {}

    def look() -> None:
        for path in trials.glob(f"*/{PROGRESS_FILE}"):
            for line in tails.setdefault(path, JsonLinesTail(path)).new_lines():
                seen[path] = line.flops / 1e9
        if seen:
            meter.update(sum(seen.values()), f"{len(seen)} trials begun")

    def watch() -> None:
        while not stop.wait(WATCH_EVERY_S):
            look()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


def measure_finals(
    folder: Path, trials: list[dict[str, Any]], final: FinalEvaluation, dataset: Dataset
) -> list[dict[str, Any]]:
    """Sample every finished trial's model and measure the distance of its samples to the dataset.

    What an earlier call measured stays. Returns the rows with `final_distance` in them.
    """
    rows = []
    for trial in trials:
        run = folder / "trials" / trial["name"]
        if trial["status"] == "finished" and "final_distance" not in trial:
            seeds = f"0-{final.samples - 1}"
            say(f"  trial {trial['name']}: {final.samples} samples for the final distance")
            sample(str(run), str(run / "samples"), seeds, steps=final.steps)
            metric, name = ("fid", "fid") if final.features == "inception" else ("fd", "frechet_distance")
            measured = evaluate(str(run / "samples"), dataset.address, metrics=(metric,), features=final.features)
            trial = trial | {"final_distance": measured["metrics"][name]}
            write_json(run / TRIAL, trial)
            log_metrics(trial["run_id"], {"final_distance": trial["final_distance"]})
        rows.append(trial)
    return rows
