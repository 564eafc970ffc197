"""The dry run of a training run: its size, counts and costs, estimated before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from patchloom.models.cost import Gain, estimated_gain, measured_seconds_of_crop
from patchloom.models.denoiser import build_denoiser, skeleton
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.normalisation import identity_normalisation
from patchloom.models.step_plan import StepSettings
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.pipelines.train.run import step_settings
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.recipe.run_recipe import BLOCK_TOLERANCE, Recipe

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class SizeEstimate:
    """What a run trains on at one patch size.

    Args:
        pixels: side of a patch.
        share_of_updates: expected share of the steps.
        crops: expected crops.
        flops_per_crop: FLOPs of training on one crop.
    """

    pixels: int
    share_of_updates: float
    crops: int
    flops_per_crop: int


@dataclass(frozen=True)
class RunEstimate:
    """What a run is expected to do and cost.

    Args:
        parameters: parameters of the network.
        train_rows: rows of the dataset to train on.
        updates: optimisation steps.
        sizes: per patch size, full images first.
        state_bytes: memory per worker of weights, gradients, optimiser and averages, without activations.
        gains: by draw of patch sizes, the gain over training on full images only.
        cost_of_crop: by side of the patch, what the gains were computed from: FLOPs, or measured seconds.
    """

    parameters: int
    train_rows: int
    updates: int
    sizes: tuple[SizeEstimate, ...]
    state_bytes: int
    gains: Mapping[str, Gain]
    cost_of_crop: Mapping[int, float]

    @property
    def crops(self) -> int:
        """Expected crops: the counted images."""
        return sum(size.crops for size in self.sizes)

    @property
    def full_size_images(self) -> int:
        """Expected full-size images."""
        return self.sizes[0].crops

    @property
    def flops(self) -> int:
        """Expected FLOPs of all steps, forward and backward."""
        return sum(size.crops * size.flops_per_crop for size in self.sizes)


def describe_plan(recipe: Recipe, dataset: str, workers: int = 1, measure: bool = False) -> RunEstimate:
    """Estimate a run without starting it.

    Args:
        recipe: the recipe.
        dataset: a prepared dataset.
        workers: number of workers that the gains are for.
        measure: measure some steps of each patch size here, and compute the gains from seconds instead of FLOPs.

    Raises:
        UserError: the recipe does not fit the dataset.
    """
    rows = open_dataset(dataset)
    network = new_model_card(recipe, rows).denoiser
    settings = step_settings(recipe, network.resolution)
    parameters = parameter_count(skeleton(network))
    cost_of_crop = {size.pixels: float(training_flops(network, size.pixels)) for size in settings.schedule.sizes}
    sizes = tuple(
        SizeEstimate(
            pixels=size.pixels,
            share_of_updates=size.probability,
            crops=round(settings.updates * size.probability * settings.batch_size * size.batch_multiplier),
            flops_per_crop=round(cost_of_crop[size.pixels]),
        )
        for size in settings.schedule.sizes
    )
    if measure:
        denoiser = build_denoiser(network).to(own_device()).train()
        cost_of_crop = measured_seconds_of_crop(denoiser, settings, identity_normalisation(denoiser.channels), workers)
    return RunEstimate(
        parameters=parameters,
        train_rows=len(rows.indices("train", recipe.data.held_out_fraction)),
        updates=settings.updates,
        sizes=sizes,
        # weights, gradients, Adam's two moments and the averages
        state_bytes=parameters * FLOAT32_BYTES * (4 + len(recipe.ema)),
        gains={draw: estimated_gain(drawn, cost_of_crop, workers) for draw, drawn in _draws(settings, workers).items()},
        cost_of_crop=cost_of_crop,
    )


def _draws(settings: StepSettings, workers: int) -> dict[str, StepSettings]:
    """The draw of the recipe, then the other draws that its batch allows with this number of workers."""
    draws = {settings.draw: settings}
    if settings.schedule.kind == "progressive":
        return draws
    blocks = settings.batch_size // settings.block_size
    for draw, ranks in (("shared", 1), ("stratified", 1), ("independent", workers)):
        has_room = all(
            size.probability * size.batch_multiplier * blocks > 1 - BLOCK_TOLERANCE for size in settings.schedule.sizes
        )
        fits = {"shared": True, "stratified": has_room, "independent": workers > 1 and blocks % workers == 0}
        if draw not in draws and fits[draw]:
            draws[draw] = replace(settings, draw=draw, emulated_ranks=ranks)
    return draws


def run_plan(recipe: Recipe, dataset: str, workers: int = 1, measure: bool = False) -> str:
    """The text of `patchloom train --dry-run`. The arguments are those of `describe_plan`."""
    plan = describe_plan(recipe, dataset, workers, measure)
    sizes = [
        f"  {size.pixels:>4}px  {size.share_of_updates:>16.1%}  {size.crops:>12,}  {size.flops_per_crop / 1e9:>14.3f}"
        for size in plan.sizes
    ]
    gains = [
        f"    {draw:<11}  {gain.per_image:.2f}x per counted image, {gain.per_update:.2f}x per update"
        for draw, gain in plan.gains.items()
    ]
    return "\n".join([
        f"{recipe.name}: {plan.parameters:,} parameters, {plan.train_rows:,} training rows",
        f"  {'patch':>6}  {'share of updates':>16}  {'crops':>12}  {'GFLOP per crop':>14}",
        *sizes,
        f"  {plan.updates:,} updates, {plan.crops:,} counted images (crops), "
        f"{plan.full_size_images:,} full-size images",
        f"  {plan.flops / 1e12:,.2f} TFLOP in total (forward and backward)",
        f"  {plan.state_bytes / 2**20:,.0f} MiB per worker for weights, gradients, optimiser and averages, "
        "without activations",
        f"  gain over p = 1 with {workers} worker{'s' if workers > 1 else ''}, "
        + ("from measured seconds:" if measure else "from FLOPs (--measure uses seconds measured here):"),
        *gains,
    ])  # fmt: skip
