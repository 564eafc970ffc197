"""Autoencode: a small variational autoencoder of one's own, trained on Ray Train and registered."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.autoencoder import (
    Autoencoder,
    DiffusersAutoencoder,
    autoencoder_loss,
    load_autoencoder,
    new_autoencoder,
)
from patchloom.models.autoencoder import save_autoencoder as save
from patchloom.models.random_draws import RowOrder, derive_seed
from patchloom.models.step import Gradients
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.prepare.encoders import fetch_autoencoder
from patchloom.platform.compute.workers import Worker, run_workers
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.storage import (
    local_path,
    locked,
    make_folder,
    read_json,
    sweep_partial,
    whole_folder,
    write_atomic,
    write_json,
)
from patchloom.platform.progress import progress, say
from patchloom.platform.records.autoencoder_run import AutoencoderSettings
from patchloom.platform.records.run import PROGRESS_FILE, ProgressLine
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.forwarder import MlflowForwarder
from patchloom.platform.tracking.registry import describe_version, register_folder
from patchloom.platform.tracking.runs import begin_run, end_run, log_artifacts, log_dataset, log_metrics

__all__ = ["AutoencoderResult", "AutoencoderSettings", "reconstruct", "reconstruction_quality", "train_autoencoder"]

RUN_FORMAT = 1
LOG_EVERY_STEPS = 10
MEASURED_IMAGES = 256
SHOWN_IMAGES = 8


@dataclass(frozen=True)
class AutoencoderResult:
    """A trained autoencoder: its folder, quality on held-out images, and version where it was registered."""

    model: Path
    psnr_db: float
    ssim: float
    run_id: str
    reference: str | None


def train_autoencoder(
    dataset: str,
    out: str,
    settings: AutoencoderSettings | None = None,
    *,
    workers: int = 1,
    register: str | None = None,
) -> AutoencoderResult:
    """Train or fine-tune an autoencoder (diffusers' `AutoencoderKL`) and measure it on held-out images.

    Args:
        dataset: a prepared dataset of pixels; may be remote.
        out: the run folder to write. A second call with the same settings continues or returns the finished run.
        settings: the network and its training; by default `AutoencoderSettings()`.
        workers: Ray Train workers; 0 trains in this process, without Ray.
        register: register the autoencoder in MLflow under this name.

    Returns:
        The model folder, PSNR (dB) and SSIM of held-out images, and the reference if it was registered.

    Raises:
        UserError: the dataset has latents, the settings do not fit it, or the folder has something else in it.

    Example:
        settings = patchloom.AutoencoderSettings(widths=(8, 8), images=64, patch=8)
        trained = patchloom.train_autoencoder("dataset", "autoencoder", settings, workers=0)
        print(trained.model, trained.psnr_db)
    """
    settings = settings or AutoencoderSettings()
    rows = open_dataset(dataset)
    begin: Path | None = None
    if settings.init_from is not None:
        begin, settings = _init_from(settings.init_from, settings)
    if rows.kind != "pixels":
        raise UserError(f"{dataset} holds {rows.kind}, and an autoencoder learns from pixels: give the pixel dataset")
    if settings.patch > rows.card["resolution"] or settings.patch % 2 ** (len(settings.widths) - 1):
        raise UserError(
            f"--patch {settings.patch} does not fit images of {rows.card['resolution']} pixels that are halved "
            f"{len(settings.widths) - 1} times: choose a smaller multiple of {2 ** (len(settings.widths) - 1)}"
        )
    folder = make_folder(local_path(out))
    with locked(folder):
        run = _open_folder(folder, settings, rows)
        if "psnr_db" not in run:
            config = {
                "folder": str(folder),
                "dataset": rows.address,
                "settings": asdict(settings),
                "init_from": str(begin) if begin else None,
            }
            with (
                progress("training the autoencoder", settings.images, "patches") as meter,
                MlflowForwarder(
                    folder, lambda: str(run["run_id"]), lambda line: meter.update(line.images_seen, _note(line))
                ),
            ):
                run_workers(autoencoder_worker, config, workers, folder / ".ray", "autoencoder")
            run |= _measure(folder, rows, settings, run["run_id"])
            write_json(folder / "run.json", run)
        if register and "reference" not in run:
            run["reference"] = _register(folder, register, run)
            write_json(folder / "run.json", run)
        end_run(run["run_id"])
    say(f"  reconstruction of held-out images: PSNR {run['psnr_db']:.1f} dB, SSIM {run['ssim']:.3f}")
    return AutoencoderResult(folder / "model", run["psnr_db"], run["ssim"], run["run_id"], run.get("reference"))


def _init_from(reference: str, settings: AutoencoderSettings) -> tuple[Path, AutoencoderSettings]:
    """The folder of the autoencoder to begin with, and the settings with its shape and exact weights."""
    folder, card = fetch_autoencoder(reference)
    if card.class_name != "AutoencoderKL":
        raise UserError(
            f"--init-from {reference} is of {card.class_name}, and only an AutoencoderKL can be trained here"
        )
    config = read_json(folder / "config.json")
    say(f"  beginning with the weights of {card.reference}")
    widths = tuple(config["block_out_channels"])
    return folder, replace(settings, init_from=card.weights_sha256, widths=widths, latent_channels=card.latent_channels)


def _note(line: ProgressLine) -> str:
    return f"loss {line.loss:.3f}"


def _open_folder(folder: Path, settings: AutoencoderSettings, dataset: Dataset) -> dict[str, Any]:
    wanted = json.loads(json.dumps({"settings": asdict(settings), "dataset_fingerprint": dataset.fingerprint}))
    if (folder / "run.json").is_file():
        run: dict[str, Any] = read_json(folder / "run.json")
        if {key: run.get(key) for key in wanted} != wanted:
            raise UserError(f"{folder} holds another run: choose another folder")
        return run
    require_reachable()
    tags = {"patchloom.dataset": dataset.fingerprint, "patchloom.version": __version__}
    run_id = begin_run(folder.name, "autoencoder", asdict(settings), tags)
    log_dataset(run_id, dataset.address, dataset.fingerprint)
    run = {"format_version": RUN_FORMAT, "kind": "autoencoder", "run_id": run_id, "code_version": __version__, **wanted}
    write_json(folder / "run.json", run)
    return run


def autoencoder_worker(worker: Worker, config: dict[str, Any]) -> None:
    """Train one worker's share of every batch; worker 0 writes progress and the model."""
    folder = Path(config["folder"])
    settings = AutoencoderSettings(**{**config["settings"], "widths": tuple(config["settings"]["widths"])})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_dataset(config["dataset"])
    train = dataset.indices("train", settings.held_out_fraction)
    order = RowOrder(len(train), settings.seed)
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    network = _network(settings, config["init_from"]).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, betas=(0.9, 0.99), fused=True)
    gradients = Gradients(network, (1,))
    log = ProgressLog(folder / PROGRESS_FILE, settings.batch_size) if worker.rank == 0 else None
    for step in range(settings.steps):
        batch = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        mine = batch[worker.rank :: worker.count]
        gradients.flat.zero_()
        if mine:
            images = torch.from_numpy(dataset.rows(train[[order[k] for k in mine]])["image"]).to(device)
            generator = torch.Generator(device).manual_seed(derive_seed(settings.seed, step, worker.rank))
            images = _random_patch(images, settings.patch, generator).float() / 127.5 - 1
            loss = autoencoder_loss(network, images, settings.kl_weight, generator)
            (loss * len(mine) / len(batch)).backward()
            gradients.loss_and_crops[0] += torch.stack([loss.detach() * len(mine), loss.new_tensor(len(mine))])
        worker.reduce(gradients.flat)
        gradients.clean()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = settings.lr * _ramp(step, settings.steps)
        optimizer.step()
        if log and ((step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == settings.steps):
            losses, patches = gradients.loss_and_crops[0].tolist()
            log.write(step + 1, losses / patches)
    if worker.rank == 0:
        network.register_to_config(scaling_factor=_latent_scale(network, dataset, train, device))
        sweep_partial(folder)
        with whole_folder(folder / "model") as model:
            save(network.cpu(), model)


def _network(settings: AutoencoderSettings, init_from: str | None) -> Any:
    """The network to train: a new one, or one whose weights are there."""
    if init_from is not None:
        begun: Any = load_autoencoder(init_from)
        return begun.network.requires_grad_(True).train()
    network = new_autoencoder(settings.widths, settings.latent_channels)
    with torch.no_grad():  # start with sharp posteriors: noise of unit variance would drown the first steps
        network.quant_conv.bias[settings.latent_channels :] = -6
    return network


class ProgressLog:
    """The autoencoder's progress lines."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size
        self._since = (time.monotonic(), 0)
        write_atomic(path, "")

    def write(self, step: int, loss: float) -> None:
        """Append one line."""
        seen, (began, at) = step * self.batch_size, self._since
        rate = (seen - at) / max(time.monotonic() - began, 1e-9)
        line = {"step": step, "images_seen": seen, "loss": loss, "images_per_second": rate, "time_unix_s": time.time()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._since = (time.monotonic(), seen)


def _ramp(step: int, steps: int) -> float:
    """Up over the first 5% of the steps, then down to a fiftieth."""
    done = step / steps
    return min((step + 1) / max(steps // 20, 1), max(0.02, 1 - done))


def _random_patch(images: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    slack = images.shape[-1] - side + 1
    y, x = torch.randint(slack, (2,), generator=generator, device=images.device).tolist()
    return images[:, :, y : y + side, x : x + side]


@torch.no_grad()
def _latent_scale(network: Any, dataset: Dataset, train: np.ndarray, device: torch.device) -> float:
    """The factor that gives latents unit variance, as diffusers' `scaling_factor` means it."""
    spread = train[np.linspace(0, len(train) - 1, min(128, len(train))).astype(int)]
    images = torch.from_numpy(dataset.rows(spread)["image"]).to(device)
    mean, std = DiffusersAutoencoder(network.eval()).encode(images)
    assert std is not None  # an AutoencoderKL
    return float(1 / (mean.var() + std.square().mean()).sqrt())


def _measure(folder: Path, dataset: Dataset, settings: AutoencoderSettings, run_id: str) -> dict[str, float]:
    """PSNR and SSIM of held-out reconstructions (scikit-image), with a picture of them."""
    held_out = dataset.indices("held_out", settings.held_out_fraction)
    if not len(held_out):
        say("  no row is held out, so the reconstructions of training rows are measured")
        held_out = dataset.indices("all")
    chosen = held_out[np.linspace(0, len(held_out) - 1, min(MEASURED_IMAGES, len(held_out))).astype(int)]
    images = dataset.rows(chosen)["image"]
    autoencoder = load_autoencoder(folder / "model")
    decoded = np.concatenate(
        [reconstruct(autoencoder, images[start : start + 32]) for start in range(0, len(images), 32)]
    )
    quality = reconstruction_quality(images, decoded)
    shown = np.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).astype(int)
    save_png(side_by_side([images[shown], decoded[shown]], scale=2), folder / "reconstructions.png")
    log_metrics(run_id, quality, step=settings.steps)
    log_artifacts(run_id, folder / "reconstructions.png")
    return {**quality, "measured_images": len(images)}


def reconstruct(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) uint8 -> the same through the posterior's mean and back."""
    mean, _ = autoencoder.encode(torch.from_numpy(images))
    decoded: np.ndarray = autoencoder.decode(mean).numpy()
    return decoded


def reconstruction_quality(images: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of (N, 3, H, W) uint8 pairs, by scikit-image."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pairs = list(zip(images, decoded, strict=True))
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    ssim = [structural_similarity(a, b, channel_axis=0, data_range=255) for a, b in pairs]
    return {"psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}


def _register(folder: Path, name: str, run: dict[str, Any]) -> str:
    version = register_folder(folder / "model", name, run["run_id"])
    description = (
        f"Autoencoder: PSNR {run['psnr_db']:.2f} dB, SSIM {run['ssim']:.3f} on {run['measured_images']} images"
    )
    tags = {"kind": "autoencoder", "psnr_db": f"{run['psnr_db']:.3f}", "ssim": f"{run['ssim']:.4f}"}
    describe_version(name, version, description, tags | {"dataset_fingerprint": run["dataset_fingerprint"]})
    say(f"  registered models:/{name}/{version}")
    return f"models:/{name}/{version}"
