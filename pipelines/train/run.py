"""The state of a training run in one worker, opened at its newest checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from patchloom.errors import UserError
from patchloom.models.autoencoder import copy_autoencoder
from patchloom.models.backbones import allow_backbones
from patchloom.models.cards import ConditionCard, ModelCard
from patchloom.models.checkpoints import load_checkpoint, save_model
from patchloom.models.conditions import depth_to_space
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import Denoiser, build_denoiser, to_channels_last
from patchloom.models.ema import HalfLifeEMA, PowerEMA, WeightAverage
from patchloom.models.flops import training_flops
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.random_draws import CURRENT_DRAWS, derive_seed
from patchloom.models.step import StoredRows, TrainingState, compile_network, new_state, set_rounding
from patchloom.models.step_plan import StepSettings
from patchloom.models.transfer import transfer
from patchloom.pipelines.train.agreement import share_initial_weights, starting_checkpoint
from patchloom.pipelines.train.initial_weights import load_initial_weights
from patchloom.pipelines.train.row_copies import copied
from patchloom.pipelines.train.shard_plan import recipe_plan, training_rows
from patchloom.pipelines.train.timer import WaitTimer
from patchloom.platform.compute.metrics import MetricRecorder
from patchloom.platform.compute.workers import Worker
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import whole_folder
from patchloom.platform.recipe.run_recipe import AverageSection, OptimizerSection, Recipe, recipe_yaml

STORED_COLUMNS = ("image", "mean", "std", "label")


@dataclass(frozen=True)
class TrainJob:
    """What a worker needs to train its share of a run.

    Args:
        recipe: the recipe.
        card: the model to train.
        dataset: address of the dataset.
        folder: address of the run folder; on a worker, the path of its copy.
        backbones: packages that networks may be imported from.
        microbatch: most crops on a device at once. None: all.
        compile: compile the network with torch.compile.
        profile: write a profile of the first steps.
        owner: who holds the fence of a remote run folder.
        address: address of the run folder, also on a worker.
        draws_version: version of the random draws and the order of rows, which a run keeps.
    """

    recipe: Recipe
    card: ModelCard
    dataset: str
    folder: str
    backbones: tuple[str, ...] = ()
    microbatch: int | None = None
    compile: bool = False
    profile: bool = False
    owner: str = ""
    address: str = ""
    draws_version: int = CURRENT_DRAWS


def step_settings(recipe: Recipe, resolution: int, draws_version: int = CURRENT_DRAWS) -> StepSettings:
    """The settings of a training step, from the recipe and the version of the run's draws."""
    sizes = [(size.fraction, size.weight, size.batch_multiplier) for size in recipe.patches.sizes]
    patches = recipe.patches
    schedule = patch_schedule(resolution, patches.p, patches.schedule, sizes, patches.shares_of)
    return StepSettings(
        seed=recipe.seed,
        schedule=schedule,
        updates=schedule.updates(recipe.train.images, recipe.train.batch_size),
        batch_size=recipe.train.batch_size,
        block_size=recipe.train.block_size,
        lr=recipe.optimizer.lr,
        lr_rampup_images=recipe.optimizer.lr_rampup_images,
        noise_mean=recipe.noise.mean,
        noise_std=recipe.noise.std,
        reduction=recipe.loss.reduction,
        label_dropout=recipe.model.label_dropout,
        condition_dropout=recipe.model.condition_dropout,
        mirror=recipe.data.mirror,
        augmentation=recipe.data.augment,
        draw=patches.draw,
        emulated_ranks=recipe.train.emulated_ranks,
        precision=recipe.train.precision,
        draws_version=draws_version,
    )


class RowReader:
    """Reads rows of the dataset as tensors on the device.

    Args:
        dataset: the dataset.
        recipe: the recipe of the run.
        device: the device of the worker.
        draws_version: version of the order of rows.
        condition: the conditions that the network gets; None: they are not read.
        has_text: read the text embeddings, which the network gets.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        device: torch.device,
        draws_version: int,
        condition: ConditionCard | None = None,
        has_text: bool = False,
    ) -> None:
        self.dataset, self.device = dataset, device
        self.condition = condition.normalisation() if condition else None
        self.columns = (*STORED_COLUMNS, *(["condition"] if condition else []), *(["text"] if has_text else []))
        self.train = training_rows(dataset, recipe)
        self.held_out = dataset.split("held_out", recipe.data.held_out_fraction)
        self.plan = recipe_plan(dataset, recipe, draws_version)

    def rows(self, crops: range) -> StoredRows:
        """The rows for these crops, by their numbers in the run."""
        self.plan.advance(crops)
        return self.at(self.train.rows(self.plan.order.at(crops)))

    def at(self, indices: np.ndarray) -> StoredRows:
        """The rows at these indices of the dataset."""
        columns = self.dataset.rows(indices, self.columns)
        label, condition = copied(columns["label"], self.device), None
        if self.condition is not None:
            condition = self.condition.normalise(copied(columns["condition"], self.device))
        text = copied(columns["text"], self.device) if "text" in columns else None
        if self.dataset.kind == "pixels":
            return StoredRows(copied(columns["image"], self.device), label, condition=condition, text=text)
        moments = {name: copied(columns[name], self.device).float() for name in ("mean", "std") if name in columns}
        # a deterministic autoencoder has no std
        return StoredRows(moments["mean"], label, moments.get("std"), condition, text)

    def shown_rows(self, count: int) -> np.ndarray:
        """The indices of up to `count` rows for previews: held-out rows, or training rows if none are held out."""
        return (self.held_out if len(self.held_out) else self.train).spread(count)

    def texts(self, count: int) -> np.ndarray:
        """(n, tokens, width), the text embeddings of `shown_rows`."""
        found: np.ndarray = self.dataset.rows(self.shown_rows(count), ["text"])["text"]
        return found

    def condition_images(self, count: int) -> np.ndarray:
        """(n, K, H, W), the condition images of `shown_rows`."""
        chosen = self.shown_rows(count)
        card = self.dataset.card.condition
        assert card is not None
        return depth_to_space(self.dataset.rows(chosen, ["condition"])["condition"], card.downscale)


@dataclass
class TrainingRun:
    """What one worker holds while it trains."""

    job: TrainJob
    settings: StepSettings
    reader: RowReader
    state: TrainingState
    worker: Worker
    device: torch.device
    timer: WaitTimer = field(init=False)
    metrics: MetricRecorder = field(init=False)

    def __post_init__(self) -> None:
        self.timer = WaitTimer(self.device)
        self.metrics = MetricRecorder("train", self.recipe.name, Folder(self.job.address), str(self.worker.rank))

    @property
    def folder(self) -> Path:
        """The run folder on this node."""
        return Path(self.job.folder)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.job.recipe

    @property
    def card(self) -> ModelCard:
        """The card of the model."""
        return self.job.card

    @property
    def normalisation(self) -> Normalisation:
        """The map from stored values to the network's."""
        return self.job.card.normalisation

    @cached_property
    def flops_per_crop(self) -> list[int]:
        """FLOPs of training on one crop of each patch size."""
        return [training_flops(self.card.denoiser, size.pixels) for size in self.settings.schedule.sizes]

    def flops_of(self, crops_by_size: list[int]) -> int:
        """FLOPs of training on so many crops of each patch size."""
        return sum(n * flops for n, flops in zip(crops_by_size, self.flops_per_crop, strict=True))


def open_run(worker: Worker, job: TrainJob) -> TrainingRun:
    """Build the network, its averages and the optimiser, and load the newest checkpoint if there is one."""
    allow_backbones(*job.backbones)
    recipe, folder = job.recipe, Path(job.folder)
    device = worker.device
    settings = step_settings(recipe, job.card.denoiser.resolution, job.draws_version)
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    denoiser, dataset = build_denoiser(job.card.denoiser), open_dataset(job.dataset)
    newest = starting_checkpoint(worker, folder)
    if newest is None and recipe.train.init_from is not None:
        transfer(denoiser, load_initial_weights(folder))
    if isinstance(denoiser.model, ControlNetwork):
        denoiser.model.no_text.copy_(torch.from_numpy(dataset.no_text()))
    denoiser = denoiser.to(device).train()
    if newest is None:
        share_initial_weights(worker, denoiser)
    state = first_state(denoiser, recipe.optimizer, recipe.ema, settings)
    if newest is not None:
        load_checkpoint(newest, state)
    if job.compile:  # after the averages were copied, which sample without compiling
        compile_network(denoiser, settings.schedule)
    reader = RowReader(dataset, recipe, device, job.draws_version, job.card.condition, denoiser.text_shape is not None)
    return TrainingRun(job, settings, reader, state, worker, device)


def first_state(
    denoiser: Denoiser, optimizer: OptimizerSection, averages: Sequence[AverageSection], settings: StepSettings
) -> TrainingState:
    """The state before the first step of a network on its device. Sets how this process rounds and chooses kernels."""
    set_rounding(settings.precision)
    if next(denoiser.parameters()).is_cuda:
        to_channels_last(denoiser)
        torch.backends.cudnn.benchmark = True  # a run has one shape per patch size and microbatch
    emas = [new_average(denoiser, average) for average in averages]
    return new_state(denoiser, emas, settings, (optimizer.beta1, optimizer.beta2), optimizer.eps)


def new_average(denoiser: Denoiser, section: AverageSection) -> WeightAverage:
    """The running average of one entry of a recipe's `ema`."""
    if section.sigma_rel is not None:
        return PowerEMA(denoiser, section.sigma_rel)
    return HalfLifeEMA(denoiser, section.halflife_images, section.rampup_ratio)


def save_run_model(run: TrainingRun) -> None:
    """Write `model/`: the weights of the first average, their card, the recipe and, for latents, the autoencoder.

    Raises:
        UserError: the files cannot be written.
    """
    card = replace(run.card, images_seen=run.state.images_seen, updates=run.state.step)
    average: Any = run.state.emas[0].module
    try:
        with whole_folder(run.folder / "model") as folder:
            (folder / "recipe.yaml").write_text(recipe_yaml(run.recipe))
            if run.normalisation.kind == "latents":
                copy_autoencoder(run.reader.dataset.path / "autoencoder", folder / "autoencoder")
            save_model(folder, average, card)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{run.folder}/model cannot be written ({error}): free disk space and continue with --resume"
        ) from None
