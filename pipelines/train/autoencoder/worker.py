"""The training loop of an autoencoder in one worker, which continues from the newest checkpoint."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchloom.models.autoencoder import (
    DiffusersAutoencoder,
    autoencoder_loss,
    load_autoencoder,
    new_autoencoder,
    save_autoencoder,
)
from patchloom.models.checkpoints import load_checkpoint
from patchloom.models.gradients import Gradients
from patchloom.models.random_draws import CURRENT_DRAWS, derive_seed
from patchloom.models.step import TrainingState
from patchloom.models.step_plan import draw_source
from patchloom.pipelines.train.agreement import check_agreement, share_initial_weights, starting_checkpoint
from patchloom.pipelines.train.checkpointer import Checkpointer, worker_lock
from patchloom.pipelines.train.control import requested, show_training
from patchloom.pipelines.train.hooks.losses import Divergence
from patchloom.pipelines.train.monitor import Verdict
from patchloom.pipelines.train.node_copies import worker_copy
from patchloom.pipelines.train.progress_log import LineWriter, ProgressLog
from patchloom.platform.compute.workers import Worker
from patchloom.platform.dataset.index import Split
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import whole_folder
from patchloom.platform.recipe.run_recipe import KeepSection
from patchloom.platform.records.autoencoder_run import AutoencoderSettings
from patchloom.platform.records.run import LineFields

LOG_EVERY_STEPS = 10
CHECKPOINTS_PER_RUN = 20  # a killed run repeats at most this part of its steps
SCALE_IMAGES = 128


@dataclass(frozen=True)
class AutoencoderJob:
    """What a worker needs to train its share of an autoencoder.

    Args:
        folder: the run folder; may be remote.
        dataset: address of the dataset.
        settings: the network and its training.
        init_from: folder of the autoencoder whose weights the training starts with. None: random weights.
        owner: who holds the fence of a remote run folder.
        draws_version: version of the order of rows, which a run keeps.
    """

    folder: str
    dataset: str
    settings: AutoencoderSettings
    init_from: Path | None
    owner: str = ""
    draws_version: int = CURRENT_DRAWS


def autoencoder_worker(worker: Worker, job: AutoencoderJob) -> Verdict:
    """Train one worker's share of each batch. Worker 0 writes progress, checkpoints and the model.

    Returns:
        Why the training ended. A request to stop ends it with a checkpoint.
    """
    there = Folder(job.folder)
    with worker_copy(worker, there, job.owner) as folder, worker_lock(worker, folder):
        trainer = _Trainer(worker, job, folder)
        check_agreement(worker, str(job.settings), trainer.state)
        if worker.rank > 0:
            return trainer.train()
        show_training(there)
        with _Watcher(folder, job.settings, trainer.state) as watcher:
            verdict = trainer.train(watcher)
        if verdict != Verdict.FINISHED:
            return verdict
        network: Any = trainer.state.denoiser
        network.register_to_config(
            scaling_factor=_latent_scale(network, trainer.dataset, trainer.split, trainer.device)
        )
        with whole_folder(folder / "model") as model:
            save_autoencoder(network.cpu(), model)
        return verdict


class _Trainer:
    """One worker's share of the training. A step is a function of the weights, the settings and its number."""

    def __init__(self, worker: Worker, job: AutoencoderJob, folder: Path) -> None:
        self.worker, self.settings, self.folder = worker, job.settings, folder
        self.device = worker.device
        self.dataset = open_dataset(job.dataset)
        self.split = self.dataset.split("train", job.settings.held_out_fraction)
        self.order = draw_source(job.settings.seed, job.draws_version).row_order(len(self.split))
        torch.manual_seed(derive_seed(job.settings.seed, "weights"))
        network, newest = _network(job).to(self.device), starting_checkpoint(worker, folder)
        if newest is None:
            share_initial_weights(worker, network)
        self.state = _new_state(network, job.settings.lr)
        if newest is not None:
            load_checkpoint(newest, self.state)

    def train(self, watcher: "_Watcher | None" = None) -> Verdict:
        """Take the remaining steps, until all are taken, the run was asked to stop, or its loss has diverged."""
        divergence, verdict = Divergence(), Verdict.TRAINING
        if self.state.step == self.settings.steps:
            verdict = Verdict.FINISHED
        while verdict == Verdict.TRAINING:
            self._step()
            ends = self.state.step == self.settings.steps
            request = requested(self.worker, self.folder, self.state.step)
            is_logged = ends or request is not None or self.state.step % LOG_EVERY_STEPS == 0
            loss = self.loss() if is_logged else 0.0
            if is_logged and divergence.shows_in(loss):
                verdict = Verdict.DIVERGED
            elif ends:
                verdict = Verdict.FINISHED
            elif request == "":
                verdict = Verdict.STOPPED
            if watcher:
                watcher.after_step(loss if is_logged else None, verdict, request is not None)
        self.worker.meet()
        return verdict

    def loss(self) -> float:
        """The mean loss of the last step, summed over all workers."""
        losses, patches = self.state.gradients.loss_and_crops[0].tolist()
        return float(losses / patches)

    def _step(self) -> None:
        state, settings, worker = self.state, self.settings, self.worker
        batch = range(state.step * settings.batch_size, (state.step + 1) * settings.batch_size)
        state.gradients.flat.zero_()
        with state.gradients.summed(worker.start_sum if worker.count > 1 else None):
            self._add_gradients(batch[worker.rank :: worker.count], len(batch))
        state.gradients.clean()
        torch.nn.utils.clip_grad_norm_(state.denoiser.parameters(), 1.0)
        state.optimizer.param_groups[0]["lr"] = settings.lr * _ramp(state.step, settings.steps)
        state.optimizer.step()
        state.crops_by_size[0] += len(batch)
        state.step += 1

    def _add_gradients(self, patches: range, batch_size: int) -> None:
        """Add the gradients and the loss of these patches of the batch."""
        if not patches:
            return
        state, settings = self.state, self.settings
        rows = self.dataset.rows(self.split.rows(self.order.at(patches)), ["image"])["image"]
        seed = derive_seed(settings.seed, state.step, self.worker.rank)
        generator = torch.Generator(self.device).manual_seed(seed)
        images = _random_patch(torch.from_numpy(rows).to(self.device), settings.patch, generator).float() / 127.5 - 1
        network: Any = state.denoiser
        loss = autoencoder_loss(network, images, settings.kl_weight, generator)
        sums = torch.stack([loss.detach() * len(patches), loss.new_tensor(len(patches))])
        state.gradients.loss_and_crops[0] += sums  # before the backward pass, which starts to sum them
        (loss * len(patches) / batch_size).backward()


class _Watcher:
    """Writes the progress lines and checkpoints of worker 0."""

    def __init__(self, folder: Path, settings: AutoencoderSettings, state: TrainingState) -> None:
        self.settings, self.state = settings, state
        self.lines = LineWriter(ProgressLog(folder, state.step), in_background=False)
        self.checkpointer = Checkpointer(folder, KeepSection())
        self.checkpoint_every = max(LOG_EVERY_STEPS, settings.steps // CHECKPOINTS_PER_RUN)
        self._since = (time.monotonic(), state.images_seen)

    def __enter__(self) -> "_Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpointer.wait()

    def after_step(self, loss: float | None, verdict: Verdict, is_asked: bool) -> None:
        """Write what is due after a step: a line with its loss, if there is one, and a checkpoint.

        Args:
            loss: the loss, for a line.
            verdict: what the run is doing, or why it ends. A diverged run gets no checkpoint.
            is_asked: whether a checkpoint was asked for.
        """
        if loss is not None:
            self._write_line(loss)
        is_due = is_asked or verdict != Verdict.TRAINING or self.state.step % self.checkpoint_every == 0
        if is_due and verdict != Verdict.DIVERGED:
            self.checkpointer.save(self.state, "autoencoder", self.lines.newest)

    def _write_line(self, loss: float) -> None:
        seen, (start, before) = self.state.images_seen, self._since
        rate = (seen - before) / max(time.monotonic() - start, 1e-9)
        fields: LineFields = {
            "step": self.state.step, "images_seen": seen, "loss": loss if math.isfinite(loss) else None,
            "images_per_second": rate,
        }  # fmt: skip
        self.lines.write(lambda: fields)
        self._since = (time.monotonic(), seen)


def _new_state(network: Any, lr: float) -> TrainingState:
    """The state of a run before its first step. The autoencoder takes the place of the denoiser."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    gradients = Gradients(network, (1,))
    scaler = torch.amp.GradScaler(gradients.flat.device.type, enabled=False)
    return TrainingState(network, [], optimizer, gradients, scaler, [0])


def _network(job: AutoencoderJob) -> Any:
    """The network to train, with random weights or with those of `init_from`."""
    if job.init_from is not None:
        initial: Any = load_autoencoder(job.init_from)
        return initial.network.requires_grad_(True).train()
    network = new_autoencoder(job.settings.widths, job.settings.latent_channels)
    with torch.no_grad():  # start with narrow posteriors: noise of unit variance would hide the images at first
        network.quant_conv.bias[job.settings.latent_channels :] = -6
    return network


def _ramp(step: int, steps: int) -> float:
    """The factor of the learning rate: up over the first 5% of the steps, then linearly down to a fiftieth."""
    return min((step + 1) / max(steps // 20, 1), max(0.02, 1 - step / steps))


def _random_patch(images: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """(B, C, H, H) -> (B, C, side, side), at one random offset for all."""
    offsets = images.shape[-1] - side + 1
    y, x = torch.randint(offsets, (2,), generator=generator, device=images.device).tolist()
    return images[:, :, y : y + side, x : x + side]


@torch.no_grad()
def _latent_scale(network: Any, dataset: Dataset, split: Split, device: torch.device) -> float:
    """The factor that gives latents unit variance: diffusers' `scaling_factor`."""
    images = torch.from_numpy(dataset.rows(split.spread(SCALE_IMAGES), ["image"])["image"]).to(device)
    mean, std = DiffusersAutoencoder(network.eval()).encode(images)
    assert std is not None  # an AutoencoderKL
    return float(1 / (mean.var() + std.square().mean()).sqrt())
