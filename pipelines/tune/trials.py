"""Trials: the runs of a search, planned at an equal budget, and what one of them does in its own process."""

import functools
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.models.cards import DenoiserConfig
from patchloom.models.cost import measured_seconds_of_crop, step_cost
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import training_flops
from patchloom.models.generate import one_thread
from patchloom.models.loss import HELD_OUT_SIGMAS
from patchloom.models.normalisation import identity_normalisation
from patchloom.models.step_plan import StepSettings
from patchloom.pipelines.train.mlflow_run import end_tracking, tracked
from patchloom.pipelines.train.monitor import HELD_OUT_IMAGES
from patchloom.pipelines.train.run import step_settings
from patchloom.pipelines.train.training import new_model_card, train
from patchloom.pipelines.tune.ranking import setting_words
from patchloom.platform.compute.session import quiet_environment
from patchloom.platform.compute.tuner import AshaSettings, OptunaSettings
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import make_folder, read_json, write_json
from patchloom.platform.recipe.run_recipe import Recipe, check_recipe, load_recipe, with_values
from patchloom.platform.recipe.search import BUDGET_SHARE, Search, TrialBudget
from patchloom.platform.recipe.sections import checked
from patchloom.platform.records.run import ProgressLine, RunCard, read_progress
from patchloom.platform.tracking.client import tracking_uri
from patchloom.platform.tracking.forwarder import MlflowForwarder

TRIAL = "trial.json"  # in a trial's run folder: its row of the table, once it is finished or has failed for good
KEPT = (
    "updates", "images_seen", "full_size_images", "flops", "loss", "held_out_loss", "held_out_loss_by_sigma",
    "preview_frechet_distance", "preview",
)  # fmt: skip
BUDGET_PERCENT = "budget_percent"  # how much of its own budget a trial has spent, by which asha compares
DRAWS_TRIED = 8
TRAINING_OVER_FORWARD = 3  # a backward pass costs two forward ones
ALMOST_ALL = 99.9  # asha ends a trial that has spent 100 %, before it has written its model


@dataclass(frozen=True)
class Trial:
    """One run of a search: a setting, which repeat of it, and its recipe, or why there can be none."""

    settings: dict[str, Any]
    repeat: int
    recipe: Recipe | None
    problem: str = ""


def plan_trials(search: Search, base: Recipe, dataset: Dataset, lengths: list[int | None] | None = None) -> list[Trial]:
    """Every trial of a grid search in order; one whose setting does not fit the dataset has a problem and no recipe.

    lengths: what an earlier call found that the budget of each setting buys (a budget in seconds is measured once).
    Raises UserError for a setting that no recipe can have, and where no setting at all fits.
    """
    planned = []
    for number, setting in enumerate(search.settings()):
        known = lengths[number] if lengths else None
        planned += [_planned(search, base, dataset, setting, number, repeat, known) for repeat in range(search.repeats)]
    if all(trial.recipe is None for trial in planned):
        raise UserError(planned[0].problem)
    return planned


def _planned(
    search: Search, base: Recipe, dataset: Dataset, setting: dict[str, Any], number: int, repeat: int,
    length: int | None,
) -> Trial:  # fmt: skip
    where = f"setting {number} ({setting_words(setting)})"
    try:
        recipe = set_recipe(search, base, setting)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        return Trial(setting, repeat, trial_recipe(search, recipe, dataset, setting, repeat, length))
    except UserError as error:
        return Trial(setting, repeat, None, f"{where}: {error}")


def set_recipe(search: Search, base: Recipe, setting: dict[str, Any]) -> Recipe:
    """The recipe of a setting, before its budget gives it a length; raises UserError for what no recipe can be."""
    return with_values(base, {**search.set, **{key: value for key, value in setting.items() if key != BUDGET_SHARE}})


def trial_recipe(
    search: Search, recipe: Recipe, dataset: Dataset, setting: dict[str, Any], repeat: int = 0,
    length: int | None = None,
) -> Recipe:  # fmt: skip
    """The recipe as a trial runs it: as long as its budget allows; raises UserError where it does not fit the data."""
    new_model_card(recipe, dataset)
    images = length or max(1, round(images_for(search.budget, recipe, dataset) * setting.get(BUDGET_SHARE, 1)))
    fractions = {key: max(1, round(share * images)) for key, share in search.of_budget.items()}
    trial = with_values(recipe, {"train.images": images, **fractions, "seed": recipe.seed + repeat})
    _check_metric(search, trial)
    return trial


def _check_metric(search: Search, trial: Recipe) -> None:
    """Refuse a trial that does not measure what it is judged by, or not on the way where it may be stopped."""
    previews = trial.preview.every_images * trial.preview.frechet_samples
    if search.metric == "preview_frechet_distance" and not previews:
        raise UserError(f"metric: {search.metric} is not measured: set preview.frechet_samples and every_images")
    if search.stops_early and not (trial.train.held_out_every_images or trial.preview.every_images):
        raise UserError(f"scheduler: asha needs {search.metric} on the way: give of_budget train.held_out_every_images")


def images_for(budget: TrialBudget, recipe: Recipe, dataset: Dataset) -> int:
    """The counted images that a budget buys a recipe, as the mean of what its steps cost."""
    denoiser = new_model_card(recipe, dataset).denoiser
    method = step_settings(recipe, denoiser.resolution)
    per_update = method.batch_size * method.schedule.mean_multiplier
    if budget.images is not None:
        return budget.images
    if budget.updates is not None:
        return round(budget.updates * per_update)
    if budget.flops is not None:
        return max(1, round(budget.flops / _flops_of_update(denoiser, method) * per_update))
    assert budget.seconds is not None  # the schema holds exactly one of them
    return max(1, round(budget.seconds / seconds_of_update(recipe, dataset) * per_update))


def seconds_of_update(recipe: Recipe, dataset: Dataset) -> float:
    """The mean time of a step of this recipe here, on one thread as a trial has it (or on the GPU), measured now."""
    method, seconds_of_crop = _measured(recipe, dataset)
    return step_cost(method, seconds_of_crop, 1)[0]


def seconds_of_trial(recipe: Recipe, dataset: Dataset) -> float:
    """The time of a trial's steps and held-out losses here, measured now on a few steps; its start not counted."""
    method, seconds_of_crop = _measured(recipe, dataset)
    train, rows = recipe.train, len(dataset.indices("held_out", recipe.data.held_out_fraction))
    every = train.held_out_every_images or recipe.preview.every_images
    looks = 1 + (train.images // every if every else 0)
    held_out_crops = looks * min(rows, HELD_OUT_IMAGES) * len(HELD_OUT_SIGMAS)
    forward = seconds_of_crop[method.schedule.sizes[0].pixels] / TRAINING_OVER_FORWARD
    return method.updates * step_cost(method, seconds_of_crop, 1)[0] + held_out_crops * forward


def _measured(recipe: Recipe, dataset: Dataset) -> tuple[StepSettings, dict[int, float]]:
    denoiser = new_model_card(recipe, dataset).denoiser
    method = step_settings(recipe, denoiser.resolution)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_thread():
        network = build_denoiser(denoiser).to(device).train()
        return method, measured_seconds_of_crop(network, method, identity_normalisation(network.channels))


def trial_config(
    search: Search, base: Recipe, dataset: Dataset, folder: Path, run_id: str, workers: int
) -> dict[str, Any]:
    """What all trials of a search have in common, as plain values."""
    return {
        "search": search.model_dump(mode="json"),
        "base": base.model_dump(mode="json"),
        "dataset": dataset.address,
        "folder": str(folder / "trials"),
        "parent_run": run_id,
        "tracking_uri": tracking_uri(),
        "backbones": allowed_backbones(),
        "workers": workers,
    }


def planned_config(common: dict[str, Any], number: int, trial: Trial) -> dict[str, Any]:
    """What `run_trial` takes of a planned trial."""
    recipe = trial.recipe and trial.recipe.model_dump(mode="json")
    own = {"name": trial_name(number), "settings": trial.settings, "repeat": trial.repeat, "recipe": recipe}
    return {"common": common, **own, "problem": trial.problem}


def trial_name(number: int) -> str:
    """Of a trial's folder."""
    return f"{number:03d}"


@dataclass(frozen=True)
class Adviser:
    """Turns an Optuna trial's suggestions into what `run_trial` takes."""

    search: Search
    common: dict[str, Any]

    def __call__(self, adviser: Any) -> dict[str, Any]:
        """The configuration of one trial."""
        return {"common": self.common, "name": trial_name(adviser.number), "settings": self.search.suggest(adviser),
                "repeat": 0, "recipe": None, "problem": ""}  # fmt: skip


def advice(search: Search, common: dict[str, Any]) -> OptunaSettings[dict[str, Any]]:
    """How an advised search finds its settings."""
    objectives = (search.metric, "flops") if search.searcher == "frontier" else (search.metric,)
    return OptunaSettings(Adviser(search, common), search.trials, objectives, search.seed)


def halving(search: Search) -> AshaSettings | None:
    """How a search stops trials that are behind."""
    if not search.stops_early:
        return None
    return AshaSettings(search.metric, BUDGET_PERCENT, 100 * search.scheduler.grace, search.scheduler.reduction)


def check_space(search: Search, base: Recipe, dataset: Dataset) -> None:
    """Try an advised search's space on a few draws; raises UserError where none of them gives a trial."""
    luck, problems = random.Random(search.seed), list[str]()
    for _ in range(DRAWS_TRIED):
        setting = search.draw(luck)
        try:
            trial_recipe(search, set_recipe(search, base, setting), dataset, setting, length=1)
            return
        except UserError as error:
            problems.append(f"{setting_words(setting)}: {error}")
    raise UserError(f"no setting of the space fits; one of them, {problems[0]}")


def search_flops(search: Search, base: Recipe, dataset: Dataset, planned: list[Trial]) -> float:
    """What all trials together are expected to spend; of those that are advised, as if all were the base recipe's."""
    if planned:
        return sum(trial_flops(trial.recipe, dataset) for trial in planned if trial.recipe)
    return search.trials * trial_flops(trial_recipe(search, set_recipe(search, base, {}), dataset, {}), dataset)


def trial_flops(recipe: Recipe, dataset: Dataset) -> float:
    """What a trial is expected to spend on its steps."""
    denoiser = new_model_card(recipe, dataset).denoiser
    method = step_settings(recipe, denoiser.resolution)
    return method.updates * _flops_of_update(denoiser, method)


def _flops_of_update(denoiser: DenoiserConfig, method: StepSettings) -> float:
    cost_of_crop = {size.pixels: float(training_flops(denoiser, size.pixels)) for size in method.schedule.sizes}
    return step_cost(method, cost_of_crop, 1)[0]


def full_length(base: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe of a setting as long as the base recipe, with its own ramps and previews."""
    return with_values(base, {key: value for key, value in settings.items() if key != BUDGET_SHARE})


def run_trial(config: dict[str, Any]) -> None:
    """One trial in its own process, told to Ray Tune as it goes; a second call goes on, or returns what is there.

    config: of `planned_config`, or an `Adviser`. What is wrong with a setting itself (it does not fit, its loss
    diverged) is a result, and not tried again by this call.
    """
    from ray import tune as ray_tune

    quiet_environment()
    common = config["common"]
    search = checked(Search, common["search"])
    os.environ["MLFLOW_TRACKING_URI"] = common["tracking_uri"]
    allow_backbones(*common["backbones"])
    folder = make_folder(Path(common["folder"]) / config["name"])
    if not is_finished(folder, config["settings"]):
        try:
            found = _trained(config, search, folder)
        except UserError as error:
            found = {"status": "failed", "error": str(error)}
        write_json(folder / TRIAL, _identity(config) | found)
    row = read_json(folder / TRIAL)
    told = {key: row[key] for key in (search.metric, "flops") if key in row}
    ray_tune.report({**told, BUDGET_PERCENT: ALMOST_ALL})


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("name", "settings", "repeat")}


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a trial's folder holds what these settings came to."""
    row = read_json(folder / TRIAL) if (folder / TRIAL).is_file() else {"status": None}
    return row["status"] == "finished" and row["settings"] == settings


def trial_row(folder: Path, config: dict[str, Any], problem: str | None) -> dict[str, Any]:
    """A trial's row once it has ended: finished, failed with its reason, or stopped early with what it had."""
    if is_finished(folder, config["settings"]) or (problem is None and (folder / TRIAL).is_file()):
        return dict(read_json(folder / TRIAL))
    if problem is not None:
        return {**_identity(config), "status": "failed", "error": problem}
    there = Folder.at(folder)
    with MlflowForwarder(
        folder, functools.partial(tracked, folder, there, config["common"]["parent_run"]), lambda _: None
    ):
        pass  # lines that were not sent when its process was ended
    end_tracking(folder, "KILLED")
    run_id = RunCard.read(folder).run_id
    return {**_identity(config), "status": "stopped", **last_numbers(folder), "run_id": run_id}


def _trained(config: dict[str, Any], search: Search, folder: Path) -> dict[str, Any]:
    from ray import tune as ray_tune

    common = config["common"]
    if config["problem"]:
        raise UserError(config["problem"])
    recipe = check_recipe(config["recipe"]) if config["recipe"] else _advised_recipe(config, search, folder)

    def show(line: ProgressLine) -> None:
        if search.stops_early and line.get(search.metric) is not None:
            percent = min(ALMOST_ALL, 100 * line.images_seen / recipe.train.images)
            ray_tune.report({search.metric: line[search.metric], BUDGET_PERCENT: percent})

    began = time.monotonic()
    result = train(
        recipe,
        common["dataset"],
        str(folder),
        workers=common["workers"],
        resume=True,
        parent_run=common["parent_run"],
        show=show,
    )
    return {"status": "finished", **last_numbers(folder), "seconds": time.monotonic() - began, "run_id": result.run_id}


def _advised_recipe(config: dict[str, Any], search: Search, folder: Path) -> Recipe:
    """The recipe of a trial whose setting was suggested; one that goes on keeps the length that it began with.

    Where a kill left a trial that the search does not remember, so that its number is given again, room is made.
    """
    base, settings = check_recipe(config["common"]["base"]), config["settings"]
    dataset = open_dataset(config["common"]["dataset"])
    wanted = set_recipe(search, base, settings)
    if (folder / "recipe.yaml").is_file():
        begun = load_recipe(folder / "recipe.yaml")
        if trial_recipe(search, wanted, dataset, settings, length=begun.train.images) == begun:
            return begun
        if (folder / "run.json").is_file():
            end_tracking(folder, "KILLED")
        shutil.rmtree(folder)
        make_folder(folder)
    return trial_recipe(search, wanted, dataset, settings)


def last_numbers(folder: Path) -> dict[str, Any]:
    """The newest value of each number that a table of trials has, of a run that may have been stopped."""
    newest: dict[str, Any] = {}
    for line in read_progress(folder):
        newest |= line.model_dump(include=set(KEPT), exclude_unset=True)
    return newest
