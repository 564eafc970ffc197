"""The dry run of a training run: its size, counts and costs, estimated before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from patchloom.errors import UserError
from patchloom.models.cards import DenoiserConfig
from patchloom.models.cost import Gain, estimated_gain, largest_group, measured_seconds_of_crop
from patchloom.models.denoiser import build_denoiser, skeleton
from patchloom.models.flops import evaluation_flops, flops_by_size, parameter_count
from patchloom.models.memory import frozen_bytes, training_bytes
from patchloom.models.step import HALF_PRECISIONS
from patchloom.models.step_plan import StepSettings
from patchloom.pipelines.train.data_shape import DataShape, opened
from patchloom.pipelines.train.model_card import new_denoiser_config
from patchloom.pipelines.train.run import first_state, step_settings
from patchloom.pipelines.train.shard_plan import training_rows, unchecked_plan
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.recipe.run_recipe import BLOCK_TOLERANCE, Recipe

FLOAT32_BYTES = 4
STATED_RATE = 1e14  # FLOP/s of a GPU, for GPU-hours: about a third of the peak of an A100 in bf16. An assumption


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


@dataclass(frozen=True, kw_only=True)
class RunCounts:
    """What a run does, and its FLOPs.

    Args:
        parameters: parameters of the network.
        updates: optimisation steps.
        sizes: per patch size, full images first.
        evaluation_flops: FLOPs of one evaluation of the network at full size, as in sampling. A multiply-add is 2.
    """

    parameters: int
    updates: int
    sizes: tuple[SizeEstimate, ...]
    evaluation_flops: int

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


@dataclass(frozen=True, kw_only=True)
class RunEstimate(RunCounts):
    """What a run is expected to do and need: the result of `patchloom train --dry-run`.

    Args:
        recipe: name of the recipe.
        workers: number of workers that the gains are for.
        split_rows: training rows that the dataset has; None without a dataset.
        train_rows: rows to train on; None if only a dataset can tell.
        state_bytes: memory per worker of weights, gradients, optimiser and averages, without activations.
        step_bytes: further memory per worker at the peak of a step; None if the network cannot be simulated.
        gains: by draw of patch sizes, the gain over training on full images only.
        cost_of_crop: by side of the patch, what the gains were computed from: FLOPs, or measured seconds.
        is_measured: whether they are seconds.
        data: what each node reads and keeps of the dataset, as a sentence.
    """

    recipe: str
    workers: int
    split_rows: int | None
    train_rows: int | None
    state_bytes: int
    step_bytes: int | None
    gains: Mapping[str, Gain]
    cost_of_crop: Mapping[int, float]
    is_measured: bool
    data: str

    @property
    def text(self) -> str:
        """It as a table and sentences."""
        sizes = [
            f"  {size.pixels:>4}px  {size.share_of_updates:>16.1%}  {size.crops:>12,}  "
            f"{size.flops_per_crop / 1e9:>14.3f}"
            for size in self.sizes
        ]
        gains = [
            f"    {draw:<11}  {gain.per_image:.2f}x per counted image, {gain.per_update:.2f}x per update"
            for draw, gain in self.gains.items()
        ]
        evaluation = self.evaluation_flops / 1e9
        return "\n".join([
            f"{self.recipe}: {self.parameters:,} parameters{self._rows_text()}",
            f"  {'patch':>6}  {'share of updates':>16}  {'crops':>12}  {'GFLOP per crop':>14}",
            *sizes,
            f"  {self.updates:,} updates, {self.crops:,} counted images (crops), "
            f"{self.full_size_images:,} full-size images",
            f"  {self.flops / 1e12:,.2f} TFLOP in total (forward and backward), {gpu_hours_text(self.flops)}",
            f"  {evaluation:,.4g} GFLOP ({evaluation / 2:,.4g} G multiply-adds) per evaluation of the network at "
            "full size",
            self._memory_text(),
            f"  {self.data}",
            f"  gain over p = 1 with {self.workers} worker{'s' if self.workers > 1 else ''}, "
            + ("from measured seconds:" if self.is_measured else "from FLOPs (--measure uses seconds measured here):"),
            *gains,
        ])  # fmt: skip

    def _rows_text(self) -> str:
        if self.train_rows is None:
            return ""
        is_part = self.split_rows not in (None, self.train_rows)
        return f", {self.train_rows:,} {f'of {self.split_rows:,} ' if is_part else ''}training rows"

    def _memory_text(self) -> str:
        state = f"{self.state_bytes / 2**20:,.0f} MiB for weights, gradients, optimiser and averages"
        if self.step_bytes is None:
            return f"  {state} per worker, and unknown memory for activations"
        peak = (self.state_bytes + self.step_bytes) / 2**20
        activations = f"{self.step_bytes / 2**20:,.0f} MiB for activations"
        return f"  {peak:,.0f} MiB per worker at the peak: {state}, and {activations}"


def gpu_hours(flops: float) -> float:
    """Hours that one GPU needs for so many FLOPs at `STATED_RATE`."""
    return flops / STATED_RATE / 3600


def gpu_hours_text(flops: float) -> str:
    """FLOPs as hours of one GPU, with the rate that this assumes."""
    hours = gpu_hours(flops)
    return f"{f'{hours:,.3g}' if hours >= 0.01 else 'under 0.01'} GPU-hours at {STATED_RATE / 1e12:g} TFLOP/s"


def count_run(recipe: Recipe, dataset: str | DataShape) -> RunCounts:
    """Count what a run would do. Takes a fraction of a second; `describe_plan` also estimates what it needs.

    Args:
        recipe: the recipe.
        dataset: a prepared dataset, or the shape of one that does not exist yet.

    Raises:
        UserError: the recipe does not fit the dataset.
    """
    return _counts(recipe, new_denoiser_config(recipe, opened(dataset)))


def _counts(recipe: Recipe, network: DenoiserConfig) -> RunCounts:
    settings = step_settings(recipe, network.resolution)
    flops = flops_by_size(network, (size.pixels for size in settings.schedule.sizes))
    sizes = tuple(
        SizeEstimate(
            pixels=size.pixels,
            share_of_updates=size.probability,
            crops=round(settings.updates * size.probability * settings.batch_size * size.batch_multiplier),
            flops_per_crop=flops[size.pixels],
        )
        for size in settings.schedule.sizes
    )
    return RunCounts(
        parameters=parameter_count(skeleton(network)),
        updates=settings.updates,
        sizes=sizes,
        evaluation_flops=evaluation_flops(network, network.resolution),
    )


def describe_plan(
    recipe: Recipe, dataset: str | DataShape, workers: int = 1, measure: bool = False, microbatch: int | None = None
) -> RunEstimate:
    """Estimate a run without starting it.

    Args:
        recipe: the recipe.
        dataset: a prepared dataset, or the shape of one that does not exist yet.
        workers: number of workers that the gains are for.
        measure: measure some steps of each patch size here, and compute the gains from seconds instead of FLOPs.
        microbatch: largest number of crops that a worker trains on at the same time.

    Raises:
        UserError: the recipe does not fit the dataset.
    """
    data = opened(dataset)
    network = new_denoiser_config(recipe, data)
    settings, counts = step_settings(recipe, network.resolution), _counts(recipe, network)
    cost_of_crop = {size.pixels: float(size.flops_per_crop) for size in counts.sizes}
    if measure and recipe.model.base and isinstance(data, DataShape):
        raise UserError(f"--measure needs the weights of {recipe.model.base} and its data: give a dataset with --data")
    if measure:
        denoiser = build_denoiser(network).to(own_device()).train()
        state = first_state(denoiser, recipe.optimizer, recipe.ema, settings)
        cost_of_crop = measured_seconds_of_crop(state, settings, workers)
    return RunEstimate(
        recipe=recipe.name,
        workers=workers,
        parameters=counts.parameters,
        updates=counts.updates,
        sizes=counts.sizes,
        evaluation_flops=counts.evaluation_flops,
        split_rows=len(data.split("train", recipe.data.held_out_fraction)) if isinstance(data, Dataset) else None,
        train_rows=len(training_rows(data, recipe)) if isinstance(data, Dataset) else recipe.data.images,
        # weights, gradients, Adam's two moments and the averages
        state_bytes=counts.parameters * FLOAT32_BYTES * (4 + len(recipe.ema)) + frozen_bytes(skeleton(network)),
        step_bytes=_step_bytes(network, settings, workers, microbatch, data.kind == "latents"),
        gains={draw: estimated_gain(drawn, cost_of_crop, workers) for draw, drawn in _draws(settings, workers).items()},
        cost_of_crop=cost_of_crop,
        is_measured=measure,
        data=_reading(recipe, data),
    )


def _reading(recipe: Recipe, data: Dataset | DataShape) -> str:
    if isinstance(data, DataShape):
        return f"data: none yet; estimated for {data}"
    return unchecked_plan(data, recipe).describe(recipe.train.images)


def _step_bytes(
    network: DenoiserConfig, settings: StepSettings, workers: int, microbatch: int | None, is_latent: bool
) -> int | None:
    group = largest_group(settings, workers, microbatch)
    device = "cuda" if settings.precision in HALF_PRECISIONS else "cpu"  # which autocast; they differ in half precision
    try:
        return training_bytes(network, settings, group, device, is_latent)
    except NotImplementedError:  # a backbone may not support the meta device
        return None


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
