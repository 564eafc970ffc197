"""Plans: what a run or a search would be and cost, in words, before anything starts."""

import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import mean
from typing import Any

import torch

from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.models.codec import identity_space
from patchloom.models.cost import foretold_gain, measured_seconds_of_crop
from patchloom.models.denoiser import build_denoiser, skeleton
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.plan import Method
from patchloom.pipelines.ranking import setting_words
from patchloom.pipelines.run import method_of
from patchloom.pipelines.train import model_card
from patchloom.pipelines.trials import (
    Trial,
    check_space,
    plan_trials,
    seconds_of_trial,
    set_recipe,
    trial_recipe,
)
from patchloom.platform.dataset import open_dataset
from patchloom.platform.progress import clock
from patchloom.platform.recipe import Recipe, check_recipe
from patchloom.platform.search import load_search


def _draws(method: Method, workers: int) -> dict[str, Method]:
    """The run's own draw first, and the others that its batch allows on so many workers."""
    draws = {method.draw: method}
    if method.schedule.kind == "progressive":
        return draws
    blocks = method.batch_size // method.block_size
    for draw, ranks in (("shared", 1), ("stratified", 1), ("independent", workers)):
        has_room = all(size.probability * size.batch_multiplier * blocks >= 1 for size in method.schedule.sizes)
        fits = {"shared": True, "stratified": has_room, "independent": workers > 1 and blocks % workers == 0}
        if draw not in draws and fits[draw]:
            draws[draw] = replace(method, draw=draw, emulated_ranks=ranks)
    return draws


def describe_plan(recipe: Recipe, dataset: str, workers: int = 1, measure: bool = False) -> dict[str, Any]:
    """What a run would be, without running it: parameters, FLOPs a crop, expected counts, memory, and the gain.

    measure: time a few steps of each patch size here, and foretell the gain of so many workers from
    seconds instead of FLOPs.
    """
    rows = open_dataset(dataset)
    card = model_card(recipe, rows)
    method = method_of(recipe, card["denoiser"]["resolution"])
    parameters = parameter_count(skeleton(card["denoiser"]))
    batch, updates = method.batch_size, method.updates
    flops_of_crop = {
        size.pixels: float(training_flops(card["denoiser"], size.pixels)) for size in method.schedule.sizes
    }
    sizes = []
    for size in method.schedule.sizes:
        crops = updates * size.probability * batch * size.batch_multiplier
        sizes.append({
            "pixels": size.pixels,
            "share_of_updates": size.probability,
            "crops": round(crops),
            "flops_per_crop": round(flops_of_crop[size.pixels]),
        })  # fmt: skip
    cost_of_crop = flops_of_crop
    if measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        denoiser = build_denoiser(card["denoiser"]).to(device).train()
        cost_of_crop = measured_seconds_of_crop(denoiser, method, identity_space(denoiser.channels), workers)
    return {
        "gains": {draw: foretold_gain(one, cost_of_crop, workers) for draw, one in _draws(method, workers).items()},
        "cost_of_crop": cost_of_crop,
        "parameters": parameters,
        "updates": updates,
        "crops": sum(size["crops"] for size in sizes),
        "full_size_images": sizes[0]["crops"],
        "flops": sum(size["crops"] * size["flops_per_crop"] for size in sizes),
        "sizes": sizes,
        # weights, gradients, Adam's two moments and the averages, in float32
        "state_bytes": parameters * 4 * (4 + len(recipe.ema)),
        "train_rows": len(rows.indices("train", recipe.data.held_out_fraction)),
    }


def run_plan(recipe: Recipe, dataset: str, workers: int = 1, measure: bool = False) -> str:
    """Parameters, FLOPs a crop by patch size, expected counts and memory of a run, and what its patches save."""
    plan = describe_plan(recipe, dataset, workers, measure)
    lines = [
        f"{recipe.name}: {plan['parameters']:,} parameters on {plan['train_rows']:,} training rows",
        f"  {'patch':>6}  {'share of updates':>16}  {'crops':>12}  {'GFLOP a crop':>12}",
    ]
    lines += [
        f"  {size['pixels']:>4}px  {size['share_of_updates']:>16.1%}  {size['crops']:>12,}  "
        f"{size['flops_per_crop'] / 1e9:>12.3f}"
        for size in plan["sizes"]
    ]
    return "\n".join([
        *lines,
        f"  {plan['updates']:,} updates, {plan['crops']:,} counted images (crops), "
        f"{plan['full_size_images']:,} full-size images",
        f"  {plan['flops'] / 1e12:,.2f} TFLOP in all (forward and backward)",
        f"  {plan['state_bytes'] / 2**20:,.0f} MiB of weights, gradients, optimiser and averages a worker, "
        "activations not counted",
        f"  gain over p = 1 on {workers} worker{'s' if workers > 1 else ''}, "
        + ("from seconds measured here:" if measure else "from FLOPs (--measure times them here):"),
        *(
            f"    {draw:<11}  {gain.per_image:.2f}x a counted image, {gain.per_update:.2f}x an update"
            for draw, gain in plan["gains"].items()
        ),
    ])  # fmt: skip


def search_plan(search: str, dataset: str, concurrent: int = 1) -> str:
    """Each setting of a search with its counts and cost, and how long all trials would take, so many at once.

    Of a search that is advised, the base recipe stands for the settings that are not known yet.
    """
    definition, base = load_search(search)
    rows = open_dataset(dataset)
    if definition.is_advised:
        check_space(definition, base, rows)
        typical = trial_recipe(definition, set_recipe(definition, base, {}), rows, {})
        planned = [Trial({}, repeat, typical) for repeat in range(definition.trials)]
        lines = [f"{definition.name}: {len(planned)} trials, whose settings {definition.searcher} will choose"]
    else:
        planned = plan_trials(definition, base, rows)
        settings = sum(trial.repeat == 0 for trial in planned)
        lines = [f"{definition.name}: {settings} settings, {len(planned)} trials"]
    start, flops, queue = seconds_to_start(), 0.0, [0.0] * concurrent
    seconds = iter(_measured_together([trial.recipe for trial in planned if trial.repeat == 0], dataset, concurrent))
    for number, trial in enumerate(planned):
        if trial.repeat == 0:
            name = setting_words(trial.settings) or f"{base.name} as it is"
            cost = _trial_cost(trial, dataset, next(seconds))
            lines.append(f"  {number:>3}  {name}: {cost.words}")
        flops += cost.flops
        queue[queue.index(min(queue))] += start + cost.seconds  # whoever is free takes the next
    ends = "; those that asha stops end sooner" if definition.stops_early else ""
    if definition.final is not None:
        ends += f"; {definition.final.samples} samples a trial come on top"
    return "\n".join([
        *lines,
        f"  {flops / 1e12:,.3f} TFLOP in all; about {clock(start + max(queue))} with {concurrent} at once, by steps "
        f"and a start ({clock(start)}) measured here{ends}",
    ])  # fmt: skip


@dataclass(frozen=True)
class _Cost:
    flops: float
    seconds: float
    words: str


def _trial_cost(trial: Trial, dataset: str, seconds: float) -> _Cost:
    if trial.recipe is None:
        return _Cost(0.0, 0.0, f"cannot be ({trial.problem.partition(': ')[2]})")
    plan = describe_plan(trial.recipe, dataset)
    words = f"{plan['updates']:,} updates, {plan['crops']:,} counted images, {plan['flops'] / 1e12:,.3f} TFLOP"
    return _Cost(plan["flops"], seconds, f"{words}, {clock(seconds)}")


def _measured_together(recipes: list[Recipe | None], dataset: str, concurrent: int) -> list[float]:
    """Seconds of each trial, measured by as many processes at once as trials will run: these slow one another."""
    values = [recipe and recipe.model_dump(mode="json") for recipe in recipes]
    argument = values, dataset, allowed_backbones()
    with ProcessPoolExecutor(concurrent, get_context("spawn")) as pool:
        found = list(pool.map(_measured_here, [argument] * concurrent))
    return [mean(seconds) for seconds in zip(*found, strict=True)]


def _measured_here(argument: tuple[list[dict[str, Any] | None], str, list[str]]) -> list[float]:
    values, dataset, backbones = argument
    allow_backbones(*backbones)
    rows = open_dataset(dataset)
    return [seconds_of_trial(check_recipe(recipe), rows) if recipe else 0.0 for recipe in values]


def seconds_to_start() -> float:
    """How long a process takes to import what a trial needs, measured now."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import patchloom.pipelines.trials, mlflow, ray.tune"], check=True)
    return time.perf_counter() - began
