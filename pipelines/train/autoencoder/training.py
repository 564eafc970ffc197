"""Train an autoencoder on a dataset of pixels, measure it, and register it."""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from patchloom import __version__
from patchloom.errors import Stopped, UserError
from patchloom.models.autoencoder import NORM_GROUPS
from patchloom.pipelines.prepare.encoders import fetch_autoencoder
from patchloom.pipelines.train.autoencoder.quality import RECONSTRUCTIONS, measure_autoencoder
from patchloom.pipelines.train.autoencoder.worker import AutoencoderJob, autoencoder_worker
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.pipelines.train.control import prepare_control
from patchloom.pipelines.train.monitor import Verdict
from patchloom.pipelines.train.node_copies import command_copy
from patchloom.pipelines.train.training import resume_meter
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.compute.stopping import stop_time
from patchloom.platform.compute.workers import room_for_workers, run_workers
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.copies import ProgressFetcher, pull_folder
from patchloom.platform.files.fence import fenced
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.storage import file_sha256, locked, read_json
from patchloom.platform.progress import progress, say
from patchloom.platform.records.autoencoder_run import AutoencoderRunCard, AutoencoderSettings
from patchloom.platform.records.reference import FILES_FILE, FILES_TAG
from patchloom.platform.records.run import RUN_FILE, ProgressLine, RunCard
from patchloom.platform.tracking.client import is_reachable, require_reachable
from patchloom.platform.tracking.forwarder import MlflowForwarder
from patchloom.platform.tracking.names import check_name
from patchloom.platform.tracking.origin import code_commit, command_line
from patchloom.platform.tracking.registry import describe_version, register_folder
from patchloom.platform.tracking.runs import (
    FINISHED,
    begin_run,
    end_run,
    failed_on_error,
    log_artifacts,
    log_dataset,
    log_metrics,
    reopen_run,
    run_exists,
    run_status,
)
from patchloom.platform.tracking.server_errors import first_line
from patchloom.platform.tracking.store import check_answers, shown_uri
from patchloom.redaction import redacted


@dataclass(frozen=True)
class AutoencoderResult:
    """A trained autoencoder.

    Args:
        model: the model folder.
        psnr_db: mean PSNR of held-out reconstructions, in dB.
        ssim: mean SSIM of held-out reconstructions.
        run_id: id of the MLflow run. None if MLflow did not answer; a second call then sends it.
        reference: `models:/NAME/VERSION` if it was registered.
    """

    model: Path
    psnr_db: float
    ssim: float
    run_id: str | None
    reference: str | None


def train_autoencoder(
    dataset: str,
    out: str,
    settings: AutoencoderSettings | None = None,
    *,
    workers: int = 1,
    register: str | None = None,
    resources: Resources = DEFAULT_RESOURCES,
    max_hours: float | None = None,
) -> AutoencoderResult:
    """Train or fine-tune an autoencoder (diffusers' `AutoencoderKL`) and measure it on held-out images.

    Args:
        dataset: a prepared dataset of pixels; may be remote.
        out: the run folder to write; may be remote. A second call with the same settings continues from the newest
            checkpoint, or returns the finished run.
        settings: the network and its training; by default `AutoencoderSettings()`.
        workers: Ray Train workers; 0 trains in this process, without Ray.
        register: register the autoencoder in MLflow under this name.
        resources: the nodes that the workers may use. By default all.
        max_hours: stop with a checkpoint before so many hours have passed since the call. By default never.

    Returns:
        The model folder (of a remote run a local copy), PSNR (dB) and SSIM of held-out images, and the reference if it
        was registered.

    Raises:
        UserError: the dataset has latents, the settings do not fit it, the folder has something else in it, or
            MLflow does not answer and `register` is given.
        Stopped: SIGTERM arrived or `max_hours` are over; the same call continues.
        WorkersFailed: workers failed again and again.

    Example:
        settings = patchloom.AutoencoderSettings(widths=(8, 8), images=64, patch=8)
        trained = patchloom.train_autoencoder("dataset", "autoencoder", settings, workers=0)
        print(trained.model, trained.psnr_db)
    """
    settings, init_from, stop_at = settings or AutoencoderSettings(), None, stop_time(max_hours)
    if register is not None:
        check_name(register)
        require_reachable()
    rows = open_dataset(dataset)
    if settings.init_from is not None:
        init_from, settings = _find_init_from(settings.init_from, settings)
    _check_fit(settings, rows)
    address = Folder.at(out)
    check_output_folder(address, "run", RUN_FILE)
    paths = UsedPaths(read=(rows.address, str(init_from) if init_from else None), written=(out,))
    with ExitStack() as stack:
        if workers and not address.has(RUN_FILE):
            resources = stack.enter_context(room_for_workers(workers, None, resources, paths))
        owner = stack.enter_context(fenced(address))
        folder = stack.enter_context(command_copy(address, owner))
        stack.enter_context(locked(folder))
        begun = _open_folder(folder, address, settings, rows)
        is_measured = begun.psnr_db is not None
        job = AutoencoderJob(address.address, rows.address, settings, init_from, owner, begun.format_version)
        _run(job, folder, rows, workers, is_measured, resources, stop_at)
        card = AutoencoderRunCard.read(folder) if is_measured else _measure(folder, rows)
        if register and card.reference is None:
            ensure_autoencoder_run(folder, rows)
            card = AutoencoderRunCard.read(folder)
            card = card.model_copy(update={"reference": _register(folder, register, card)})
            card.write(folder)
        _send_quality(folder, rows)
        card = AutoencoderRunCard.read(folder)
        _publish(folder, address)
    say(f"  reconstruction of held-out images: PSNR {card.psnr_db:.1f} dB, SSIM {card.ssim:.3f}", is_result=True)
    return AutoencoderResult(
        folder / "model", float(card.psnr_db or 0), float(card.ssim or 0), card.run_id, card.reference
    )


def _find_init_from(reference: str, settings: AutoencoderSettings) -> tuple[Path, AutoencoderSettings]:
    """The folder of an autoencoder, and the settings with its shape and the checksum of its weights."""
    folder, card = fetch_autoencoder(reference)
    if card.class_name != "AutoencoderKL":
        raise UserError(f"--init-from {reference}: found a {card.class_name}; only an AutoencoderKL can be trained")
    widths = tuple(read_json(folder / "config.json")["block_out_channels"])
    say(f"  starting with the weights of {card.reference}")
    return folder, replace(settings, init_from=card.weights_sha256, widths=widths, latent_channels=card.latent_channels)


def _check_fit(settings: AutoencoderSettings, dataset: Dataset) -> None:
    """Raise UserError if the settings do not fit the dataset."""
    if dataset.kind != "pixels":
        raise UserError(f"{dataset.address} contains {dataset.kind}: pass the dataset of pixels")
    if dataset.card.channels != 3:
        raise UserError(f"{dataset.address} has {dataset.card.channels} channel: an autoencoder needs images with 3")
    if not settings.init_from and any(width <= 0 or width % NORM_GROUPS for width in settings.widths):
        widths = ",".join(map(str, settings.widths))
        raise UserError(f"--widths {widths}: each number of channels must be a multiple of {NORM_GROUPS}")
    resolution, halvings = dataset.card.resolution, len(settings.widths) - 1
    if settings.patch > resolution or settings.patch % 2**halvings:
        raise UserError(
            f"--patch {settings.patch} does not fit images of {resolution} pixels that are halved {halvings} times: "
            f"choose a multiple of {2**halvings} that is at most {resolution}"
        )


def _publish(folder: Path, address: Folder) -> None:
    """Send what this process wrote into its copy of a remote run."""
    for name in (RECONSTRUCTIONS, RUN_FILE) if address.is_remote else ():
        if (folder / name).is_file():
            address.put(folder / name, name)


def _open_folder(folder: Path, address: Folder, settings: AutoencoderSettings, dataset: Dataset) -> AutoencoderRunCard:
    """Check the run in the folder, or create one."""
    if (folder / RUN_FILE).is_file():
        if RunCard.read(folder).kind == "autoencoder":
            card = AutoencoderRunCard.read(folder)
            if (card.settings, card.dataset_fingerprint) == (settings, dataset.fingerprint):
                return card
        raise UserError(f"{address} contains another run: choose another --out")
    card = AutoencoderRunCard(
        format_version=AutoencoderRunCard.FORMAT,
        kind="autoencoder",
        run_id=None,
        code_version=__version__,
        code_commit=code_commit(),
        command=redacted(command_line()),
        dataset=dataset.address,
        settings=settings,
        dataset_fingerprint=dataset.fingerprint,
    )
    card.write(folder)
    _publish(folder, address)
    return card


def ensure_autoencoder_run(folder: Path, dataset: Dataset) -> str:
    """Find the MLflow run of an autoencoder's run folder in the current store, or create it; returns its id."""
    card = AutoencoderRunCard.read(folder)
    if card.run_id is not None and run_exists(card.run_id):
        reopen_run(card.run_id)
        return card.run_id
    tags = {"patchloom.dataset": card.dataset_fingerprint, "patchloom.version": card.code_version}
    run_id = begin_run(
        f"autoencoder {folder.name}", "autoencoder", asdict(card.settings), tags,
        description=f"Trains an autoencoder on the images of `{dataset.address}`, for models of its latents.",
    )  # fmt: skip
    with failed_on_error(run_id):
        log_dataset(run_id, dataset.address, dataset.fingerprint)
    card.model_copy(update={"run_id": run_id, "tracking_uri": shown_uri()}).write(folder)
    return run_id


def _run(
    job: AutoencoderJob,
    folder: Path,
    dataset: Dataset,
    workers: int,
    is_finished: bool,
    resources: Resources,
    stop_at: float | None,
) -> None:
    """Run the workers, and show and forward their progress lines. Of a finished run, send lines that wait."""
    answers, address = is_reachable(), Folder(job.folder)
    ensure = partial(ensure_autoencoder_run, folder, dataset)
    if not answers:
        say(f"  MLflow at {shown_uri()} does not answer: the run continues, and its lines are sent later")
    if is_finished:
        with MlflowForwarder(folder, ensure, lambda _: None):
            return
    if answers and address.is_remote:  # before a worker copies run.json, and sends it back without the run's id
        ensure()
        _publish(folder, address)
    with progress("training the autoencoder", job.settings.images, "patches") as meter:
        first_step = resume_meter(meter, folder)

        def show(line: ProgressLine) -> None:
            if line.step > first_step:
                meter.update(line.images_seen, "loss not finite" if line.loss is None else f"loss {line.loss:.3f}")

        with (
            MlflowForwarder(folder, ensure, show, answers),
            ProgressFetcher(address, folder) if address.is_remote else nullcontext(),
        ):
            verdict = run_workers(
                autoencoder_worker, job, workers, folder / ".ray", "autoencoder", prepare_control(address, stop_at),
                resources=resources, paths=UsedPaths(read=(job.dataset,), written=(job.folder,)),
            )  # fmt: skip
        if address.is_remote:
            pull_folder(address, folder, without_tensors)
        if verdict == Verdict.DIVERGED:
            raise UserError(f"{address}: the loss diverged: start again in another folder with a lower --lr")
        if verdict == Verdict.STOPPED:
            raise Stopped(f"{address} has a checkpoint: run the same command again to continue")


def _measure(folder: Path, dataset: Dataset) -> AutoencoderRunCard:
    """Measure the trained autoencoder, and keep the quality in `run.json`."""
    card = AutoencoderRunCard.read(folder)
    quality = measure_autoencoder(folder, dataset, card.settings.held_out_fraction)
    card = card.model_copy(update=asdict(quality))
    card.write(folder)
    return card


def _send_quality(folder: Path, dataset: Dataset) -> None:
    """Send the quality to the MLflow run and end it, once. Errors of MLflow are only reported."""
    try:
        check_answers()
        run_id, card = ensure_autoencoder_run(folder, dataset), AutoencoderRunCard.read(folder)
        if run_status(run_id) != FINISHED:
            quality = {"psnr_db": float(card.psnr_db or 0), "ssim": float(card.ssim or 0)}
            log_metrics(run_id, quality, step=card.settings.steps)
            log_artifacts(run_id, folder / RECONSTRUCTIONS)
            end_run(run_id)
    except Exception as error:
        say(f"  MLflow did not record the quality ({first_line(error)}); the same command sends it later")


def _register(folder: Path, name: str, card: AutoencoderRunCard) -> str:
    """Register the autoencoder with its quality; returns the reference."""
    version = register_folder(folder / "model", name, str(card.run_id))
    quality = f"PSNR {card.psnr_db:.2f} dB, SSIM {card.ssim:.3f}"
    tags = {
        "kind": "autoencoder",
        "psnr_db": f"{card.psnr_db:.3f}",
        "ssim": f"{card.ssim:.4f}",
        "dataset_fingerprint": card.dataset_fingerprint,
    }
    if (folder / "model" / FILES_FILE).is_file():  # a run of an earlier version has none
        tags[FILES_TAG] = file_sha256(folder / "model" / FILES_FILE)
    describe_version(name, version, f"Autoencoder: {quality} on {card.measured_images} images", tags)
    say(f"  registered models:/{name}/{version}", is_result=True)
    return f"models:/{name}/{version}"
