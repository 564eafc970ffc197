"""Trials: what one run of a search does in its own process, and its row in the table."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from patchloom.errors import UserError, WorkersFailed
from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.pipelines.train.control import newest_step
from patchloom.pipelines.train.mlflow_run import end_tracking, ensure_mlflow_run
from patchloom.pipelines.train.resuming import RECIPE_FILE
from patchloom.pipelines.train.run import step_settings
from patchloom.pipelines.train.shard_plan import training_rows
from patchloom.pipelines.train.training import ShowLine, train
from patchloom.pipelines.tune.planning import CostUnit, Trial, recipe_of_setting, trial_recipe
from patchloom.pipelines.tune.ranking import setting_title
from patchloom.platform.compute.messages import forward_messages
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.session import begin_work
from patchloom.platform.compute.tuner import AshaSettings, OptunaSettings
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import locked
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.recipe.search import Search
from patchloom.platform.records.run import RUN_FILE, ProgressLine, RunCard, read_progress
from patchloom.platform.records.search import TrialRow
from patchloom.platform.tracking.forwarder import MlflowForwarder
from patchloom.platform.tracking.store import store_environment, use_stores
from patchloom.redaction import redacted_values

TRIALS_FOLDER = "trials"
TRIAL_FILE = "trial.json"  # in the run folder of a trial that finished or failed: its row of the table
TABLE_FIELDS = {
    "updates", "images_seen", "full_size_images", "flops", "loss", "held_out_loss", "held_out_loss_by_sigma",
    "preview_frechet_distance", "preview",
}  # fmt: skip
BUDGET_PERCENT = "budget_percent"  # spent share of the trial's own budget, by which asha compares trials
BEFORE_END_PERCENT = 99.9  # asha stops a trial at 100 %, before it has written its model
STOPPED_PROCESS_WAIT_S = 60.0


@dataclass(frozen=True)
class SearchJob:
    """What all trials of a search share."""

    search: Search
    base: Recipe
    dataset: str
    trials_folder: Folder
    parent_run: str  # the MLflow run of the search
    stores: dict[str, str]  # environment variables of the MLflow stores, without passwords: Ray Tune stores jobs
    backbones: tuple[str, ...]
    workers: int
    resources: Resources


@dataclass(frozen=True)
class TrialJob:
    """One trial as its process gets it. An adaptive search leaves the recipe to the trial's process."""

    shared: SearchJob
    name: str
    settings: dict[str, JsonValue]
    repeat: int = 0
    recipe: Recipe | None = None
    problem: str = ""
    equal: CostUnit | None = None

    @property
    def folder(self) -> Folder:
        """The run folder of the trial."""
        return self.shared.trials_folder.folder(self.name)

    @property
    def title(self) -> str:
        """`trial 003: p 0.25, schedule stochastic, seed 1`: the name of the trial's run on MLflow's pages."""
        seed = "" if self.recipe is None else f", seed {self.recipe.seed}"
        cost = "" if self.equal is None else f", equal {self.equal}"
        return f"trial {self.name}: {setting_title(self.settings)}{seed}{cost}"

    def row(self, status: Literal["finished", "stopped", "failed"], **fields: Any) -> TrialRow:
        """The trial's row of the table."""
        cost = {} if self.equal is None else {"equal": self.equal}
        return TrialRow(name=self.name, settings=self.settings, repeat=self.repeat, **cost, status=status, **fields)


def search_job(
    search: Search,
    base: Recipe,
    dataset: Dataset,
    folder: Folder,
    run_id: str,
    workers: int,
    resources: Resources = DEFAULT_RESOURCES,
) -> SearchJob:
    """What all trials of a search in `folder` share."""
    return SearchJob(
        search,
        base,
        dataset.address,
        folder.folder(TRIALS_FOLDER),
        run_id,
        redacted_values(store_environment()),
        allowed_backbones(),
        workers,
        resources,
    )


def trial_job(shared: SearchJob, number: int, trial: Trial) -> TrialJob:
    """The job of a planned trial."""
    return TrialJob(shared, trial_name(number), trial.settings, trial.repeat, trial.recipe, trial.problem, trial.equal)


def trial_name(number: int) -> str:
    """The name of a trial's folder."""
    return f"{number:03d}"


@dataclass(frozen=True)
class SuggestTrial:
    """Turns the suggestions of an Optuna trial into a job."""

    shared: SearchJob

    def __call__(self, optuna_trial: Any) -> TrialJob:
        """The job of one trial."""
        return TrialJob(self.shared, trial_name(optuna_trial.number), self.shared.search.suggest(optuna_trial))


def optuna_settings(shared: SearchJob) -> OptunaSettings[TrialJob]:
    """How an adaptive search finds its settings."""
    search = shared.search
    objectives = (search.metric, "flops") if search.searcher == "frontier" else (search.metric,)
    return OptunaSettings(SuggestTrial(shared), search.trials, objectives, search.seed)


def asha_settings(search: Search) -> AshaSettings | None:
    """How a search stops trials early; None if it does not."""
    if not search.stops_early:
        return None
    return AshaSettings(search.metric, BUDGET_PERCENT, 100 * search.scheduler.grace, search.scheduler.reduction)


def run_trial(job: TrialJob) -> None:
    """Run one trial in its own process and report it to Ray Tune.

    A second call continues the trial, or reports what is finished. A setting that does not fit or whose loss diverges
    is a result: this function does not try it again.
    """
    from ray import tune as ray_tune

    begin_work()
    forward_messages(f"trial {job.name}: ")
    use_stores(job.shared.stores)
    allow_backbones(*job.shared.backbones)
    if not is_finished(job):
        try:
            row = _trained(job)
        except (UserError, WorkersFailed) as error:
            row = job.row("failed", error=str(error))
        job.folder.write_json(TRIAL_FILE, row.to_dict())
    row = read_trial(job.folder)
    reported = {key: row.value_of(key) for key in (job.shared.search.metric, "flops")}
    numbers = {key: value for key, value in reported.items() if value is not None}
    ray_tune.report({**numbers, BUDGET_PERCENT: BEFORE_END_PERCENT})


def trial_folder(search: Folder, trial: TrialRow) -> Folder:
    """The run folder of a trial of a search."""
    return search.folder(TRIALS_FOLDER).folder(trial.name)


def read_trial(folder: Folder) -> TrialRow:
    """The row in the run folder of a trial that finished or failed."""
    return TrialRow.parse(folder.read(TRIAL_FILE), f"{folder}/{TRIAL_FILE}")


def is_finished(job: TrialJob) -> bool:
    """Whether a trial's folder has the result of its settings."""
    if not job.folder.has(TRIAL_FILE):
        return False
    row = read_trial(job.folder)
    return row.status == "finished" and row.settings == job.settings


def step_of_trial(job: TrialJob) -> int:
    """The step of the newest checkpoint of a trial; 0 without one."""
    return newest_step(job.folder)


def row_of_ended_trial(job: TrialJob, problem: str | None) -> TrialRow:
    """The row of a trial that has ended: finished, failed with its reason, or stopped early with its last numbers."""
    if is_finished(job) or (problem is None and job.folder.has(TRIAL_FILE)):
        return read_trial(job.folder)
    if problem is not None:
        return job.row("failed", error=problem)
    here = local_copy(job.folder.address, without_tensors)
    if _took_all_steps(job, here):
        return _finish(job, here)
    find_run = functools.partial(ensure_mlflow_run, here, job.folder, job.shared.parent_run, job.title)
    with MlflowForwarder(here, find_run, lambda _: None):
        pass  # sends the lines that were left when the process was stopped
    end_tracking(here, "KILLED")
    return job.row("stopped", **last_numbers(here), run_id=RunCard.read(here).run_id)


def _took_all_steps(job: TrialJob, here: Path) -> bool:
    """Whether a trial was stopped after its last step, when only its model and its row were left to write."""
    lines = read_progress(here)
    if not lines:
        return False
    recipe, resolution = load_recipe(here / RECIPE_FILE), open_dataset(job.shared.dataset).card.resolution
    return lines[-1].step >= step_settings(recipe, resolution).updates


def _finish(job: TrialJob, here: Path) -> TrialRow:
    """Write what a trial left to write: its model and its row."""
    try:
        if not job.folder.is_remote:  # a remote folder has a fence, for which `train` waits
            with locked(here, wait_s=STOPPED_PROCESS_WAIT_S):
                pass  # its process has ended
        row = _row_of_training(job, load_recipe(here / RECIPE_FILE), lambda _: None)
    except UserError as error:
        row = job.row("failed", error=str(error))
    job.folder.write_json(TRIAL_FILE, row.to_dict())
    return row


def _trained(job: TrialJob) -> TrialRow:
    from ray import tune as ray_tune

    search = job.shared.search
    if job.problem:
        raise UserError(job.problem)
    recipe = job.recipe or _adaptive_recipe(job)

    def show(line: ProgressLine) -> None:
        if search.stops_early and line.get(search.metric) is not None:
            percent = min(BEFORE_END_PERCENT, 100 * line.images_seen / recipe.train.images)
            ray_tune.report({search.metric: line[search.metric], BUDGET_PERCENT: percent})

    return _row_of_training(job, recipe, show)


def _row_of_training(job: TrialJob, recipe: Recipe, show: ShowLine) -> TrialRow:
    """Train a trial to its end, from its newest checkpoint if it has one."""
    shared, began = job.shared, time.monotonic()
    result = train(
        recipe,
        shared.dataset,
        job.folder.address,
        workers=shared.workers,
        resources=shared.resources,
        resume=True,
        parent_run=shared.parent_run,
        run_name=job.title,
        show=show,
    )
    seconds = time.monotonic() - began
    dataset = open_dataset(shared.dataset)
    held_out = len(dataset.split("held_out", recipe.data.held_out_fraction))
    counts = {
        "training_images": len(training_rows(dataset, recipe)),
        "held_out_images": min(held_out, recipe.train.held_out_images),
    }
    numbers = last_numbers(result.folder) | {"seconds": seconds, **counts}
    row = job.row("finished", **numbers, run_id=result.run_id)
    measured_later = shared.search.metric == "final_distance"  # of samples, after all trials
    if row.value_of(shared.search.metric) is None and not measured_later:
        raise UserError(f"{shared.search.metric} was not measured in {job.folder}; its messages say why")
    return row


def _adaptive_recipe(job: TrialJob) -> Recipe:
    """The recipe of a suggested setting. A resumed trial keeps its length.

    After a kill, Optuna may give the number of a forgotten trial again. The folder of that trial is then removed.
    """
    search, dataset = job.shared.search, open_dataset(job.shared.dataset)
    wanted = recipe_of_setting(search, job.shared.base, job.settings)
    if job.folder.has(RECIPE_FILE):
        here = local_copy(job.folder.address, lambda name: name in (RECIPE_FILE, RUN_FILE))
        found = load_recipe(here / RECIPE_FILE)
        if trial_recipe(search, wanted, dataset, job.settings, length=found.train.images) == found:
            return found
        if (here / RUN_FILE).is_file():
            end_tracking(here, "KILLED")
        job.shared.trials_folder.remove_folder(job.name)
    return trial_recipe(search, wanted, dataset, job.settings)


def last_numbers(folder: Path) -> dict[str, Any]:
    """The newest value of each field of the table, also for a run that was stopped."""
    newest: dict[str, Any] = {}
    for line in read_progress(folder):
        newest |= line.model_dump(include=TABLE_FIELDS, exclude_unset=True)
    return newest
