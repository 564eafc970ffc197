"""Prepare: images in, Arrow datasets of pixels or latents out, one shard at a time on Ray Data.

The unit of work is a shard: a fixed range of the source's inputs. Whoever makes it, it has the same bytes;
a preparation that was killed keeps its finished shards and makes the others again.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchloom.errors import UserError
from patchloom.models.backbones import allowed_backbones
from patchloom.pipelines.prepare.images import CROPS, FILTERS, MODES, Transform, decode, size_of
from patchloom.pipelines.prepare.shard_maker import INPUTS, NOTES, PLAN, PRECISIONS, WORK, ShardMaker
from patchloom.platform.compute.cluster import map_on_actors
from patchloom.platform.dataset.prepared import CARD, Dataset, is_dataset, open_dataset
from patchloom.platform.dataset.readers import Reader
from patchloom.platform.dataset.sources import Source, open_source, repeated
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.storage import local_path, locked, make_folder, sweep_partial
from patchloom.platform.progress import progress, say
from patchloom.platform.records.dataset import (
    ClassRows,
    DatasetAutoencoder,
    DatasetCard,
    ImageTransform,
    ShardFile,
    SkippedInputs,
)
from patchloom.platform.tracking.registry import fetch_model

if TYPE_CHECKING:
    from patchloom.models.cards import AutoencoderCard

SHARD_ROWS, SHARD_BYTES = 512, 64 << 20  # of decoded images: what a worker holds at once
HEAD_START_S = 10.0  # of work in this process; less of it is done by the time that Ray would have started
SD_VAE, LATENTS_FROM_PIXELS = "stabilityai/sd-vae-ft-mse", 256
TO_JSON = json.JSONEncoder(ensure_ascii=False).encode  # one for all: json.dumps makes one a call
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Plan:
    """Everything that a shard's bytes depend on; a folder holds the result of one plan."""

    source: str
    source_kind: str  # of `sources`, or "dataset"
    transform: Transform | None  # None: rows come from a prepared dataset as they are
    class_names: list[str]
    autoencoder: dict[str, Any] | None
    mirror: bool
    shard_rows: int
    inputs_sha256: str

    def identity(self) -> str:
        """What must be equal for two calls to continue each other's work; the source's place may change."""
        values = {key: value for key, value in asdict(self).items() if key != "source"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prepare(
    source: str,
    dataset: str,
    *,
    resolution: int | None = None,
    crop: str = "center",
    resize: str = "lanczos",
    channels: int = 3,
    min_side: int = 0,
    labels: str | None = None,
    autoencoder: str | None = None,
    precision: str = "fp32",
    mirror: bool = False,
    short_side: int | None = None,
    stride: int | None = None,
    shard_rows: int | None = None,
    workers: int | None = None,
) -> Dataset:
    """Prepare images, or encode a prepared dataset of pixels; returns the finished dataset.

    source: a folder of images, .zip, .tar, WebDataset shards, .parquet, .arrow, .npz, a saved Hugging Face
    dataset, or a prepared dataset. resolution: pixels a side. crop, resize: how images come to it. channels: 3, or
    1 for grey. min_side: smaller images are left out. labels: a file of keys and labels, if it lies apart.
    autoencoder: encode to latents with this model (a folder, models:/... or a hub id; "none" for pixels), by
    default Stable Diffusion's at 256 pixels and more. precision: what the encoder computes in. mirror: encode
    mirror images too. workers: how many shards are made at once, all CPUs (or GPUs) of the session by
    default, after a head start in this process; 0 makes all of them here, without Ray.
    Source and dataset may be remote. A second call has nothing to do, and a call after a kill does what is
    missing. Raises UserError for what cannot be prepared.
    """
    folder = Folder.at(dataset)
    if is_dataset(Folder.at(source)):
        inputs, plan = _plan_dataset(source, autoencoder)
    else:
        transform = _transform(resolution, crop, resize, channels, min_side, short_side, stride)
        inputs, plan = _plan_images(open_source(source, labels), transform)
        if autoencoder is None and plan.transform and plan.transform.resolution >= LATENTS_FROM_PIXELS:
            autoencoder = SD_VAE if channels == 3 else None
    side = plan.transform.resolution if plan.transform else open_dataset(source).card["resolution"]
    encoder: Path | None = None
    if autoencoder not in (None, "none"):
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision} is unknown: choose one of {', '.join(PRECISIONS)}")
        encoder, card = fetch_autoencoder(str(autoencoder))
        _check_encodable(side, channels, card)
        plan = replace(plan, autoencoder=replace(card, precision=precision).to_json())
    if mirror:
        if encoder is None:
            raise UserError("--mirror encodes mirror images; those of pixels are drawn in training: data.mirror")
        plan = replace(plan, mirror=True)
        inputs = [entry | more for entry in inputs for more in ({}, {"mirror": True})]
    plan = replace(plan, shard_rows=shard_rows or max(1, min(SHARD_ROWS, SHARD_BYTES // (side * side * 3))))

    with _held(folder):
        if _already_done(folder, plan):
            say(f"{folder} is complete: {len(open_dataset(dataset)):,} rows")
            return open_dataset(dataset)
        _start_work(folder, plan, inputs, encoder)
        _make_shards(folder, plan, len(inputs), workers)
        _finish(folder, plan, len(inputs))
    return open_dataset(dataset)


@contextlib.contextmanager
def _held(folder: Folder) -> Iterator[None]:
    """Keep a second process out of a local folder; what two write to a remote one is the same bytes."""
    if folder.is_remote:
        yield
        return
    with locked(make_folder(folder.path)):
        yield


def fetch_autoencoder(reference: str) -> "tuple[Path, AutoencoderCard]":
    """The folder of an autoencoder and what the card says of it.

    reference: models:/..., a folder (also a remote one), or the id of one on Hugging Face's hub.
    """
    from patchloom.models.autoencoder import load_autoencoder

    if reference.startswith(("models:/", "runs:/")):
        fetched = fetch_model(reference)
        folder, resolved = fetched.folder, fetched.reference
    elif not is_remote(reference) and not local_path(reference).exists() and HUB_NAME.fullmatch(reference):
        folder, resolved = _from_hub(reference)
    else:
        folder, resolved = local_copy(reference), Folder.at(reference).name  # where it lies is this machine's affair
    return folder, replace(load_autoencoder(folder).describe(), reference=resolved)


def _from_hub(name: str) -> tuple[Path, str]:
    """The files of `organisation/name`, or of a folder in it, and the name with its commit."""
    from huggingface_hub import snapshot_download

    repository, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    wanted = [f"{inside}/{file}".lstrip("/") for file in ("*.json", "*.safetensors")]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # of requests, of the hub and of the disk
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"the autoencoder {name} is no folder here and cannot be fetched from Hugging Face's hub ({problem}): "
            "give --autoencoder a folder or models:/..., or none for pixels"
        ) from None
    return folder / inside, f"{name}@{folder.name}"


def _check_encodable(side: int, channels: int, card: "AutoencoderCard") -> None:
    if side % card.downscale:
        raise UserError(f"images of {side} pixels cannot be halved to {card.downscale} times smaller latents")
    if channels != 3:
        raise UserError(f"--channels {channels} is for pixels, and autoencoders take 3: leave one of them out")


def _plan_dataset(source: str, autoencoder: str | None) -> tuple[list[dict[str, Any]], Plan]:
    rows = open_dataset(source)
    if rows.kind != "pixels":
        raise UserError(f"{source} holds {rows.kind}, and only pixels can be encoded: give the pixel dataset")
    if autoencoder is None:
        raise UserError(f"{source} is prepared already: give --autoencoder to encode it, or a folder of images")
    plan = Plan(rows.address, "dataset", None, rows.class_names, None, False, 0, rows.fingerprint)
    return [{"place": [row]} for row in range(len(rows))], plan


def _transform(
    resolution: int | None, crop: str, resize: str, channels: int, min_side: int, short_side: int | None,
    stride: int | None,
) -> Transform:  # fmt: skip
    """What the options ask for; a resolution of 0 is to be that of the first image."""
    for option, value, known in (("crop", crop, CROPS), ("resize", resize, FILTERS), ("channels", channels, MODES)):
        if value not in known:
            raise UserError(f"--{option} {value} is unknown: choose one of {', '.join(map(str, known))}")
    if not resolution and crop != "none":
        raise UserError("--resolution is missing: give the side of the prepared images in pixels, such as 64")
    if crop == "windows" and resolution:
        short_side, stride = short_side or 4 * resolution, stride or max(1, resolution // 10)
        if short_side < resolution:
            raise UserError(f"--short-side {short_side} is below the resolution {resolution}: no window fits")
    return Transform(
        resolution or 0, crop, resize, channels=channels, min_side=min_side, short_side=short_side, stride=stride
    )


def _plan_images(source: Source, transform: Transform) -> tuple[list[dict[str, Any]], Plan]:
    if source.unmatched_labels:
        say(f"  {source.unmatched_labels:,} labels name nothing in {source.address}")
    reader = Reader(source.kind, source.address)
    if not transform.resolution:
        transform = replace(transform, resolution=_first_side(reader, source))
    inputs = [vars(one).copy() for one in source.inputs]  # asdict copies deeply: 20 us an input
    for position in repeated([one["key"] for one in inputs]):
        inputs[position]["error"] = "its key stood before: keys must differ"
    if transform.crop == "windows":
        inputs = [window for one in inputs for window in _windows(reader, one, transform)]
    digest = hashlib.sha256()
    for one in inputs:
        digest.update(json.dumps([one["key"], one["label"], one.pop("size_bytes")]).encode())
    plan = Plan(
        source.address, source.kind, transform, source.class_names, None, False, 0, digest.hexdigest()
    )  # fmt: skip
    return inputs, plan


def _first_side(reader: Reader, source: Source) -> int:
    for one in source.inputs:
        with contextlib.suppress(Exception):  # it is listed with its reason later
            return min(decode(reader.read(one.place)).size)
    raise UserError(f"none of the {len(source.inputs)} inputs in {source.address} can be read: give readable images")


def _windows(reader: Reader, whole: dict[str, Any], transform: Transform) -> list[dict[str, Any]]:
    """The windows of one photograph as inputs, or the photograph itself where it cannot be read."""
    try:
        size = size_of(reader.read(whole["place"]))
    except Exception:
        return [whole]  # its shard finds out why, and lists it
    key = whole["key"]
    return [
        {**whole, "key": f"{key}@{region}#{y:05d},{x:05d}", "window": [y, x]}
        for region, y, x in transform.windows(size)
    ]


def _already_done(folder: Folder, plan: Plan) -> bool:
    """Whether the folder holds this very preparation; refuses any other content."""
    if folder.has(CARD):
        if folder.read_json(CARD).get("preparation") == plan.identity():
            folder.remove_folder(WORK)
            return True
        raise UserError(f"{folder} holds another dataset: choose an empty folder, or remove it")
    if folder.has(PLAN):
        begun = folder.read_json(PLAN)
        if begun["identity"] != plan.identity():
            values = asdict(plan).items()
            changed = [key for key, value in values if begun["plan"].get(key) != value and key != "source"]
            raise UserError(
                f"{folder} holds an unfinished preparation with other {' and '.join(changed)}: "
                "repeat that call, or choose an empty folder"
            )
    elif any(not name.startswith(".") for name in folder.files()):
        raise UserError(f"{folder} is not empty and holds no preparation: choose an empty folder")
    return False


def _start_work(folder: Folder, plan: Plan, inputs: list[dict[str, Any]], encoder: Path | None) -> None:
    """Write down what is to be done, unless an earlier call did, and bring the encoder."""
    if not folder.is_remote:
        for name in (WORK, NOTES, INPUTS, "shards"):
            sweep_partial(make_folder(folder.path / name))
    if not folder.has(PLAN):
        for shard, first in enumerate(range(0, len(inputs), plan.shard_rows)):
            lines = map(TO_JSON, inputs[first : first + plan.shard_rows])
            folder.write(f"{INPUTS}/part-{shard:05d}.jsonl", "\n".join(lines) + "\n")
        folder.write_json(PLAN, {"identity": plan.identity(), "plan": asdict(plan)})
    if encoder:
        from patchloom.models.checkpoints import is_pickle

        there = folder.folder("autoencoder").files()
        for name, size in Folder(str(encoder)).files().items():
            if there.get(name) != size and not is_pickle(encoder / name):
                folder.put(encoder / name, f"autoencoder/{name}")


def _make_shards(folder: Folder, plan: Plan, inputs: int, workers: int | None) -> None:
    finished = folder.folder(NOTES).files()
    shards = range((inputs + plan.shard_rows - 1) // plan.shard_rows)
    todo = [{"shard": shard} for shard in shards if f"part-{shard:05d}.json" not in finished]
    kept = inputs - sum(min(plan.shard_rows, inputs - item["shard"] * plan.shard_rows) for item in todo)
    argument = {"folder": folder.address, "backbones": allowed_backbones()}
    with progress("encoding" if plan.autoencoder else "preparing", inputs, "images") as meter:
        meter.begin(kept)
        if workers is None and plan.autoencoder is None and not os.environ.get("RAY_ADDRESS"):
            began, maker = time.monotonic(), ShardMaker(argument)
            while todo and time.monotonic() - began < HEAD_START_S:
                meter.update(meter.done + maker(todo.pop(0))["inputs"])
        for row in map_on_actors(ShardMaker, argument, todo, workers, on_gpus=plan.autoencoder is not None):
            meter.update(meter.done + row["inputs"])


def _finish(folder: Folder, plan: Plan, inputs: int) -> None:
    """Put the shards' notes together; the card is written last and makes the dataset complete."""
    notes = [folder.read_json(f"{NOTES}/{name}") for name in folder.folder(NOTES).files() if name.endswith(".json")]
    skipped = [entry for note in notes for entry in note["skipped"]]
    whole = [note for note in notes if note["rows"]]
    if not whole:
        reasons = Counter(entry["error"] for entry in skipped).most_common(2)
        for name in (WORK, "shards", "autoencoder"):
            folder.remove_folder(name)
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise UserError(f"none of the {inputs} inputs in {plan.source} can be used ({why}): give readable images")
    folder.write("skipped.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
    folder.write_json(CARD, _card(plan, notes, whole, skipped, inputs).to_dict())
    folder.remove_folder(WORK)
    rows = sum(note["rows"] for note in whole)
    say(f"{rows:,} rows + {len(skipped):,} skipped = {inputs:,} inputs in {folder}")


def _card(
    plan: Plan, notes: list[dict[str, Any]], whole: list[dict[str, Any]], skipped: list[dict[str, str]], inputs: int
) -> DatasetCard:
    totals = {name: np.sum([note["sums"][name] for note in whole], axis=0) for name in ("count", "sum", "squares")}
    mean = totals["sum"] / totals["count"]
    std = np.sqrt(np.maximum(totals["squares"] / totals["count"] - mean**2, 0))
    classes: Counter[int] = Counter()
    for note in whole:
        classes.update({int(label): count for label, count in note["classes"].items()})
    parent = open_dataset(plan.source).card if plan.source_kind == "dataset" else None
    transform = parent.transform if parent else _transform_record(plan.transform)
    split_by = parent.split_by if parent else "region" if transform and transform.crop == "windows" else "key"
    source = plan.inputs_sha256 if parent else _combined([note["source_sha256"] for note in notes])
    return DatasetCard(
        format_version=DatasetCard.FORMAT,
        kind="latents" if plan.autoencoder else "pixels",
        resolution=whole[0]["shape"][-1],
        channels=whole[0]["shape"][0],
        dtype="float16" if plan.autoencoder else "uint8",
        rows=sum(note["rows"] for note in whole),
        inputs=inputs,
        skipped=SkippedInputs(count=len(skipped), reasons=dict(Counter(entry["error"] for entry in skipped))),
        classes=[ClassRows(name=name, rows=classes[index]) for index, name in enumerate(plan.class_names)],
        mean=mean.tolist(),
        std=std.tolist(),
        transform=transform,
        mirror=plan.mirror,
        split_by=split_by,
        autoencoder=DatasetAutoencoder(**plan.autoencoder) if plan.autoencoder else None,
        source_sha256=source,
        preparation=plan.identity(),
        shards=[ShardFile(**{key: note[key] for key in ("file", "rows", "bytes", "sha256")}) for note in whole],
    )


def _transform_record(transform: Transform | None) -> ImageTransform | None:
    return ImageTransform(**asdict(transform)) if transform else None


def _combined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
