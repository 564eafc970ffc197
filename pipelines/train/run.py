"""Runs: what one worker holds while it trains, opened where its newest checkpoint stands."""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import load_checkpoint, save_model
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA, PowerEMA, WeightAverage
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.random_draws import RowOrder, derive_seed
from patchloom.models.step import StoredRows, TrainingState, compile_network, new_state, set_rounding
from patchloom.models.step_plan import StepSettings
from patchloom.models.transfer import transfer
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.pipelines.train.initial_weights import load_beginning
from patchloom.platform.compute.workers import Worker
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.storage import whole_folder
from patchloom.platform.recipe.run_recipe import AverageSection, Recipe, check_recipe, recipe_yaml

Result = TypeVar("Result")


def step_settings(recipe: Recipe, resolution: int) -> StepSettings:
    """The recipe in the plain values that a step takes."""
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
        mirror=recipe.data.mirror,
        augmentation=recipe.data.augment,
        draw=patches.draw,
        emulated_ranks=recipe.train.emulated_ranks,
        precision=recipe.train.precision,
    )


class Clock:
    """Seconds that went into waiting, by what was waited for, each wait in the order it came."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waits: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        """A moment on the device's own clock, without waiting for it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def seconds_between(self, before: Any, after: Any) -> float:
        """What passed between two marks; on a GPU both must have been reached."""
        return float(before.elapsed_time(after)) / 1000 if self.device.type == "cuda" else after - before

    def timed(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function`, whose time is counted under `name`."""

        def counted(*arguments: Any) -> Result:
            began = self.mark()
            try:
                return function(*arguments)
            finally:
                self._waits[name].append((began, self.mark()))

        return counted

    def take(self, name: str) -> list[float]:
        """The seconds of every wait under `name` since the last call; a GPU must have come to its end."""
        waits, self._waits[name] = self._waits[name], []
        return [self.seconds_between(*wait) for wait in waits]


class CropReader:
    """Fetches the rows of a run's crops from the memory-mapped training rows."""

    def __init__(self, dataset: Dataset, recipe: Recipe, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self.train = dataset.indices("train", recipe.data.held_out_fraction)
        self.held_out = dataset.indices("held_out", recipe.data.held_out_fraction)
        self.order = RowOrder(len(self.train), recipe.seed)

    def rows(self, crops: range) -> StoredRows:
        """The rows that these crops of the run are cut from."""
        return self.at(self.train[[self.order[k] for k in crops]])

    def at(self, indices: np.ndarray) -> StoredRows:
        """The rows at these positions, on the device."""
        columns = self.dataset.rows(indices)
        label = torch.from_numpy(columns["label"]).to(self.device)
        if self.dataset.kind == "pixels":
            return StoredRows(torch.from_numpy(columns["image"]).to(self.device), label)
        moments = {
            name: torch.from_numpy(columns[name]).to(self.device).float() for name in ("mean", "std") if name in columns
        }
        return StoredRows(moments["mean"], label, moments.get("std"))  # a deterministic autoencoder has no std


@dataclass
class Run:
    """What one worker holds while it trains."""

    folder: Path
    recipe: Recipe
    card: ModelCard
    method: StepSettings
    space: Normalisation
    reader: CropReader
    state: TrainingState
    worker: Worker
    device: torch.device
    microbatch: int | None = None
    profiled: bool = False
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)


def open_run(worker: Worker, config: dict[str, Any]) -> Run:
    """Build the networks and bring them to the newest whole checkpoint, if there is one."""
    allow_backbones(*config["backbones"])
    recipe = check_recipe(config["recipe"])
    card: ModelCard = config["card"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = step_settings(recipe, card.denoiser.resolution)
    set_rounding(recipe.train.precision)
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    denoiser = build_denoiser(card.denoiser)
    folder = Path(config["folder"])
    newest = newest_checkpoint(folder)
    if newest is None and recipe.train.init_from is not None:
        transfer(denoiser, load_beginning(folder))
    denoiser = denoiser.to(device).train()
    emas = [new_average(denoiser, average) for average in recipe.ema]
    optimizer = recipe.optimizer
    state = new_state(denoiser, emas, method, (optimizer.beta1, optimizer.beta2), optimizer.eps)
    if newest is not None:
        load_checkpoint(newest, state)
    if config["compile"]:  # the averages were copied before, and sample as they are
        compile_network(denoiser, method.schedule)
    reader = CropReader(open_dataset(config["dataset"]), recipe, device)
    profiled = config["profile"] and worker.rank == 0
    return Run(
        folder, recipe, card, method, card.normalisation, reader, state, worker, device, config["microbatch"], profiled
    )


def new_average(denoiser: Denoiser, settings: AverageSection) -> WeightAverage:
    """The running average that a recipe's entry asks for."""
    if settings.sigma_rel is not None:
        return PowerEMA(denoiser, settings.sigma_rel)
    return HalfLifeEMA(denoiser, settings.halflife_images, settings.rampup_ratio)


def save_run_model(run: Run) -> None:
    """Write `model/`: the first average's weights, their card, the recipe and, for latents, the decoder."""
    card = replace(run.card, images_seen=run.state.images_seen, updates=run.state.step)
    average: Any = run.state.emas[0].module
    try:
        with whole_folder(run.folder / "model") as folder:
            (folder / "recipe.yaml").write_text(recipe_yaml(run.recipe))
            if run.space.kind == "latents":
                shutil.copytree(run.reader.dataset.path / "autoencoder", folder / "autoencoder")
            save_model(folder, average, card)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{run.folder}: the model was not written ({error}): free some space and go on with --resume"
        ) from None
