"""Inspect: verify a dataset or model and return its card."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.models.autoencoder import load_autoencoder, weights_sha256
from patchloom.models.checkpoints import load_whole_model
from patchloom.pipelines.pages.pictures import contact_sheet, save_png
from patchloom.pipelines.prepare.shard_maker import sums
from patchloom.platform.dataset.prepared import CARD, Dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import read_json_lines
from patchloom.platform.progress import progress
from patchloom.platform.tracking.registry import fetch_model

SHEET = "contact_sheet.png"
AGAIN = "prepare again into an empty folder"
TENSORS = ("image", "mean", "std")
DECODED_AT_ONCE = 8


def inspect(what: str) -> dict[str, Any]:
    """The verified card of a dataset or a model; raises UserError where something is not as its card says.

    A dataset's card comes with `contact_sheet`, the picture of its rows that was written beside it.
    """
    if not what.startswith(("models:/", "runs:/")):
        folder = Folder.at(what)
        if folder.has(CARD) or not (folder.is_remote or folder.path.exists()):
            return _inspect_dataset(open_dataset(what))
    model = load_whole_model(fetch_model(what).folder)
    return model.card


def _inspect_dataset(dataset: Dataset) -> dict[str, Any]:
    verify_dataset(dataset)
    sheet: str | None = f"{Folder(dataset.address)}/{SHEET}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            dataset_sheet(dataset, Path(scratch) / SHEET)
            Folder(dataset.address).put(Path(scratch) / SHEET, SHEET)
    except (OSError, UserError):
        sheet = None  # a dataset that is only to be read
    return dataset.card.to_dict() | {"contact_sheet": sheet}


def verify_dataset(dataset: Dataset) -> None:
    """Read everything; raises UserError at the first thing that is not what the card says.

    Checksums, counts of rows, classes and inputs, keys that differ, the statistics, the autoencoder's weights.
    """
    card, address = dataset.card, Folder(dataset.address)
    dataset.verify()
    keys: set[str] = set()
    classes: Counter[int] = Counter()
    totals: dict[str, np.ndarray] = {}
    with progress("verifying", len(dataset), "rows") as meter:
        for shard in dataset.shards:
            columns = dataset.rows(np.arange(meter.done, meter.done + shard.rows))
            keys.update(columns["key"])
            classes.update(int(label) for label in columns["label"])
            for name, values in sums({name: columns[name] for name in TENSORS if name in columns}).items():
                totals[name] = totals.get(name, 0) + np.array(values, dtype=np.float64)
            meter.update(meter.done + shard.rows)
    mean = totals["sum"] / totals["count"]
    std = np.sqrt(np.maximum(totals["squares"] / totals["count"] - mean**2, 0))
    skipped = len(read_json_lines(dataset.path / "skipped.jsonl"))
    found = {
        "rows": len(dataset),
        "keys that differ": len(keys),
        "skipped inputs": skipped,
        "inputs": len(dataset) + skipped,
        "rows by class": [classes[number] for number in range(len(card["classes"]))],
    }
    told = {
        "rows": card["rows"],
        "keys that differ": card["rows"],
        "skipped inputs": card["skipped"]["count"],
        "inputs": card["inputs"],
        "rows by class": [entry["rows"] for entry in card["classes"]],
    }
    for name, value in found.items():
        if value != told[name]:
            raise UserError(f"{address}: {name} are {value} and the card says {told[name]}: {AGAIN}")
    for name, values in (("mean", mean), ("std", std)):
        if not np.allclose(values, card[name], rtol=1e-9, atol=1e-12):
            raise UserError(f"{address}: {name} is {values.tolist()} and the card says {card[name]}: {AGAIN}")
    if card["autoencoder"]:
        found_sha256 = weights_sha256(dataset.path / "autoencoder")
        if found_sha256 != card["autoencoder"]["weights_sha256"]:
            wanted = card["autoencoder"]["weights_sha256"][:12]
            raise UserError(f"{address}: its autoencoder has sha256 {found_sha256[:12]}, not {wanted}: {AGAIN}")


def statistics_table(card: dict[str, Any]) -> str:
    """The rows, the classes and the channels of a dataset's card, as words."""
    kept = f"{card['rows']:,} rows + {card['skipped']['count']:,} skipped = {card['inputs']:,} inputs"
    lines = [f"{card['kind']} of {card['channels']} x {card['resolution']} x {card['resolution']}: {kept}, verified"]
    lines += [f"  skipped {count:,}: {reason}" for reason, count in card["skipped"]["reasons"].items()]
    classes = card["classes"]
    if classes:
        counts = [entry["rows"] for entry in classes]
        lines.append(f"  {len(classes)} classes of {min(counts):,} to {max(counts):,} rows")
    lines += [
        f"  channel {number}: mean {mean:.4f}, std {std:.4f}"
        for number, (mean, std) in enumerate(zip(card["mean"], card["std"], strict=True))
    ]
    return "\n".join(lines)


def dataset_sheet(dataset: Dataset, path: Path, images: int = 64) -> None:
    """A contact sheet of rows spread over a dataset; latents are decoded."""
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int)
    rows = dataset.rows(chosen)
    if dataset.kind == "latents":
        autoencoder = load_autoencoder(dataset.path / "autoencoder")
        latents = torch.from_numpy(rows["mean"]).float()
        pictures = np.concatenate([autoencoder.decode(some).numpy() for some in latents.split(DECODED_AT_ONCE)])
    else:
        pictures = rows["image"]
    save_png(contact_sheet(pictures, columns=16), path)
