"""Notes: what the makers of shards report, which becomes the card of the dataset and the list of skipped inputs."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from patchloom.platform.compute.jobs import NOTES_FOLDER
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import Spool
from patchloom.platform.records.dataset import ClassRows, DatasetCard, ShardFile, SkippedInputs
from patchloom.platform.records.prepare import PreparationPlan, ShardNote


def note_name(number: int) -> str:
    """The name of the note of a shard, relative to the dataset."""
    return f"{NOTES_FOLDER}/part-{number:05d}.json"


class ShardNotes:
    """The notes of all shards, read one after another in the order of the shards.

    On a store, notes that came with the results of workers are kept in a temporary file and not read back.

    Args:
        folder: the dataset.
        shards: the number of shards.
    """

    def __init__(self, folder: Folder, shards: int) -> None:
        self.folder, self.shards = folder, shards
        self._kept = Spool(shards)

    def keep(self, number: int, text: str) -> None:
        """Keep a note that a worker returned."""
        if self.folder.is_remote:
            self._kept.keep(number, text.encode())

    def __iter__(self) -> Iterator[ShardNote]:
        for number, content in enumerate(self.folder.at_once(self._read, range(self.shards))):
            yield ShardNote.parse(content, f"{self.folder}/{note_name(number)}")

    def _read(self, number: int) -> bytes:
        return self._kept.read(number) if number in self._kept else self.folder.read(note_name(number))


@dataclass
class Findings:
    """What the notes of all shards say together, without a Python object per input."""

    inputs: int = 0
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    shape: list[int] = field(default_factory=list)
    sums: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"count": [], "sum": [], "squares": []})
    shards: list[ShardFile] = field(default_factory=list)
    source_digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def take(self, note: ShardNote) -> None:
        """Add the note of the next shard."""
        self.inputs += note.inputs
        self.reasons.update(entry.error for entry in note.skipped)
        self.source_digest.update(note.source_sha256.encode())
        if not note.rows:
            return
        self.rows += note.rows
        self.classes.update(note.classes or {})
        self.shape = self.shape or note.shape or []
        for name, values in self.sums.items():
            if note.sums:
                values.append(np.array(note.sums[name]))
        self.shards.append(ShardFile(file=note.file, rows=note.rows, bytes=note.bytes, sha256=note.sha256))

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel."""
        count, total, squares = (np.sum(self.sums[name], axis=0) for name in ("count", "sum", "squares"))
        mean = total / count
        return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def gather(notes: ShardNotes) -> Findings:
    """Read all notes, and write the skipped inputs into `skipped.jsonl`."""
    found = Findings()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as lines:
        for note in notes:
            found.take(note)
            lines.writelines(f"{entry.to_json()}\n" for entry in note.skipped)
        lines.flush()
        if found.rows:
            notes.folder.put(Path(lines.name), "skipped.jsonl")
    return found


def dataset_card(plan: PreparationPlan, found: Findings) -> DatasetCard:
    """The card of a dataset from the notes of all its shards."""
    mean, std = found.statistics()
    parent = open_dataset(plan.source).card if plan.source_kind == "dataset" else None
    transform = parent.transform if parent else plan.transform
    by_region = transform is not None and transform.crop == "windows"
    return DatasetCard(
        format_version=1,
        kind="latents" if plan.autoencoder else "pixels",
        resolution=found.shape[-1],
        channels=found.shape[0],
        dtype="float16" if plan.autoencoder else "uint8",
        rows=found.rows,
        inputs=found.inputs,
        skipped=SkippedInputs(count=found.reasons.total(), reasons=dict(found.reasons)),
        classes=[ClassRows(name=name, rows=found.classes[number]) for number, name in enumerate(plan.class_names)],
        mean=mean.tolist(),
        std=std.tolist(),
        transform=transform,
        mirror=plan.mirror,
        split_by=parent.split_by if parent else "region" if by_region else "key",
        autoencoder=plan.autoencoder,
        source_sha256=plan.inputs_sha256 if parent else found.source_digest.hexdigest(),
        preparation=plan.identity(),
        shards=found.shards,
    )
