"""Inspect: verify a dataset or model and return its card."""

import json
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.models.autoencoder import load_autoencoder, weights_sha256
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import load_sampling_model
from patchloom.pipelines.pages.pictures import contact_sheet, save_png
from patchloom.pipelines.prepare.notes import statistics
from patchloom.pipelines.prepare.shard_maker import condition_sums, sums
from patchloom.platform.dataset.keys import KeyTable
from patchloom.platform.dataset.prepared import CARD, Dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import each_json_line
from patchloom.platform.progress import progress
from patchloom.platform.records.dataset import DatasetCard
from patchloom.platform.records.prepare import ChannelSums
from patchloom.platform.tracking.registry import fetch_model

DATASET_SHEET = "contact_sheet.png"
TENSORS = ("image", "mean", "std")
DECODED_AT_ONCE = 8
LISTED_CLASSES = 10  # names of classes in a summary
INSPECTED_BYTES = 16 << 20  # of rows that are read together


@dataclass(frozen=True)
class Inspection:
    """A verified dataset or model. Only a dataset has a contact sheet, unless its folder cannot be written."""

    card: DatasetCard | ModelCard
    contact_sheet: str | None = None

    def to_json(self) -> str:
        """What `patchloom inspect --json` prints: the whole card."""
        if isinstance(self.card, DatasetCard):
            values = self.card.to_dict() | {"contact_sheet": self.contact_sheet}
        else:
            values = self.card.to_json()
        return json.dumps(values, indent=2, ensure_ascii=False)

    def summary(self) -> str:
        """The counts and statistics of a dataset, or what a model makes of what, as text."""
        if not isinstance(self.card, DatasetCard):
            return model_summary(self.card)
        sheet = f"\n  contact sheet: {self.contact_sheet}" if self.contact_sheet else ""
        return f"{statistics_table(self.card)}{sheet}"


def inspect(what: str) -> Inspection:
    """Verify a dataset or a model by reading all of it.

    Args:
        what: a dataset folder, a model or run folder, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/model`.

    Returns:
        The card. For a dataset also the address of a contact sheet, which is written into its folder.

    Raises:
        UserError: there is no such dataset or model, or it differs from its card.
        CheckpointError: the weights of a model do not match their checksum.

    Example:
        found = patchloom.inspect("dataset")
        print(found.card.rows, found.contact_sheet)
    """
    if not what.startswith(("models:/", "runs:/")):
        folder = Folder.at(what)
        if folder.has(CARD) or not (folder.is_remote or folder.path.exists()):
            dataset = open_dataset(what)
            verify_dataset(dataset)
            return Inspection(dataset.card, _write_contact_sheet(dataset))
    return Inspection(load_sampling_model(fetch_model(what).folder).card)


def _write_contact_sheet(dataset: Dataset) -> str | None:
    """Write the contact sheet into the dataset's folder; its address, or None if the folder cannot be written."""
    folder = Folder(dataset.address)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            dataset_sheet(dataset, Path(scratch) / DATASET_SHEET)
            folder.put(Path(scratch) / DATASET_SHEET, DATASET_SHEET)
    except (OSError, UserError):
        return None
    return f"{folder}/{DATASET_SHEET}"


def verify_dataset(dataset: Dataset) -> None:
    """Read a dataset and compare it with its card.

    This compares checksums, the counts of rows, classes and inputs, the number of different keys, the statistics,
    and the weights of the autoencoder. Raises UserError at the first difference.
    """
    card = dataset.card
    dataset.verify()
    found = _read_all_rows(dataset)
    skipped = sum(1 for _ in each_json_line(dataset.path / "skipped.jsonl"))
    for what, value, recorded in (
        ("rows", len(dataset), card.rows),
        ("different keys", found.keys, card.rows),
        ("skipped inputs", skipped, card.skipped.count),
        ("inputs", len(dataset) + skipped, card.inputs),
        ("rows of each class", found.rows_by_class, [entry.rows for entry in card.classes]),
    ):
        if value != recorded:
            raise _difference(dataset, what, value, recorded)
    figures_of = [("mean", found.mean, card.mean), ("std", found.std, card.std)]
    if card.condition:
        figures_of.append(("mean of the conditions", found.condition_mean, card.condition.mean))
        figures_of.append(("std of the conditions", found.condition_std, card.condition.std))
    for what, values, figures in figures_of:
        if not np.allclose(values, figures, rtol=1e-9, atol=1e-12):
            raise _difference(dataset, what, values.tolist(), figures)
    if card.autoencoder:
        sha256 = weights_sha256(dataset.path / "autoencoder")
        if sha256 != card.autoencoder.weights_sha256:
            raise _difference(dataset, "sha256 of the autoencoder", sha256, card.autoencoder.weights_sha256)


def _difference(dataset: Dataset, what: str, found: object, recorded: object) -> UserError:
    place = Folder(dataset.address)
    return UserError(f"{place}: {what}: found {found}, dataset.json has {recorded}; prepare again into an empty folder")


@dataclass(frozen=True)
class _RowFigures:
    """What was counted in all rows of a dataset."""

    keys: int  # different ones
    rows_by_class: list[int]
    mean: np.ndarray
    std: np.ndarray
    condition_mean: np.ndarray
    condition_std: np.ndarray


def _read_all_rows(dataset: Dataset) -> _RowFigures:
    """Count all rows, of which a bounded number is in memory; equal keys are found by sorting their hashes on disk."""
    keys, classes = KeyTable(), np.zeros(len(dataset.card.classes), np.int64)
    sums_of_rows, sums_of_conditions = list[ChannelSums](), list[ChannelSums]()
    row_bytes = max(1, int(dataset.shards.sizes.sum()) // max(1, len(dataset)))
    most, starts = max(1, INSPECTED_BYTES // row_bytes), dataset.reader.starts.tolist()
    pieces = (
        range(first, min(first + most, end)) for start, end in pairwise(starts) for first in range(start, end, most)
    )
    with progress("verifying", len(dataset), "rows") as meter:
        for piece in pieces:
            columns = dataset.rows(np.arange(piece.start, piece.stop))
            for row, key in zip(piece, columns["key"], strict=True):
                keys.add(key, row)
            labels = columns["label"]
            known = labels[(labels >= 0) & (labels < len(classes))]
            classes += np.bincount(known, minlength=len(classes))
            sums_of_rows.append(ChannelSums(**sums({name: columns[name] for name in TENSORS if name in columns})))
            if dataset.card.condition:
                sums_of_conditions.append(ChannelSums(**condition_sums(columns, dataset.card.condition.channels)))
            dataset.forget_before(piece.stop)
            meter.update(piece.stop)
    conditions = statistics(sums_of_conditions) if sums_of_conditions else (np.empty(0), np.empty(0))
    return _RowFigures(len(keys) - len(keys.repeated()), classes.tolist(), *statistics(sums_of_rows), *conditions)


def statistics_table(card: DatasetCard) -> str:
    """The counts of rows, inputs and classes, and the statistics of each channel, as text."""
    counts = f"{card.rows:,} rows + {card.skipped.count:,} skipped = {card.inputs:,} inputs"
    lines = [f"{card.kind} of {card.channels} x {card.resolution} x {card.resolution}: {counts}, verified"]
    lines += [f"  skipped {count:,}: {reason}" for reason, count in card.skipped.reasons.items()]
    if card.classes:
        rows = [entry.rows for entry in card.classes]
        counts = f"{min(rows):,}" if min(rows) == max(rows) else f"{min(rows):,} to {max(rows):,}"
        lines.append(f"  {len(rows)} classes of {counts} rows")
    lines += [
        f"  channel {number}: mean {mean:.4f}, std {std:.4f}"
        for number, (mean, std) in enumerate(zip(card.mean, card.std, strict=True))
    ]
    if card.condition:
        figures = zip(card.condition.mean, card.condition.std, strict=True)
        lines += [
            f"  condition ({card.condition.kind}), channel {number}: mean {mean:.4f}, std {std:.4f}"
            for number, (mean, std) in enumerate(figures)
        ]
    return "\n".join(lines)


def model_summary(card: ModelCard) -> str:
    """What a model is and how it was trained, as text."""
    config = card.denoiser
    shape = f"{config.channels} x {config.resolution} x {config.resolution}"
    lines = [f"{card.name}: a model of {card.normalisation.kind} of {shape}, verified", f"  network: {config.title}"]
    if card.autoencoder:
        lines.append(f"  its autoencoder decodes them to images of {card.image_side} x {card.image_side} pixels")
    if card.images_seen is not None:
        lines.append(f"  trained on {card.images_seen:,} counted images in {card.updates or 0:,} updates")
    if card.patches:
        lines.append(f"  p {card.patches.p:g}, {card.patches.schedule} schedule of patch sizes")
    if card.class_names:
        shown, more = card.class_names[:LISTED_CLASSES], len(card.class_names) - LISTED_CLASSES
        lines.append(
            f"  {len(card.class_names)} classes: {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")
        )
    if card.condition:
        lines.append(f"  follows a condition: {card.condition.summary}")
    return "\n".join([*lines, f"  weights sha256 {card.weights_sha256}"])


def dataset_sheet(dataset: Dataset, path: Path, images: int = 64) -> None:
    """Draw rows at equal distances over the dataset into a contact sheet; latents are decoded."""
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int)
    rows = dataset.rows(chosen)
    if dataset.kind == "latents":
        autoencoder = load_autoencoder(dataset.path / "autoencoder")
        latents = torch.from_numpy(rows["mean"]).float()
        pictures = np.concatenate([autoencoder.decode(batch).numpy() for batch in latents.split(DECODED_AT_ONCE)])
    else:
        pictures = rows["image"]
    save_png(contact_sheet(pictures, columns=16), path)
