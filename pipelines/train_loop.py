"""The training loop of one worker: plan a step, fetch its rows, take it, and now and then look up."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom.models.backbones import allow_backbones
from patchloom.models.checkpoints import Model, load_checkpoint, save_average, save_checkpoint, save_model
from patchloom.models.codec import Space
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA, PowerEMA, WeightAverage
from patchloom.models.flops import training_flops
from patchloom.models.generate import Sampling, default_labels, generate
from patchloom.models.loss import SIGMA_BINS, held_out_loss
from patchloom.models.luck import RowOrder, derive_seed
from patchloom.models.patches import patch_schedule
from patchloom.models.plan import Method, StepPlan, plan_step
from patchloom.models.step import Rows, TrainingState, learning_rate, new_state, one_hot, training_step
from patchloom.pipelines.pictures import contact_sheet, save_png
from patchloom.platform.cluster import Worker
from patchloom.platform.dataset import Dataset, open_dataset
from patchloom.platform.recipe import Average, Recipe, check_recipe, recipe_yaml
from patchloom.platform.storage import (
    locked,
    read_json_lines,
    sweep_partial,
    whole_folder,
    write_json_lines,
)
from patchloom.platform.tracking import PROGRESS_FILE

CHECKPOINTS = "checkpoints"
KEPT_CHECKPOINTS = 2
HELD_OUT_IMAGES = 64
LEAVING_WORKER_S = 60.0  # an orphan of a killed session may still be writing


def method_of(recipe: Recipe, resolution: int) -> Method:
    """The recipe in the plain values that a step takes."""
    sizes = [(size.fraction, size.weight, size.batch_multiplier) for size in recipe.patches.sizes]
    patches = recipe.patches
    schedule = patch_schedule(resolution, patches.p, patches.schedule, sizes, patches.shares_of)
    return Method(
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


class Reader:
    """Fetches the rows of a run's crops from the memory-mapped training rows."""

    def __init__(self, dataset: Dataset, recipe: Recipe, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self.train = dataset.indices("train", recipe.data.held_out_fraction)
        self.held_out = dataset.indices("held_out", recipe.data.held_out_fraction)
        self.order = RowOrder(len(self.train), recipe.seed)

    def rows(self, crops: range) -> Rows:
        """The rows that these crops of the run are cut from."""
        return self.at(self.train[[self.order[k] for k in crops]])

    def at(self, indices: np.ndarray) -> Rows:
        """The rows at these positions, on the device."""
        columns = self.dataset.rows(indices)
        label = torch.from_numpy(columns["label"]).to(self.device)
        if self.dataset.kind == "pixels":
            return Rows(torch.from_numpy(columns["image"]).to(self.device), label)
        mean, std = (torch.from_numpy(columns[name]).to(self.device).float() for name in ("mean", "std"))
        return Rows(mean, label, std)


@dataclass
class Run:
    """What one worker holds while it trains."""

    folder: Path
    recipe: Recipe
    card: dict[str, Any]  # of the model: its network, space and classes
    method: Method
    space: Space
    reader: Reader
    state: TrainingState
    worker: Worker
    device: torch.device


def train_worker(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
    """Train one worker's share of a run from its newest checkpoint to its end; returns the last progress line."""
    folder = Path(config["folder"])
    if worker.rank > 0:
        return _train(worker, config)
    with locked(folder, ".worker.lock", wait_s=LEAVING_WORKER_S):
        sweep_partial(folder)
        sweep_partial(folder / CHECKPOINTS)
        return _train(worker, config)


def _train(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
    run = open_run(worker, config)
    monitor = Monitor(run)
    state, method = run.state, run.method
    while state.step < method.updates:
        plan = plan_step(method, state.step, state.images_seen)
        work = [(group, run.reader.rows(group.crops)) for group in plan.share(worker.rank, worker.count)]
        training_step(state, method, plan, work, run.space, worker.reduce)
        monitor.after_step(plan)
    if worker.rank == 0:
        save_run_model(run)
    return monitor.last_line


def open_run(worker: Worker, config: dict[str, Any]) -> Run:
    """Build the networks and bring them to the newest whole checkpoint, if there is one."""
    allow_backbones(*config["backbones"])
    recipe = check_recipe(config["recipe"])
    card: dict[str, Any] = config["card"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = method_of(recipe, card["denoiser"]["resolution"])
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    denoiser = build_denoiser(card["denoiser"]).to(device).train()
    emas = [new_average(denoiser, average) for average in recipe.ema]
    optimizer = recipe.optimizer
    state = new_state(denoiser, emas, method, (optimizer.beta1, optimizer.beta2), optimizer.eps)
    folder = Path(config["folder"])
    newest = newest_checkpoint(folder)
    if newest is not None:
        load_checkpoint(newest, state)
    space = Space(card["space"]["kind"], tuple(card["space"]["mean"]), tuple(card["space"]["scale"]))
    reader = Reader(open_dataset(config["dataset"]), recipe, device)
    return Run(folder, recipe, card, method, space, reader, state, worker, device)


def new_average(denoiser: Denoiser, settings: Average) -> WeightAverage:
    """The running average that a recipe's entry asks for."""
    if settings.sigma_rel is not None:
        return PowerEMA(denoiser, settings.sigma_rel)
    return HalfLifeEMA(denoiser, settings.halflife_images, settings.rampup_ratio)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole: the only authority on where a run goes on."""
    whole = sorted((folder / CHECKPOINTS).glob("step-*/checkpoint.json"))
    return whole[-1].parent if whole else None


def save_run_checkpoint(run: Run) -> None:
    """Write `checkpoints/step-...` whole, then let go of the oldest."""
    checkpoints = run.folder / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    with whole_folder(checkpoints / f"step-{run.state.step:08d}") as folder:
        save_checkpoint(folder, run.state, {"recipe": run.recipe.name})
    for old in sorted(checkpoints.glob("step-*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def save_run_model(run: Run) -> None:
    """Write `model/`: the first average's weights, their card, the recipe and, for latents, the decoder."""
    card = run.card | {"images_seen": run.state.images_seen, "updates": run.state.step}
    with whole_folder(run.folder / "model") as folder:
        (folder / "recipe.yaml").write_text(recipe_yaml(run.recipe))
        if run.space.kind == "latents":
            shutil.copytree(run.reader.dataset.path / "autoencoder", folder / "autoencoder")
        save_model(folder, run.state.emas[0].module, card)  # type: ignore[arg-type]


class Monitor:
    """What a run tells while it trains: progress lines, previews, the held-out loss, checkpoints.

    Losses gather on the device and are read only when a line is written. Only worker 0 writes.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.totals = torch.zeros_like(run.state.gradients.loss_and_crops)
        denoiser = run.card["denoiser"]
        self.flops = [training_flops(denoiser, size.pixels) for size in run.method.schedule.sizes]
        self.last_line: dict[str, Any] = {}
        self._model: Model | None = None
        self._since = (time.monotonic(), run.state.images_seen)
        if run.worker.rank == 0:  # lines past the checkpoint are about to be written again
            lines = read_json_lines(run.folder / PROGRESS_FILE)
            kept = [line for line in lines if line["step"] <= run.state.step]
            write_json_lines(run.folder / PROGRESS_FILE, kept)
            self.last_line = kept[-1] if kept else {}

    def after_step(self, plan: StepPlan) -> None:
        """Count the step, and do what is due after it."""
        self.totals += self.run.state.gradients.loss_and_crops
        if self.run.worker.rank > 0:
            return
        recipe = self.run.recipe
        finished = self.run.state.step == self.run.method.updates
        look = finished or self._due(recipe.preview.every_images, plan)
        if look or self._due(recipe.train.log_every_images, plan):
            self._write_line(self._looked_at() if look else {})
        for average, settings in zip(self.run.state.emas, recipe.ema, strict=True):
            every = settings.snapshot_every_images
            if isinstance(average, PowerEMA) and every and (finished or self._due(every, plan)):
                self._keep(average)
        if finished or self._due(recipe.train.checkpoint_every_images, plan):
            save_run_checkpoint(self.run)
            self._since = (time.monotonic(), self.run.state.images_seen)

    def _keep(self, average: PowerEMA) -> None:
        """`ema/sigma-rel-0.1/step-00001000.safetensors`."""
        state = self.run.state
        folder = self.run.folder / "ema" / f"sigma-rel-{average.sigma_rel:g}"
        folder.mkdir(parents=True, exist_ok=True)
        save_average(folder / f"step-{state.step:08d}.safetensors", average, state.images_seen)

    def _due(self, every_images: int, plan: StepPlan) -> bool:
        seen = self.run.state.images_seen
        return every_images > 0 and seen // every_images > (seen - plan.crops) // every_images

    def _write_line(self, extra: dict[str, Any]) -> None:
        state, sizes = self.run.state, self.run.method.schedule.sizes
        began, at = self._since
        rate = (state.images_seen - at) / max(time.monotonic() - began - extra.pop("seconds", 0.0), 1e-9)
        totals = self.totals.double().cpu()  # (patch sizes, sigma bins, 2)
        self.totals.zero_()
        losses, crops = totals.sum(1).unbind(1)
        full = sizes[0].pixels
        line = {
            "step": state.step,
            "updates": state.step,
            "images_seen": state.images_seen,
            "full_size_images": state.crops_by_size[0],
            "pixel_equivalent_images": sum(
                n * (size.pixels / full) ** 2 for n, size in zip(state.crops_by_size, sizes, strict=True)
            ),
            "flops": sum(n * flops for n, flops in zip(state.crops_by_size, self.flops, strict=True)),
            "loss": float(losses.sum() / crops.sum()),
            "loss_by_patch_size": {
                str(size.pixels): float(loss / n) for size, loss, n in zip(sizes, losses, crops, strict=True) if n
            },
            "loss_by_sigma": {
                name: float(loss / n) for name, (loss, n) in zip(SIGMA_BINS, totals.sum(0), strict=True) if n
            },
            "learning_rate": learning_rate(self.run.method, state.images_seen),
            "images_per_second": rate,
            **extra,
            "time_unix_s": time.time(),
        }
        with (self.run.folder / PROGRESS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.last_line = line
        self._since = (time.monotonic(), state.images_seen)

    def _looked_at(self) -> dict[str, Any]:
        """A preview grid and the held-out loss of the averaged weights, and how long they took."""
        began = time.monotonic()
        looked: dict[str, Any] = {}
        if self.run.recipe.preview.every_images:
            looked["preview"] = self._preview()
        by_sigma = self._held_out()
        if by_sigma:
            looked["held_out_loss"] = sum(by_sigma.values()) / len(by_sigma)
            looked["held_out_loss_by_sigma"] = {f"{sigma:g}": loss for sigma, loss in by_sigma.items()}
        return looked | {"seconds": time.monotonic() - began}

    def _preview(self) -> str:
        run, preview = self.run, self.run.recipe.preview
        if self._model is None:
            autoencoder = None
            if run.space.kind == "latents":
                from patchloom.models.autoencoder import load_autoencoder

                autoencoder = load_autoencoder(run.reader.dataset.path / "autoencoder", run.device)
            average: Any = run.state.emas[0].module
            self._model = Model(average, run.space, autoencoder, run.card)
        seeds = list(range(preview.count))
        labels = default_labels(seeds, self._model.denoiser.classes)
        images = generate(self._model, seeds, labels, Sampling(steps=preview.steps)).cpu().numpy()
        name = f"previews/step-{run.state.step:08d}.png"
        save_png(contact_sheet(images), run.folder / name)
        return name

    def _held_out(self) -> dict[float, float]:
        run = self.run
        indices = run.reader.held_out
        if not len(indices):
            return {}
        spread = np.linspace(0, len(indices) - 1, min(HELD_OUT_IMAGES, len(indices))).astype(int)
        rows = run.reader.at(indices[spread])
        denoiser: Any = run.state.emas[0].module
        labels = one_hot(rows.label, denoiser.classes) if denoiser.classes else None
        return held_out_loss(denoiser, run.space.normalise(rows.image), labels)
