"""Planning: which inputs a preparation has, in which order, and everything that the bytes of its shards depend on."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from patchloom.errors import UserError, did_you_mean
from patchloom.pipelines.prepare.conditions import computed_condition, described_condition
from patchloom.pipelines.prepare.encoders import fetch_autoencoder, image_channels
from patchloom.pipelines.prepare.images import CROPS, FILTERS, MODES, WINDOW_MARK, Transform, decode, size_of
from patchloom.pipelines.prepare.inputs import DatasetLines, InputLines, KeptLines, MirroredLines
from patchloom.platform.dataset.condition_source import ConditionSource
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.dataset.readers import SourceReader, is_of_node_or_store
from patchloom.platform.dataset.sources import Source, count_endings, open_source
from patchloom.platform.progress import say
from patchloom.platform.records.dataset import DatasetAutoencoder, ImageTransform
from patchloom.platform.records.prepare import ConditionPlan, PreparationPlan, PreparedInput

PRECISIONS = ("fp32", "bf16")
SHARD_ROWS, SHARD_BYTES = 512, 64 << 20  # limits of a small shard: rows, and bytes of its decoded images
SHARDS_BEFORE_GROWTH, LARGEST_SHARD_BYTES = 256, 128 << 20
SD_VAE, LATENTS_FROM_PIXELS = "stabilityai/sd-vae-ft-mse", 256


@dataclass(frozen=True)
class Preparation:
    """A plan with its inputs.

    Args:
        plan: everything that the bytes of the shards depend on.
        inputs: the inputs, in order, as lines.
        side: side of the images in pixels.
        source_name: the file or folder that the user gave, for messages.
        encoder: the folder of the encoder, if there is one.
        other_files: the numbers of files that are not images, by ending, for messages.
        no_text: the file with the embedding of the empty text, if there are texts.
        text_encoder: the folder of the encoder of captions, if there are any.
    """

    plan: PreparationPlan
    inputs: InputLines
    side: int
    source_name: str
    encoder: Path | None = None
    other_files: str = ""
    no_text: bytes = b""
    text_encoder: Path | None = None

    def with_shards(self, rows: int | None) -> "Preparation":
        """The preparation with this number of rows per shard, or a number that suits its inputs."""
        rows = rows or default_shard_rows(len(self.inputs), self.side, self._row_bytes())
        return replace(self, plan=self.plan.model_copy(update={"shard_rows": rows}))

    def _row_bytes(self) -> int:
        """The size of a stored row: an image, or the mean and std of a latent in float16, and the condition."""
        autoencoder, condition, pixels = self.plan.autoencoder, self.plan.condition, self.side * self.side
        shown = pixels * condition.channels * np.dtype(condition.dtype).itemsize if condition else 0
        shown += 2 * text.tokens * text.width if (text := self.plan.text) else 0
        if autoencoder is None:
            return shown + pixels * (self.plan.transform.channels if self.plan.transform else 3)
        return shown + pixels // autoencoder.downscale**2 * autoencoder.latent_channels * 4


def default_shard_rows(inputs: int, side: int, row_bytes: int) -> int:
    """The number of rows per shard, from what the inputs are, and not from what prepares them.

    A dataset has many small shards, so that many workers have work and little is lost with one of them. Above
    `SHARDS_BEFORE_GROWTH` shards they grow instead, so that a store and its readers handle few large files: from
    16 GiB on they have at least 64 MiB, and never more than 128 MiB.

    Args:
        inputs: number of inputs.
        side: side of the images in pixels.
        row_bytes: size of a stored row.
    """
    small = max(1, min(SHARD_ROWS, SHARD_BYTES // max(side * side * 3, row_bytes)))
    return max(small, min(-(-inputs // SHARDS_BEFORE_GROWTH), LARGEST_SHARD_BYTES // row_bytes))


def check_transform(transform: Transform) -> Transform:
    """Complete a transform; raises UserError if an option is unknown or missing.

    A resolution of 0 becomes that of the first image.
    """
    known = {"crop": CROPS, "resize": FILTERS, "channels": MODES}
    for option, choices in known.items():
        value = getattr(transform, option)
        if value not in choices:
            listed = [str(choice) for choice in choices]
            raise UserError(
                f"--{option} {value} is unknown{did_you_mean(value, listed)}: choose one of {', '.join(listed)}"
            )
    side = transform.resolution
    if not side and transform.crop != "none":
        raise UserError("--resolution is missing: give the side of the prepared images in pixels, such as 64")
    if transform.crop != "windows" and (transform.short_side or transform.stride):
        raise UserError("--short-side and --stride are of --crop windows: leave them out, or cut windows")
    if transform.crop == "dhariwal" and transform.resize != "lanczos":
        raise UserError(f"--resize {transform.resize}: --crop dhariwal has filters of its own: leave --resize out")
    if transform.crop != "windows" or not side:
        return transform
    short_side, stride = transform.short_side or 4 * side, transform.stride or max(1, side // 10)
    if short_side < side:
        raise UserError(f"--short-side {short_side} is below the resolution {side}: no window fits")
    return replace(transform, short_side=short_side, stride=stride)


def plan_dataset(address: str, autoencoder: str | None, precision: str, condition: str | None = None) -> Preparation:
    """Plan to encode a prepared dataset of pixels."""
    dataset = open_dataset(address)
    if dataset.kind != "pixels":
        raise UserError(f"{address} contains {dataset.kind}, which cannot be encoded: give a dataset of pixels")
    if autoencoder is None:
        raise UserError(
            f"{address} is a prepared dataset: pass --autoencoder to encode it, or pass a folder of images instead"
        )
    plan = PreparationPlan(
        source=dataset.address,
        source_kind="dataset",
        transform=None,
        class_names=dataset.class_names,
        inputs_sha256=dataset.fingerprint,
        condition=_condition_of_rows(dataset, condition),
    )
    inputs = DatasetLines(len(dataset))
    return _with_encoder(
        Preparation(plan, inputs, dataset.card.resolution, address), autoencoder, precision, dataset.card.channels
    )


def _condition_of_rows(dataset: Dataset, option: str | None) -> ConditionPlan | None:
    """The condition of a dataset that is encoded: its own, or one that is computed from its images."""
    card = dataset.card
    if option is None:
        known = card.condition.model_dump(exclude={"mean", "std"}) if card.condition else None
        return ConditionPlan(**known) if known else None
    if card.condition is not None:
        raise UserError(
            f"{dataset.address} has conditions ({card.condition.kind}), which are kept: leave --condition out"
        )
    computed = computed_condition(option, card.channels, card.resolution)
    if computed is None:
        raise UserError(
            f"--condition {option} is a source, and SOURCE a prepared dataset: give it when images are prepared"
        )
    return computed


def plan_images(
    address: str,
    labels: str | None,
    image_member: str | None,
    transform: Transform,
    autoencoder: str | None,
    precision: str,
    condition: str | None = None,
    classes: str | None = None,
    split: str | None = None,
) -> Preparation:
    """Plan to prepare the images of a source with their conditions, and to encode them if there is an autoencoder."""
    source = open_source(address, labels, image_member, classes, split)
    for note in source.notes:
        say(f"  {note}")
    if source.unmatched_labels:
        say(f"  labels without an input in {source.name}: {source.unmatched_labels:,}")
    reader = SourceReader(source.kind, source.address)
    if not transform.resolution:
        transform = replace(transform, resolution=_first_side(reader, source))
    digest, side, channels = hashlib.sha256(), transform.resolution, transform.channels
    computed = computed_condition(condition, channels, side) if condition else None
    conditions = ConditionSource(condition) if condition and computed is None else None
    inputs = KeptLines(_prepared_inputs(source, reader, transform, digest.update, conditions))
    plan = PreparationPlan(
        source=source.address,
        source_kind=source.kind,
        transform=ImageTransform(**asdict(transform)),
        class_names=source.class_names,
        inputs_sha256=digest.hexdigest(),
        condition=computed if conditions is None else _described(conditions),
        condition_source=conditions.address if conditions is not None else None,
    )
    if autoencoder is None and side >= LATENTS_FROM_PIXELS and channels == 3:
        autoencoder = SD_VAE
    return _with_encoder(
        Preparation(plan, inputs, side, source.name, other_files=count_endings(source.others)),
        autoencoder,
        precision,
        channels,
    )


def _first_side(reader: SourceReader, source: Source) -> int:
    for one in source.inputs:
        with _left_to_its_shard():
            return min(decode(reader.read(one.place)).size)
    raise UserError(f"none of the {len(source.inputs)} inputs in {source.name} can be read: give readable images")


def _prepared_inputs(
    source: Source,
    reader: SourceReader,
    transform: Transform,
    hash_input: Callable[[bytes], None],
    conditions: ConditionSource | None,
) -> Iterator[PreparedInput]:
    """The inputs of a source, or their windows. What the bytes of the dataset depend on is hashed on the way."""
    repeated = iter(source.repeated)
    next_repeated = next(repeated, -1)
    matches = conditions.matched(one.key for one in source.inputs) if conditions is not None else None
    if conditions is not None and matches is not None and matches.unused:
        say(f"  conditions without an input in {conditions.name}: {matches.unused:,}")
    for number, one in enumerate(source.inputs):
        error = one.error
        if number == next_repeated:
            error, next_repeated = "duplicate key", next(repeated, -1)
        place, sizes = None, [one.size_bytes]
        if matches is not None:
            _, place, size_bytes, problem = next(matches.rows)
            error, sizes = error or problem, [*sizes, size_bytes]
        whole = PreparedInput(one.place, one.key, one.label, error=error, condition=place)
        for entry in _windows(reader, whole, transform) if transform.crop == "windows" else (whole,):
            hash_input(json.dumps([entry.key, entry.label, *sizes]).encode())
            yield entry


@contextlib.contextmanager
def _left_to_its_shard() -> Iterator[None]:
    """Suppress the errors of an input, which its shard lists with the reason; not those of the store or this node."""
    try:
        yield
    except Exception as error:
        if is_of_node_or_store(error):
            raise


def _described(conditions: ConditionSource) -> ConditionPlan:
    """The channels and type of the first condition that can be read, which the others must have too."""
    reader = conditions.reader()
    for _, place, _, error in conditions.rows():
        with _left_to_its_shard():
            if error is None:
                found = described_condition(reader.read(place))
                return found.model_copy(update={"source_kind": conditions.kind})
    raise UserError(f"none of the {len(conditions)} conditions in {conditions.name} can be read: give images or arrays")


def _windows(reader: SourceReader, whole: PreparedInput, transform: Transform) -> Iterator[PreparedInput]:
    """The windows of one photograph, or the photograph itself if it cannot be read."""
    windows = None
    with _left_to_its_shard():
        windows = transform.windows(size_of(reader.read(whole.place)))
    if windows is None:
        yield whole
        return
    for region, y, x in windows:
        yield replace(whole, key=f"{whole.key}{WINDOW_MARK}{region}#{y:05d},{x:05d}", window=(y, x))


def _with_encoder(preparation: Preparation, autoencoder: str | None, precision: str, channels: int) -> Preparation:
    """The preparation with its autoencoder, if it has one; raises UserError if that cannot encode the images."""
    if autoencoder in (None, "none"):
        return preparation
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision} is unknown: choose one of {', '.join(PRECISIONS)}")
    if channels != 3:
        raise UserError(
            f"the images of {preparation.source_name} have {channels} channel, and autoencoders need 3: prepare them "
            "with --channels 3, or pass --autoencoder none"
        )
    folder, fetched = fetch_autoencoder(str(autoencoder))
    if image_channels(folder) != 3:
        raise UserError(
            f"--autoencoder {autoencoder} is for images of {image_channels(folder)} channel: give one for RGB"
        )
    card = DatasetAutoencoder(**replace(fetched, precision=precision).to_json())
    if preparation.side % card.downscale:
        raise UserError(f"--resolution {preparation.side} is not a multiple of {card.downscale}, as latents need")
    condition = preparation.plan.condition
    if condition is not None:
        condition = condition.model_copy(update={"downscale": card.downscale})
    plan = preparation.plan.model_copy(update={"autoencoder": card, "condition": condition})
    return replace(preparation, plan=plan, encoder=folder)


def with_mirror_images(preparation: Preparation) -> Preparation:
    """The preparation with a mirror image after each input; raises UserError without an autoencoder."""
    if preparation.encoder is None:
        raise UserError("--mirror needs --autoencoder: for pixels, training draws mirror images (data.mirror)")
    plan = preparation.plan.model_copy(update={"mirror": True})
    return replace(preparation, plan=plan, inputs=MirroredLines(preparation.inputs))
