"""Notes: what the makers of shards report, which becomes the card of the dataset and the list of skipped inputs."""

import base64
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from patchloom.platform.compute.jobs import NOTES_FOLDER
from patchloom.platform.dataset.index import INDEX_FILE, write_hashes
from patchloom.platform.dataset.prepared import INDEXED_ROWS, open_dataset
from patchloom.platform.dataset.shard_table import INLINE_SHARDS, SHARD_LIST, ShardLister
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import Spool
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.records.dataset import (
    ClassRows,
    DatasetCard,
    DatasetCondition,
    DatasetText,
    IndexFile,
    ShardListFile,
    SkippedInputs,
    SplitBy,
)
from patchloom.platform.records.prepare import ChannelSums, PreparationPlan, ShardNote, TextPlan

SHOWN_SKIPPED = 5  # inputs that a command names
# in the card: reasons contain sizes and names, and all of them are in `skipped.jsonl`
MOST_REASONS, OTHER_REASONS = 20, "other reasons"


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
    first_skipped: list[str] = field(default_factory=list)  # `cats/1.png: is damaged`, at most `SHOWN_SKIPPED`
    classes: Counter[int] = field(default_factory=Counter)
    shape: list[int] = field(default_factory=list)
    sums: list[ChannelSums] = field(default_factory=list)
    condition_sums: list[ChannelSums] = field(default_factory=list)
    shards: ShardLister = field(default_factory=ShardLister)
    source_digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    shard_list: ShardListFile | None = None
    index: IndexFile | None = None

    def take(self, number: int, note: ShardNote) -> None:
        """Add the note of the next shard."""
        self.inputs += note.inputs
        self.reasons.update(entry.error for entry in note.skipped)
        left = SHOWN_SKIPPED - len(self.first_skipped)
        self.first_skipped += [f"{entry.key}: {entry.error}" for entry in note.skipped[:left]]
        self.source_digest.update(note.source_sha256.encode())
        if not note.rows:
            return
        self.rows += note.rows
        self.classes.update(note.classes or {})
        self.shape = self.shape or note.shape or []
        self.sums += [note.sums] if note.sums else []
        self.condition_sums += [note.condition_sums] if note.condition_sums else []
        assert note.bytes is not None and note.sha256 is not None  # there are rows
        self.shards.add(number, note.rows, note.bytes, note.sha256)


def statistics(sums: Sequence[ChannelSums]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, of all values of several sums."""
    count, total, squares = (np.sum([each[name] for each in sums], axis=0) for name in ("count", "sum", "squares"))
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def gather(notes: ShardNotes) -> Findings:
    """Read all notes, and write what is next to the card: `skipped.jsonl`, and for large datasets index and list."""
    found, folder = Findings(), notes.folder
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as lines, tempfile.NamedTemporaryFile() as index:
        indexed = write_hashes(index, _hashes_of(notes, found, lines))
        lines.flush()
        index.flush()
        if found.rows:
            folder.put(Path(lines.name), "skipped.jsonl")
        if found.rows > INDEXED_ROWS and indexed == found.rows:  # notes of older versions have no hashes
            folder.put(Path(index.name), INDEX_FILE)
            size_bytes, sha256 = Path(index.name).stat().st_size, file_sha256(Path(index.name))
            found.index = IndexFile(file=INDEX_FILE, rows=indexed, bytes=size_bytes, sha256=sha256)
    if len(found.shards) > INLINE_SHARDS:
        content = found.shards.content()
        folder.write(SHARD_LIST, content)
        sha256 = hashlib.sha256(content).hexdigest()
        found.shard_list = ShardListFile(file=SHARD_LIST, shards=len(found.shards), bytes=len(content), sha256=sha256)
    return found


def _hashes_of(notes: ShardNotes, found: Findings, lines: IO[str]) -> Iterator[np.ndarray]:
    """The hashes in each note, which is added to the findings, and its skipped inputs to the lines."""
    for number, note in enumerate(notes):
        found.take(number, note)
        lines.writelines(f"{entry.to_json()}\n" for entry in note.skipped)
        yield np.frombuffer(base64.b64decode(note.hashes or ""), "<u8")


def split_unit(plan: PreparationPlan, parent: DatasetCard | None) -> SplitBy:
    """What is held out together. `parent` is the card of the dataset that is encoded."""
    if parent is not None:
        return parent.split_by
    return "region" if plan.transform is not None and plan.transform.crop == "windows" else "key"


def shown_reasons(reasons: Counter[str]) -> dict[str, int]:
    """The most common reasons in the order of their first inputs, and the number of inputs with another one."""
    common = {reason for reason, _ in reasons.most_common(MOST_REASONS)}
    shown = {reason: count for reason, count in reasons.items() if reason in common}
    others = reasons.total() - sum(shown.values())
    return shown | ({OTHER_REASONS: others} if others else {})


def dataset_card(plan: PreparationPlan, found: Findings, no_text: bytes = b"") -> DatasetCard:
    """The card of a dataset from the notes of all its shards, and from its file of the embedding of the empty text."""
    mean, std = statistics(found.sums)
    parent = open_dataset(plan.source).card if plan.source_kind == "dataset" else None
    return DatasetCard(
        format_version=DatasetCard.FORMAT if found.shard_list else 1,  # older versions cannot read the list
        kind="latents" if plan.autoencoder else "pixels",
        resolution=found.shape[-1],
        channels=found.shape[0],
        dtype="float16" if plan.autoencoder else "uint8",
        rows=found.rows,
        inputs=found.inputs,
        skipped=SkippedInputs(count=found.reasons.total(), reasons=shown_reasons(found.reasons)),
        classes=[ClassRows(name=name, rows=found.classes[number]) for number, name in enumerate(plan.class_names)],
        mean=mean.tolist(),
        std=std.tolist(),
        transform=parent.transform if parent else plan.transform,
        mirror=plan.mirror,
        split_by=split_unit(plan, parent),
        autoencoder=plan.autoencoder,
        condition=_condition_record(plan, found),
        text=_text_record(plan.text, no_text) if plan.text else None,
        source_sha256=plan.inputs_sha256 if parent else found.source_digest.hexdigest(),
        preparation=plan.identity(),
        shards=[] if found.shard_list else found.shards.inline(),
        shard_list=found.shard_list,
        index=found.index,
    )


def _text_record(plan: TextPlan, no_text: bytes) -> DatasetText:
    known = plan.model_dump(exclude={"sha256", "no_text_sha256"})
    return DatasetText(**known, no_text_sha256=hashlib.sha256(no_text).hexdigest())


def _condition_record(plan: PreparationPlan, found: Findings) -> DatasetCondition | None:
    if plan.condition is None:
        return None
    mean, std = statistics(found.condition_sums)
    known = plan.condition.model_dump(exclude={"source_kind"})
    return DatasetCondition(**known, mean=mean.tolist(), std=std.tolist())
