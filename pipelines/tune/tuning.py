"""Tune: many short runs of one recipe on Ray Tune, with equal budgets, ranked by one number."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import yaml

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.pipelines.pages.html import is_for_pages
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.train.mlflow_run import end_tracking
from patchloom.pipelines.tune.final_samples import measure_samples
from patchloom.pipelines.tune.frontier import cost_of_best
from patchloom.pipelines.tune.page import write_search_page
from patchloom.pipelines.tune.planning import Trial, check_space, full_length_recipe, plan_trials, search_flops
from patchloom.pipelines.tune.ranking import RankedSetting, of_budget, ranked, setting_title
from patchloom.pipelines.tune.summary import about_best, is_decided
from patchloom.pipelines.tune.trials import (
    TRIAL_FILE,
    TRIALS_FOLDER,
    SearchJob,
    asha_settings,
    is_finished,
    optuna_settings,
    row_of_ended_trial,
    run_trial,
    search_job,
    step_of_trial,
    trial_folder,
    trial_job,
)
from patchloom.platform.compute.actors import map_on_actors
from patchloom.platform.compute.messages import connected_ray
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.compute.tuner import EndedJob, TuneResources, room_for_trials, run_on_tune
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.copies import ProgressFetcher, local_copy
from patchloom.platform.files.fence import fenced, holds_fence
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.storage import locked, make_folder
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.recipe.run_recipe import Recipe, recipe_yaml
from patchloom.platform.recipe.search import Search, load_search
from patchloom.platform.records.run import PROGRESS_FILE, RUN_FILE
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
from patchloom.platform.tracking.origin import command_line
from patchloom.platform.tracking.runs import (
    begin_run,
    end_run,
    log_artifacts,
    log_dataset,
    log_metrics,
    reopen_run,
    run_exists,
)
from patchloom.redaction import redacted, redacted_values

STATUS_ORDER = ("finished", "stopped", "failed")
PAGE_FILE, BEST_FILE, DEFINITION_FILE = "report.html", "best.yaml", "search.yaml"
RAY_FOLDER = ".ray"  # the state of Ray Tune, from which a killed search continues
PROGRESS_INTERVAL_S = 1.0
FETCH_INTERVAL_S = 5.0  # of progress files of a remote search


@dataclass(frozen=True)
class TuneResult:
    """A finished search.

    Args:
        folder: the search folder; for a remote search a local copy of what its page shows.
        run_id: id of the MLflow run.
        trials: best first.
        best: the recipe of the best trial at full length.
        address: the search folder as other commands take it.
    """

    folder: Path
    run_id: str
    trials: list[TrialRow]
    best: Recipe
    address: str


def tune(
    search: str,
    dataset: str,
    out: str,
    *,
    restore: bool = False,
    add_seeds: int = 0,
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
        out: the search folder to write; may be remote.
        restore: continue a stopped search: finished trials are kept, others resume from their checkpoints.
        add_seeds: with `restore`, run so many further seeds of each setting. If that is stopped, continue it without.
        concurrent: trials that run in parallel. By default as many as fit.
        workers: Ray Train workers per trial; 0 trains in the trial's own process.
        gpus: GPUs per trial, such as 0.25 for four trials on one GPU, or per worker of a trial: `gpus_per_worker` of
            the resources. By default 1 if there are GPUs.
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
    _check_without_keys(dataset, out)
    require_reachable()
    definition, base = load_search(search)
    _check_without_keys(base.train.init_from or "")
    rows = open_dataset(dataset)
    if not len(rows.split("held_out", base.data.held_out_fraction)):
        raise UserError("data.held_out_fraction leaves no held-out row, so trials cannot be compared: raise it")
    folder = Folder.at(out)
    check_output_folder(folder, "search", SEARCH_FILE, {DEFINITION_FILE: _definition_yaml(definition)})
    if add_seeds:
        _check_added_seeds(definition, folder, restore)
    is_measured = _is_measured(definition, folder)
    planned = _planned_trials(definition, base, rows, folder, add_seeds, is_measured)
    if gpus is not None:
        resources = resources.with_values(gpus_per_worker=gpus)
    where = TuneResources(concurrent, workers, resources)
    with ExitStack() as stack:
        if not folder.has(SEARCH_FILE):
            where = stack.enter_context(room_for_trials(where, UsedPaths(read=(rows.address,), written=(out,))))
        if is_measured:
            planned = _measured_trials(definition, base, rows, where.nodes)
        owner = stack.enter_context(_only_user(folder))
        run_id = _open_folder(folder, definition, rows, restore, planned, add_seeds)
        with _mlflow_run(folder, run_id):
            started = time.monotonic()
            shared = search_job(definition, base, rows, folder, run_id, workers, where.nodes)
            flops = search_flops(definition, base, rows, planned)
            trials = _run_trials(folder, shared, planned, where, flops)
            if definition.final is not None:
                trials = measure_samples(folder, trials, definition.final, rows)
            order = ranked(of_budget(trials), definition.metric)
            if not holds_fence(folder, owner):
                raise UserError(f"{folder} was taken over by another command: wait until that one ends")
            table, best = _write_results(folder, base, trials, order)
            spent = {"trials": len(trials), "seconds": time.monotonic() - started}
            log_metrics(run_id, {definition.metric: order[0].mean, **spent})
            here = _write_page(folder, run_id)
    _say_best(folder, order)
    if register_best:
        register(trial_folder(folder, order[0].best).address, register_best)
    return TuneResult(here, run_id, table, best, out)


def _write_page(folder: Folder, run_id: str) -> Path:
    """Write the page of a finished search, and send it to MLflow; returns a local folder with what it shows."""
    here = local_copy(folder.address, is_for_pages)
    page = write_search_page(here, here / PAGE_FILE)
    if folder.is_remote:
        folder.put(page, PAGE_FILE)
    log_artifacts(run_id, here / TRIALS_FILE, here / BEST_FILE, page)
    return here


def _say_best(folder: Folder, order: list[RankedSetting]) -> None:
    """Print which setting is the best, what it cost, whether the seeds decide it, and where the page is."""
    best = order[0]
    say(f"  best of {len(order)} settings: {best.title}, {best.metric} {best.value_of_n()}", is_result=True)
    if cost := cost_of_best(order):
        say(f"  {cost}", is_result=True)
    say(f"  {'decided' if is_decided(order) else 'not decided'}: {about_best(order)}", is_result=True)
    if folder.is_remote:
        say(f"  its page: {folder}/{PAGE_FILE}; to see it here: patchloom report {folder} {PAGE_FILE}", is_result=True)
    else:
        say(f"  open {folder}/{PAGE_FILE}", is_result=True)


@contextmanager
def _only_user(folder: Folder) -> Iterator[str]:
    """Keep other commands out of a search folder during the block. Yields the owner of the fence of a remote one."""
    with fenced(folder) as owner, nullcontext() if folder.is_remote else locked(make_folder(folder.path)):
        yield owner


def _check_added_seeds(search: Search, folder: Folder, restore: bool) -> None:
    """Raise UserError if a folder has no search to which seeds can be added."""
    if not (restore and folder.has(SEARCH_FILE)):
        raise UserError(f"seeds can only be added to a search that was run: {folder} needs one, and --restore")
    if search.is_adaptive or search.stops_early:
        raise UserError("seeds can only be added to a grid search without asha: repeat the best settings with a grid")


def _planned_trials(
    search: Search, base: Recipe, dataset: Dataset, folder: Folder, add_seeds: int, is_measured: bool
) -> list[Trial]:
    """The trials of a grid search. An adaptive search has none yet; a few of its settings are tried instead.

    If their lengths are measured later, they have one image each here: a plan that is wrong is refused before a
    command waits for nodes.
    """
    if search.is_adaptive:
        check_space(search, base, dataset)
        return []
    if is_measured:
        return plan_trials(search, base, dataset, [1] * len(search.settings()))
    if not folder.has(SEARCH_FILE):
        return plan_trials(search, base, dataset)
    card = SearchCard.read(folder)
    return plan_trials(search, base, dataset, card.images, card.added_seeds + add_seeds)


def _is_measured(search: Search, folder: Folder) -> bool:
    """Whether the lengths of trials follow from measured steps; those of a search that was started are in its card."""
    return search.budget.seconds is not None and not search.is_adaptive and not folder.has(SEARCH_FILE)


class _Planner:
    """Plans trials in a process like theirs, on the same kind of node and GPU, where their steps are measured."""

    def __init__(self, backbones: tuple[str, ...]) -> None:
        allow_backbones(*backbones)

    def __call__(self, searched: tuple[Search, Recipe, str], report: Callable[[int], None]) -> list[Trial]:
        search, base, dataset = searched
        return plan_trials(search, base, open_dataset(dataset))


def _measured_trials(search: Search, base: Recipe, dataset: Dataset, nodes: Resources) -> list[Trial]:
    say("  measuring some steps of each setting")
    searched, workers = (search, base, dataset.address), 0 if connected_ray() is None else 1
    ((_, planned),) = map_on_actors(_Planner, allowed_backbones(), [searched], workers, on_gpus=True, resources=nodes)
    return planned


def _open_folder(
    folder: Folder, search: Search, dataset: Dataset, restore: bool, planned: list[Trial], add_seeds: int
) -> str:
    """Start the folder of a search, or check that it has the same search; returns the MLflow run."""
    if folder.has(SEARCH_FILE):
        if not restore:
            raise UserError(f"{folder} has a search in it: pass --restore to continue it, or choose another folder")
        card = SearchCard.read(folder)
        same = redacted_values(card.search.model_dump(mode="json")) == redacted_values(search.model_dump(mode="json"))
        if not same or card.dataset_fingerprint != dataset.fingerprint:
            raise UserError(f"{folder} has another search or dataset: pass the same ones, or choose another folder")
        if run_exists(card.run_id):
            run_id = card.run_id
            reopen_run(run_id, is_made_longer=add_seeds > 0)
        else:  # another store
            run_id = _begin_mlflow_run(folder, search, dataset)
        changed = card.model_copy(update={"run_id": run_id, "added_seeds": card.added_seeds + add_seeds})
        if changed != card:
            changed.write(folder)
        return run_id
    run_id = _begin_mlflow_run(folder, search, dataset)
    folder.write(DEFINITION_FILE, _definition_yaml(search))
    lengths = [trial.expected_images for trial in planned if trial.repeat == 0 and trial.equal is None]
    command = redacted(command_line())
    card = SearchCard(
        run_id=run_id, images=lengths, search=search, dataset_fingerprint=dataset.fingerprint, command=command
    )
    card.write(folder)
    return run_id


def _check_without_keys(*addresses: str) -> None:
    """Raise UserError for an address with keys: Ray Tune keeps the jobs of trials in files of the search."""
    for address in addresses:
        if redacted(address) != address:
            raise UserError(
                f"{redacted(address)}: an address with keys cannot be part of a search, which stores its trials: set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node instead"
            )


def _definition_yaml(search: Search) -> str:
    return redacted(yaml.safe_dump(search.model_dump(mode="json"), sort_keys=False))


def _begin_mlflow_run(folder: Folder, search: Search, dataset: Dataset) -> str:
    values = search.model_dump(mode="json")
    tags = {"patchloom.dataset": dataset.fingerprint, "patchloom.version": __version__, "patchloom.folder": str(folder)}
    keys = ", ".join(f"`{key}`" for key in search.space)
    description = f"Searches {keys} in runs of `{search.recipe}`, ranked by `{search.metric}`. Its trials are below it."
    run_id = begin_run(f"search {search.name}", "search", values, tags, description=description)
    log_dataset(run_id, dataset.address, dataset.fingerprint)
    return run_id


@contextmanager
def _mlflow_run(folder: Folder, run_id: str) -> Iterator[None]:
    """End the MLflow run of the search after the block, and those of trials that the block left unfinished."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # the error of the block is the one to report
            _end_tracking_of_trials(folder)
            end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    end_run(run_id)


def _end_tracking_of_trials(folder: Folder) -> None:
    """End the MLflow runs of trials without a result as killed."""
    names = folder.folder(TRIALS_FOLDER).files()
    for name in [name.partition("/")[0] for name in names if name.endswith(f"/{RUN_FILE}") and name.count("/") == 1]:
        if f"{name}/{TRIAL_FILE}" not in names:
            trial = folder.folder(TRIALS_FOLDER).folder(name)
            end_tracking(local_copy(trial.address, lambda file: file == RUN_FILE), "KILLED")


def _run_trials(
    folder: Folder, shared: SearchJob, planned: list[Trial], resources: TuneResources, flops: float
) -> list[TrialRow]:
    """Run the trials that are not finished; returns the rows of all in order. flops: expected for all together."""
    search = shared.search
    is_dynamic = search.is_adaptive or search.stops_early
    if is_dynamic and folder.has(TRIALS_FILE):
        return sorted(read_trials(folder), key=lambda row: row.name)
    jobs = [trial_job(shared, number, trial) for number, trial in enumerate(planned)]
    # asha compares all trials, so all run again; a finished one returns at once
    done = [] if is_dynamic else [job for job in jobs if is_finished(job)]
    todo = [job for job in jobs if job not in done]
    ended = [EndedJob(job) for job in done]
    with progress(f"searching {search.name}", flops / 1e9, "GFLOP") as meter, _watched(folder, meter):
        if todo or search.is_adaptive:
            source = todo or optuna_settings(shared)
            state = folder.folder(RAY_FOLDER)
            ended += run_on_tune(run_trial, source, state, resources, step_of_trial, asha_settings(search))
    folder.remove_folder(RAY_FOLDER)
    rows = [row_of_ended_trial(found.job, found.problem) for found in ended]
    return sorted(rows, key=lambda row: row.name)


def _write_results(
    folder: Folder, base: Recipe, trials: list[TrialRow], order: list[RankedSetting]
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
    folder.write(BEST_FILE, recipe_yaml(best))
    return table, best


@contextmanager
def _watched(folder: Folder, meter: Meter) -> Iterator[None]:
    """Show the progress of all trials of a search while the block runs, from their progress files."""
    here = local_copy(folder.address, _is_progress) if folder.is_remote else folder.path
    fetcher = ProgressFetcher(folder, here, _is_progress, FETCH_INTERVAL_S) if folder.is_remote else nullcontext()
    with _shown_progress(here / TRIALS_FOLDER, meter), fetcher:  # fetches the last lines before they are shown
        yield


def _is_progress(name: str) -> bool:
    return name.startswith(f"{TRIALS_FOLDER}/") and name.endswith(f"/{PROGRESS_FILE}")


@contextmanager
def _shown_progress(trials: Path, meter: Meter) -> Iterator[None]:
    stop = threading.Event()
    tails: dict[Path, JsonLinesTail] = {}
    gflops: dict[Path, float] = {}

    def update() -> None:
        for path in trials.glob(f"*/{PROGRESS_FILE}"):
            for line in tails.setdefault(path, JsonLinesTail(path)).new_lines():
                gflops[path] = line.flops / 1e9
        if gflops:
            meter.update(sum(gflops.values()), f"{len(gflops)} trial{'s' if len(gflops) > 1 else ''} started")

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
