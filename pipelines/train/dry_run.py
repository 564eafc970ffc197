"""The dry run of a training run: what it would be and cost, before anything starts."""

from dataclasses import replace
from typing import Any

import torch

from patchloom.models.cost import estimated_gain, measured_seconds_of_crop
from patchloom.models.denoiser import build_denoiser, skeleton
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.normalisation import identity_normalisation
from patchloom.models.step_plan import StepSettings
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.pipelines.train.run import step_settings
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.recipe.run_recipe import Recipe


def _draws(method: StepSettings, workers: int) -> dict[str, StepSettings]:
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
    card = new_model_card(recipe, rows)
    method = step_settings(recipe, card.denoiser.resolution)
    parameters = parameter_count(skeleton(card.denoiser))
    batch, updates = method.batch_size, method.updates
    flops_of_crop = {size.pixels: float(training_flops(card.denoiser, size.pixels)) for size in method.schedule.sizes}
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
        denoiser = build_denoiser(card.denoiser).to(device).train()
        cost_of_crop = measured_seconds_of_crop(denoiser, method, identity_normalisation(denoiser.channels), workers)
    return {
        "gains": {draw: estimated_gain(one, cost_of_crop, workers) for draw, one in _draws(method, workers).items()},
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
