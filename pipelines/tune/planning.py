"""Planning: which trials a search runs, how long each one is, and what it is expected to cost."""

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import JsonValue

from patchloom.errors import UserError
from patchloom.models.cards import DenoiserConfig
from patchloom.models.cost import measured_seconds_of_crop, step_cost
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import TRAINING_OVER_FORWARD, evaluation_flops, flops_by_size
from patchloom.models.loss import HELD_OUT_SIGMAS
from patchloom.models.patches import PatchSchedule
from patchloom.models.precision import kept_arithmetic, one_thread
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.pipelines.train.data_shape import DataShape
from patchloom.pipelines.train.model_card import new_denoiser_config
from patchloom.pipelines.train.run import first_state, step_settings
from patchloom.pipelines.tune.ranking import setting_title
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.recipe.run_recipe import AverageSection, OptimizerSection, Recipe, with_values
from patchloom.platform.recipe.search import BUDGET_SHARE, Search, TrialBudget

TRIED_DRAWS = 8
WALKED_STEPS = 20_000
MEASURED_STEPS = 8  # of each patch size; the fastest one counts
SAME_COST_WITHIN = 0.01  # a trial whose cost differs by less is not run again for an equal cost


CostUnit = Literal["images", "updates", "flops"]
PlannedData = Dataset | DataShape  # a search can be planned before there is a dataset


@dataclass(frozen=True)
class Trial:
    """One run of a search: its setting, which repeat of it, and its recipe, or the problem if it has none.

    `equal` is the unit of a trial of `equal_costs`, None for a trial that spends the budget. `expected_images` is the
    length of its recipe before drawn sizes change it.
    """

    settings: dict[str, JsonValue]
    repeat: int
    recipe: Recipe | None
    problem: str = ""
    equal: CostUnit | None = None
    expected_images: int | None = None


def plan_trials(
    search: Search, base: Recipe, dataset: PlannedData, lengths: list[int | None] | None = None, added_seeds: int = 0
) -> list[Trial]:
    """Every trial of a grid search in order. A setting that does not fit the dataset has a problem and no recipe.

    Args:
        search: the search.
        base: the recipe that the settings change.
        dataset: the dataset of all trials, or its shape.
        lengths: counted images per setting that an earlier call found; a budget in seconds is measured only once.
        added_seeds: further repeats of each setting, after all trials of the search.

    Raises:
        UserError: a setting is not a valid recipe, or no setting fits the dataset.
    """
    settings = search.settings()
    known = lengths or [None] * len(settings)
    first = [
        _planned_trial(search, base, dataset, number, setting, known[number]) for number, setting in enumerate(settings)
    ]
    if all(trial.recipe is None for trial in first):
        raise UserError(first[0].problem)
    each = [(trial, search.budget) for trial in first]
    for unit in search.equal_costs:
        each += _of_equal_cost(search, dataset, first, unit)
    repeats = range(search.repeats + added_seeds)
    order = [(trial, repeat) for trial in each for repeat in repeats[: search.repeats]]
    order += [(trial, repeat) for repeat in repeats[search.repeats :] for trial in each]
    return [_repeated(search, dataset, *trial, repeat) for trial, repeat in order]


def _of_equal_cost(
    search: Search, dataset: PlannedData, trials: list[Trial], unit: CostUnit
) -> list[tuple[Trial, TrialBudget]]:
    """A trial of each setting that costs as much as the cheapest trial, in a unit; without those that do already."""
    recipes = {number: trial.recipe for number, trial in enumerate(trials) if trial.recipe is not None}
    costs = {number: _expected_cost(recipe, dataset, unit) for number, recipe in recipes.items()}
    budget = TrialBudget.model_validate({unit: min(costs.values())})
    found = []
    for number, recipe in recipes.items():
        if costs[number] > min(costs.values()) * (1 + SAME_COST_WITHIN):
            length = images_for(budget, recipe, dataset)
            shorter = trial_recipe(search, recipe, dataset, trials[number].settings, length=length)
            found.append((replace(trials[number], recipe=shorter, equal=unit), budget))
    return found


def _repeated(search: Search, dataset: PlannedData, trial: Trial, budget: TrialBudget, repeat: int) -> Trial:
    """The trial with the seed of a repeat. With `equal_costs`, its drawn patch sizes decide how many steps it takes."""
    if trial.recipe is None:
        return replace(trial, repeat=repeat)
    recipe = with_values(trial.recipe, {"seed": trial.recipe.seed + repeat})
    if search.equal_costs:
        recipe = trial_recipe(search, recipe, dataset, trial.settings, length=_length_of_cost(recipe, dataset, budget))
    return replace(trial, repeat=repeat, recipe=recipe)


def _length_of_cost(recipe: Recipe, dataset: PlannedData, budget: TrialBudget) -> int:
    """The counted images of a recipe whose drawn steps together spend a budget of images or FLOPs.

    A recipe of more than `WALKED_STEPS` steps keeps its length: its random sizes change the cost by less than 1 %. So
    does one whose sizes are not random.
    """
    denoiser, settings = _denoiser_and_settings(recipe, dataset)
    is_random = recipe.patches.schedule == "stochastic" and settings.draw != "stratified"
    wanted = budget.flops or budget.images
    if wanted is None or not is_random or settings.updates > WALKED_STEPS:
        return recipe.train.images
    of_crop = flops_by_size(denoiser, (size.pixels for size in settings.schedule.sizes))
    spent, steps = 0.0, 0
    while True:
        plan = plan_step(settings, steps, 0)
        crops = [(size, count * settings.block_size) for size, count in zip(plan.sizes, plan.blocks, strict=True)]
        cost = sum(count * (of_crop[size.pixels] if budget.flops else 1) for size, count in crops)
        if steps and spent + cost / 2 > wanted:
            return round(steps * settings.batch_size * settings.schedule.mean_multiplier)
        spent, steps = spent + cost, steps + 1


def _expected_cost(recipe: Recipe, dataset: PlannedData, unit: CostUnit) -> int | float:
    if unit == "flops":
        return trial_flops(recipe, dataset)
    return recipe.train.images if unit == "images" else _denoiser_and_settings(recipe, dataset)[1].updates


def _planned_trial(
    search: Search, base: Recipe, dataset: PlannedData, number: int, setting: dict[str, JsonValue], length: int | None
) -> Trial:
    where = f"setting {number} ({setting_title(setting)})"
    try:
        recipe = recipe_of_setting(search, base, setting)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        trial = trial_recipe(search, recipe, dataset, setting, length)
        return Trial(setting, 0, trial, expected_images=trial.train.images)
    except UserError as error:
        return Trial(setting, 0, None, f"{where}: {error}")


def recipe_of_setting(search: Search, base: Recipe, setting: dict[str, JsonValue]) -> Recipe:
    """The recipe of a setting, before the budget sets its length; raises UserError if it is not a valid recipe."""
    return with_values(base, {**search.set, **{key: value for key, value in setting.items() if key != BUDGET_SHARE}})


def trial_recipe(
    search: Search, recipe: Recipe, dataset: PlannedData, setting: dict[str, JsonValue], length: int | None = None
) -> Recipe:
    """The recipe of a trial, as long as its budget allows; raises UserError if it does not fit the dataset."""
    new_denoiser_config(recipe, dataset)
    share = setting.get(BUDGET_SHARE, 1)
    assert isinstance(share, (int, float))
    images = length or max(1, round(images_for(search.budget, recipe, dataset) * share))
    fractions = {key: max(1, round(fraction * images)) for key, fraction in search.of_budget.items()}
    trial = with_values(recipe, {"train.images": images, **fractions})
    _check_metric(search, trial)
    return trial


def _check_metric(search: Search, trial: Recipe) -> None:
    """Raise UserError for a trial that does not measure its metric, or not before it may be stopped."""
    previews = trial.preview.every_images * trial.preview.frechet_samples
    if search.metric == "preview_frechet_distance" and not previews:
        raise UserError(f"metric: {search.metric} is not measured: set preview.frechet_samples and every_images")
    if search.stops_early and not (trial.train.held_out_every_images or trial.preview.every_images):
        raise UserError(
            f"scheduler: asha needs {search.metric} during training: set of_budget.train.held_out_every_images"
        )


def full_length_recipe(base: Recipe, settings: dict[str, JsonValue]) -> Recipe:
    """The recipe of a setting with the length, ramps and previews of the base recipe."""
    return with_values(base, {key: value for key, value in settings.items() if key != BUDGET_SHARE})


def check_space(search: Search, base: Recipe, dataset: PlannedData) -> None:
    """Try a few draws of an adaptive search; raises UserError if none of them fits the dataset."""
    generator, problems = random.Random(search.seed), list[str]()
    for _ in range(TRIED_DRAWS):
        setting = search.draw(generator)
        try:
            trial_recipe(search, recipe_of_setting(search, base, setting), dataset, setting, length=1)
            return
        except UserError as error:
            problems.append(f"{setting_title(setting)}: {error}")
    raise UserError(f"no setting of the space fits the dataset; for example {problems[0]}")


def images_for(budget: TrialBudget, recipe: Recipe, dataset: PlannedData) -> int:
    """The counted images that a recipe can train on within a budget, from the mean cost of its steps."""
    denoiser, settings = _denoiser_and_settings(recipe, dataset)
    per_update = settings.batch_size * settings.schedule.mean_multiplier
    if budget.images is not None:
        return budget.images
    if budget.updates is not None:
        return round(budget.updates * per_update)
    if budget.flops is not None:
        return max(1, round(budget.flops / _flops_of_update(denoiser, settings) * per_update))
    assert budget.seconds is not None  # a budget has exactly one unit
    return max(1, round(budget.seconds / seconds_of_update(recipe, dataset) * per_update))


def _denoiser_and_settings(recipe: Recipe, dataset: PlannedData) -> tuple[DenoiserConfig, StepSettings]:
    denoiser = new_denoiser_config(recipe, dataset)
    return denoiser, step_settings(recipe, denoiser.resolution)


def search_flops(search: Search, base: Recipe, dataset: PlannedData, planned: list[Trial]) -> float:
    """The expected FLOPs of all trials. For an adaptive search, every trial counts like the base recipe."""
    if planned:
        return sum(trial_flops(trial.recipe, dataset) for trial in planned if trial.recipe)
    typical = trial_recipe(search, recipe_of_setting(search, base, {}), dataset, {})
    return search.trials * trial_flops(typical, dataset)


def trial_flops(recipe: Recipe, dataset: PlannedData) -> float:
    """The expected FLOPs of the steps of a trial."""
    denoiser, settings = _denoiser_and_settings(recipe, dataset)
    return settings.updates * _flops_of_update(denoiser, settings)


def _flops_of_update(denoiser: DenoiserConfig, settings: StepSettings) -> float:
    cost_of_crop = flops_by_size(denoiser, (size.pixels for size in settings.schedule.sizes))
    return step_cost(settings, cost_of_crop, 1)[0]


def seconds_of_update(recipe: Recipe, dataset: PlannedData) -> float:
    """The mean seconds per step, measured now with one thread (as in a trial) or on the GPU."""
    settings, seconds_of_crop = _measured_crops(recipe, dataset)
    return step_cost(settings, seconds_of_crop, 1)[0]


def seconds_of_trial(recipe: Recipe, dataset: PlannedData) -> float:
    """The seconds of the steps and held-out losses of a trial, without its start, from a few measured steps."""
    settings, seconds_of_crop = _measured_crops(recipe, dataset)
    forward = seconds_of_crop[settings.schedule.sizes[0].pixels] / TRAINING_OVER_FORWARD
    held_out_seconds = held_out_evaluations(recipe, dataset) * forward
    return settings.updates * step_cost(settings, seconds_of_crop, 1)[0] + held_out_seconds


def held_out_flops(recipe: Recipe, dataset: PlannedData) -> float:
    """The FLOPs of all held-out losses of a trial."""
    denoiser, _ = _denoiser_and_settings(recipe, dataset)
    return held_out_evaluations(recipe, dataset) * float(evaluation_flops(denoiser, denoiser.resolution))


def held_out_evaluations(recipe: Recipe, dataset: PlannedData) -> int:
    """Evaluations of the network at full size for all held-out losses of a trial."""
    train, rows = recipe.train, recipe.train.held_out_images
    if isinstance(dataset, Dataset):
        rows = min(rows, len(dataset.split("held_out", recipe.data.held_out_fraction)))
    every = train.held_out_every_images or recipe.preview.every_images
    measurements = 1 + (train.images // every if every else 0)
    return measurements * rows * len(HELD_OUT_SIGMAS)


def _measured_crops(recipe: Recipe, dataset: PlannedData) -> tuple[StepSettings, Mapping[int, float]]:
    """The settings of the steps, and the seconds of a crop by its size.

    Settings that differ in p, in the schedule or in the length share one measurement: its error does not favor any.
    """
    denoiser, settings = _denoiser_and_settings(recipe, dataset)
    sizes = tuple(replace(size, probability=1.0) for size in settings.schedule.sizes)
    alike = replace(settings, seed=0, updates=1, lr_rampup_images=1, schedule=PatchSchedule(sizes))
    denoiser_json = json.dumps(denoiser.to_json(), sort_keys=True)
    return settings, seconds_of_crops(denoiser_json, recipe.optimizer, recipe.ema, alike)


@functools.lru_cache(maxsize=64)
def seconds_of_crops(
    denoiser_json: str, optimizer: OptimizerSection, averages: tuple[AverageSection, ...], settings: StepSettings
) -> Mapping[int, float]:
    """The seconds of a crop of each size in a step of a denoiser (its card as JSON), measured once in a process."""
    with one_thread(), kept_arithmetic():
        network = build_denoiser(DenoiserConfig.from_json(json.loads(denoiser_json))).to(own_device()).train()
        state = first_state(network, optimizer, averages, settings)
        return measured_seconds_of_crop(state, settings, repeats=MEASURED_STEPS)
