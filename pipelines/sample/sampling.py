"""Sample: seeds in, a folder of images out. A second call only samples the missing images."""

import hashlib
import inspect
import time
from dataclasses import asdict, dataclass
from typing import Any

from patchloom.errors import UserError
from patchloom.models.backbones import allowed_backbones
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import sampling_skeleton, verified_card
from patchloom.models.conditions import check_condition
from patchloom.models.generate import Sampling, check_fit, image_size
from patchloom.models.memory import sampling_bytes
from patchloom.pipelines.sample.batches import default_batch
from patchloom.pipelines.sample.conditions import CONDITIONS_FILE, condition_lines, open_sample_conditions
from patchloom.pipelines.sample.folder import (
    CONTACT_SHEET,
    MANIFEST,
    SAMPLING_CARD,
    check_samples_folder,
    complete_folder,
    intact_images,
    read_sampling_card,
    write_or_check_card,
)
from patchloom.pipelines.sample.formats import FORMATS
from patchloom.pipelines.sample.known_images import read_known_image
from patchloom.pipelines.sample.options import SampleOptions, option_parameters
from patchloom.pipelines.sample.seeds import Seeds, choose_labels, listed_seeds, parse_seeds
from patchloom.pipelines.sample.shard_sampler import (
    KNOWN_IMAGE,
    SampledShard,
    SeedShard,
    ShardSampler,
    ShardSamplerArgument,
)
from patchloom.platform.compute.jobs import Job, run_job
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.compute.work_devices import job_device
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say
from patchloom.platform.records.samples import (
    ModelLineage,
    SampledConditions,
    SampledModel,
    SamplingCard,
)
from patchloom.platform.tracking.registry import FetchedModel, fetch_model
from patchloom.platform.tracking.store import store_environment

ARCHIVE_IMAGES = 1000  # per archive, by default
UNIT_IMAGES, MAX_UNITS = 16, 1000  # of PNG files: the smallest unit of work, and the largest number of units


@dataclass(frozen=True)
class SampleResult:
    """A finished folder of samples, and what this call did.

    Args:
        folder: its address.
        format: the file format.
        model: reference, sha256 and lineage of the model.
        images: number of images in the folder.
        made: number of images that this call sampled.
        seconds: duration of this call.
        images_per_second: without the start of the workers.
        manifest: address of the manifest.
        contact_sheet: address of the contact sheet.
    """

    folder: str
    format: str
    model: dict[str, str | None]
    images: int
    made: int
    seconds: float
    images_per_second: float
    manifest: str
    contact_sheet: str


def sample(
    model: str,
    out: str,
    seeds: str | list[int] = "0-63",
    *,
    workers: int | None = None,
    resources: Resources = DEFAULT_RESOURCES,
    **options: Any,
) -> SampleResult:
    """Sample one image per seed into a folder, with a manifest and a contact sheet.

    A second call samples the images that are missing; a call with more seeds extends the folder. The bytes of an
    image depend on the model, the seed, the label, the options and `batch`, not on workers or interruptions.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model` or a folder.
        out: the folder to write: a path, or s3://, gs://, ...
        seeds: "0-63", "0,5,9", a file with one seed per line, or a list of numbers.
        steps: number of noise levels. Default: 18.
        sampler: heun, euler, ddim, ancestral, dpmpp-2m, dpmpp-2m-sde or plms. Default: heun.
        ladder: spacing of the noise levels: karras, vp, ve, linear or iddpm. Default: karras.
        churn: heun: total noise added during sampling (EDM's S_churn). Default: 0.
        churn_between: (low, high) noise levels at which noise is added. Default: all.
        churn_noise: scale of that noise (EDM's S_noise). Default: 1.
        guidance: scale of classifier-free guidance; 1 turns it off. Default: 1.
        guidance_between: (low, high) noise levels that are guided. Default: all.
        label: one class for all seeds, by name or number. Default: all classes take turns.
        labels: a file with the class of each seed: .csv, .jsonl or .parquet with columns seed and label, or .txt.
        size: (height, width) in pixels. Default: the trained size.
        canvas: how another size is sampled: rescale or extrapolate the coordinates, or in windows. Default: rescale.
        precision: arithmetic of the network and the autoencoder: fp32, bf16 or fp16. Default: fp32.
        conditions: for models with a condition: a folder of edge images, masks, arrays, ..., or a dataset prepared with
            a condition; seed i follows the i-th one, and they take turns.
        outpaint: an image file that fills the center of a larger size.
        inpaint: an image file of which the white part of `mask` is kept; the rest is sampled.
        mask: with `inpaint`, an image file of the same size, white where pixels are kept.
        outpaint_method: how the rest is fitted to the kept pixels: reconstruct, resample or replace. Default:
            reconstruct.
        format: png, zip, webdataset, parquet or npz. Default: png.
        shard_size: images per archive, and per unit of work. Default: 1000 per archive.
        batch: images per network batch. Default: that of the folder; for a new folder 8 on CPUs, and on GPUs up to 64,
            by their memory.
        workers: parallel processes. None: all GPUs or CPUs. 0: this process, without Ray.
        resources: the nodes that the workers may use. By default all.

    Returns:
        The folder and what this call did.

    Raises:
        UserError: the model or a class is unknown, the options do not fit the model, or the folder contains
            something else.

    Example:
        result = patchloom.sample("models:/my-model@champion", "samples", seeds="0-7", steps=2)
        print(result.contact_sheet)
    """
    began = time.monotonic()
    chosen, job = _planned_job(model, out, seeds, workers, resources, options)
    result = run_job(job, workers, resources)
    say(f"  {job.images} images and {CONTACT_SHEET} in {job.folder}", is_result=True)
    return SampleResult(
        folder=str(job.folder),
        format=chosen.format,
        model=job.card.model.to_dict() | job.card.lineage.to_dict(),
        images=job.images,
        made=result.images,
        seconds=time.monotonic() - began,
        images_per_second=result.images_per_second,
        manifest=f"{job.folder}/{MANIFEST}",
        contact_sheet=f"{job.folder}/{CONTACT_SHEET}",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingEstimate:
    """What sampling is expected to do and need: the result of `patchloom sample --dry-run`.

    Args:
        images: images of the folder when it is complete.
        network_evaluations: evaluations of the network per image.
        batch: images per network batch.
        precision: arithmetic of the network.
        device: cpu or cuda; None for a folder that an earlier version began.
        bytes_per_worker: memory for weights and activations at the peak; None if the network cannot be simulated.
    """

    images: int
    network_evaluations: int
    batch: int
    precision: str
    device: str | None
    bytes_per_worker: int | None

    @property
    def text(self) -> str:
        """It as sentences."""
        memory = "unknown memory"
        if self.bytes_per_worker is not None:
            memory = f"{self.bytes_per_worker / 2**20:,.0f} MiB per worker at the peak: weights and activations"
        return (
            f"{self.images:,} images with {self.network_evaluations} network evaluations each, in batches of "
            f"{self.batch} in {self.precision} on {self.device or 'the device of the folder'}\n  {memory}"
        )


def describe_sampling(
    model: str,
    out: str,
    seeds: str | list[int] = "0-63",
    *,
    workers: int | None = None,
    resources: Resources = DEFAULT_RESOURCES,
    **options: Any,
) -> SamplingEstimate:
    """Estimate sampling without starting it; nothing is written. The arguments are those of `sample`."""
    _, job = _planned_job(model, out, seeds, workers, resources, options)
    card, sampling = job.card, job.argument.sampling
    try:
        skeleton = sampling_skeleton(job.model_folder)
        with_gradients = job.known is not None and job.known.pixels().needs_gradients
        needed: int | None = sampling_bytes(skeleton, sampling, card.batch, card.device or "cpu", with_gradients)
    except NotImplementedError:  # a backbone may not support the meta device
        needed = None
    return SamplingEstimate(
        images=job.total,
        network_evaluations=card.network_evaluations,
        batch=card.batch,
        precision=sampling.precision,
        device=card.device,
        bytes_per_worker=needed,
    )


def _planned_job(
    model: str,
    out: str,
    seeds: str | list[int],
    workers: int | None,
    resources: Resources,
    options: dict[str, Any],
) -> tuple[SampleOptions, "SampleJob"]:
    try:
        chosen = SampleOptions(**options)
        return chosen, SampleJob(model, Folder.at(out), seeds, chosen, workers, resources)
    except ValueError as error:
        raise UserError(str(error)) from None


_model, _out, _seeds, _workers, _resources, _ = inspect.signature(sample).parameters.values()
sample.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # help() shows the options
    [_model, _out, _seeds, *option_parameters(), _workers, _resources], return_annotation=SampleResult
)


class SampleJob(Job[SeedShard, SampledShard]):
    """The job of `sample`: its units are shards of seeds."""

    command, title = "sample", "sampling"
    worker = ShardSampler
    folder: Folder
    argument: ShardSamplerArgument

    def __init__(
        self,
        model: str,
        folder: Folder,
        seeds: str | list[int],
        options: SampleOptions,
        workers: int | None,
        resources: Resources,
    ) -> None:
        """Check the options against the model; raises UserError or ValueError if they do not fit."""
        self.seeds = parse_seeds(seeds) if isinstance(seeds, str) else listed_seeds(seeds)
        fetched, sampling = fetch_model(model), options.sampling()
        self.model_folder, card = fetched.folder, verified_card(fetched.folder)
        self.classes, labels, label = choose_labels(self.seeds, card, options.label, options.labels)
        self.known, sampling = read_known_image(options, sampling, card)
        check_fit(sampling, card)
        self.condition_lines, conditions = b"", None
        if options.conditions is None or card.condition is None:
            check_condition(card.condition, None if options.conditions is None else (), image_size(card, sampling))
        else:
            opened = open_sample_conditions(options.conditions, card.condition, image_size(card, sampling))
            self.condition_lines = b"".join(condition_lines(opened))
            sha256 = hashlib.sha256(self.condition_lines).hexdigest()
            conditions = SampledConditions(count=len(opened), sha256=sha256)
        pixels = self.known.pixels() if self.known else None
        with_gradients = pixels is not None and pixels.needs_gradients
        batch, device = _batch_and_device(folder, fetched, sampling, with_gradients, options.batch, workers, resources)
        is_archive = FORMATS[options.format].pack is not None
        self.folder, self.total, self.images, self.shard_size = folder, len(self.seeds), 0, options.shard_size
        self.card = SamplingCard(
            format_version=SamplingCard.FORMAT,
            kind="samples",
            model=_sampled_model(fetched, card),
            **asdict(sampling),
            network_evaluations=sampling.evaluations_given(pixels),
            labels=labels,
            label=label,
            outpaint=self.known.record if self.known and options.outpaint else None,
            **({"conditions": conditions} if conditions else {}),
            format=options.format,
            shard_size=(options.shard_size or ARCHIVE_IMAGES) if is_archive else None,
            batch=batch,
            threads=1,
            **({"device": device} if device else {}),
            **({"inpaint": self.known.record} if self.known and options.inpaint else {}),
            lineage=ModelLineage(run_id=fetched.run_id, name=fetched.name, version=fetched.version),
        )
        read = (fetched.reference, *([options.conditions] if options.conditions else []))
        self.paths = UsedPaths(read=read, written=(folder.address,))
        self.argument = ShardSamplerArgument(
            fetched.reference, folder.address, store_environment(), tuple(allowed_backbones()), sampling, batch,
            options.format, self.card.shard_size, self.known.method if self.known else None, device,
            _shared_address(options.conditions),
        )  # fmt: skip

    def start(self) -> bool:
        """Write `sampling.json`, and the image that is kept or the list of conditions."""
        write_or_check_card(self.folder, self.card)
        if self.known is not None:
            self.folder.write(KNOWN_IMAGE, self.known.png())
        if self.condition_lines:
            self.folder.write(CONDITIONS_FILE, self.condition_lines)
        return True

    def missing(self) -> list[SeedShard]:
        """Shards of the seeds that have no intact image."""
        intact = intact_images(self.folder, self.seeds, self.classes)
        self.images, todo = len(intact.seeds), self.seeds.without(intact.seeds)
        if self.card.shard_size:  # an archive has a fixed range of seeds; one that is extended keeps its images
            archives = todo.by_archive(self.card.shard_size)
            return [self._shard(number, seeds, intact.lines_of(number)) for number, seeds in archives]
        size = self.shard_size or _unit_size(len(todo), self.card.batch)
        return [self._shard(int(seeds.firsts[0]), seeds) for seeds in todo.in_parts(size)]

    def _shard(self, number: int, seeds: Seeds, kept_lines: tuple[int, int] = (0, 0)) -> SeedShard:
        return SeedShard(f"{number:06d}", seeds, self.classes.within(seeds), kept_lines)

    def finish(self) -> None:
        """Complete the manifest and draw the contact sheet."""
        self.images = complete_folder(self.folder, self.card.format, self.images)


def _shared_address(conditions: str | None) -> str | None:
    """The address of the conditions in any working directory."""
    return None if conditions is None else Folder.at(conditions).address


def _batch_and_device(
    folder: Folder,
    model: FetchedModel,
    sampling: Sampling,
    with_gradients: bool,
    batch: int | None,
    workers: int | None,
    resources: Resources,
) -> tuple[int, str | None]:
    """The batch and the kind of device: those of the folder, or for a new folder those of the workers."""
    if folder.has(SAMPLING_CARD):
        found = read_sampling_card(folder)
        return batch or found.batch, found.device
    check_samples_folder(folder)
    device = job_device(workers, resources)
    return batch or default_batch(model.folder, sampling, device.kind, device.memory_bytes, with_gradients), device.kind


def _sampled_model(fetched: FetchedModel, card: ModelCard) -> SampledModel:
    sha256 = {"autoencoder_sha256": card.autoencoder.weights_sha256} if card.autoencoder else {}
    return SampledModel(reference=fetched.reference, weights_sha256=card.weights_sha256, **sha256)


def _unit_size(count: int, batch: int) -> int:
    """PNG files per unit: whole batches, enough units for all workers, and not too many units."""
    least = -(-UNIT_IMAGES // batch)
    return batch * max(least, min(count // (MAX_UNITS * batch), 1000 // batch))
