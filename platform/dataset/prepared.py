"""Prepared datasets: images or latents in memory-mapped Arrow files, and a card.

DATASET/dataset.json                 the card, written last; a dataset with a card is complete
DATASET/shards/part-00000.arrow ...  rows in the order of the source: key, image | mean (and std), (condition,) label
DATASET/shards.npy                   rows, bytes and checksum of each shard, if there are too many for the card
DATASET/index.npy                    a hash of the key of each row, if there are many rows
DATASET/skipped.jsonl                one line per input that could not be used
DATASET/no_text.npy                  for datasets with texts: the embedding of the empty text
DATASET/autoencoder/                 for latents: the autoencoder that encoded them
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from patchloom.errors import UserError
from patchloom.platform.dataset.image_names import is_image
from patchloom.platform.dataset.index import (
    INDEX_FILE,
    Split,
    highest_ranked,
    is_held_out,
    read_hashes,
    row_ranks,
    unit_hashes,
    write_hashes,
)
from patchloom.platform.dataset.remote_shards import RemoteShards
from patchloom.platform.dataset.shard_table import ShardTable
from patchloom.platform.dataset.shards import LocalShards, ShardFiles, ShardReader
from patchloom.platform.files.cache import cache_folder, cached_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.inside import inner_name
from patchloom.platform.files.parts import CachedParts, PartList
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.progress import Meter, progress
from patchloom.platform.records.dataset import DatasetCard, ShardFile

CARD, DATASETS = "dataset.json", "datasets"  # the kind of their copies in the cache
NO_TEXT_FILE = "no_text.npy"
NOT_DATASETS = {  # what a folder without a dataset is, by a file in it, and what to do
    ".work/plan.json": "an unfinished one: repeat the `patchloom prepare` that made it",
    "run.json": "a run: give the dataset that it was trained on, and the run with --out",
    "search.json": "a search: give the dataset that it used, and the search with --out",
    "sampling.json": "a folder of samples: evaluate it with `patchloom evaluate`, or prepare it first",
    "model.json": "a model: give a dataset, and the model with train.init_from",
}
INDEXED_ROWS = 1 << 16  # more rows have an index; the hashes of fewer are computed in a tenth of a second


def tensor_column(values: np.ndarray) -> pa.ExtensionArray:
    """(n, ...) numpy values as a native `arrow.fixed_shape_tensor` column."""
    row = int(np.prod(values.shape[1:]))
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    tensor = pa.fixed_shape_tensor(flat.type, values.shape[1:])
    return pa.ExtensionArray.from_storage(tensor, pa.FixedSizeListArray.from_arrays(flat, row))


def shard_bytes(keys: Sequence[str], labels: Sequence[int], tensors: dict[str, np.ndarray]) -> pa.Buffer:
    """One Arrow IPC file with `key`, the tensor columns and `label`. The bytes depend only on the rows."""
    columns = {"key": pa.array(keys, pa.string())}
    columns |= {name: tensor_column(values) for name, values in tensors.items()}
    columns["label"] = pa.array(labels, pa.int32())
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def write_shard(path: Path, keys: Sequence[str], labels: Sequence[int], tensors: dict[str, np.ndarray]) -> ShardFile:
    """Write one shard into a local dataset's folder `shards`, and return its entry in the card."""
    path.write_bytes(shard_bytes(keys, labels, tensors))
    size_bytes, sha256 = path.stat().st_size, file_sha256(path)
    return ShardFile(file=f"shards/{path.name}", rows=len(keys), bytes=size_bytes, sha256=sha256)


class Dataset:
    """A prepared dataset: `len()`, `.card`, `.rows(indices)`, `.split(name)`, `.indices(split)`.

    Args:
        path: its local folder.
        card: what `dataset.json` contains.
        address: where other nodes open it; by default the local folder.
        files: where its shards are on this node; by default in the local folder.
    """

    def __init__(
        self, path: Path, card: DatasetCard, address: str | None = None, files: ShardFiles | None = None
    ) -> None:
        self.path, self.card = path, card
        self.address = address or str(path)
        self.shards = ShardTable.of_card(card, path)
        self._identity = hashlib.sha256(card.to_json().encode()).hexdigest()[:32]
        name = hashlib.sha256(f"{self._identity} {path}".encode()).hexdigest()[:32]
        self.reader = ShardReader(self.shards, files or LocalShards(path, self.shards), name)
        self._splits: dict[tuple[str, float, int | None], Split] = {}

    def __len__(self) -> int:
        return int(self.reader.starts[-1])

    @property
    def kind(self) -> str:
        """`pixels` or `latents`."""
        return self.card.kind

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        return [entry.name for entry in self.card.classes]

    @property
    def fingerprint(self) -> str:
        """The sha256 of the card, which contains the checksum of each shard."""
        return file_sha256(self.path / CARD)

    def rows(self, indices: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Read rows.

        Args:
            indices: positions of the rows, in any order; a position may occur more than once.
            columns: the columns to read; by default all.

        Returns:
            The columns by name, as numpy arrays of len(indices) rows in the given order.

        Raises:
            IndexError: a position is negative or not below `len()`.
            UserError: a shard is missing or damaged.

        Example:
            dataset = open_dataset("pixels")
            dataset.rows([0, 1])["image"].shape  # (2, 3, 64, 64)
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} are not within 0 to {len(self) - 1}")
        return self.reader.read(wanted, columns)

    def no_text(self) -> np.ndarray:
        """The embedding of the empty text, (tokens, width) float16; raises UserError if it is missing or damaged."""
        path, text = self.path / NO_TEXT_FILE, self.card.text
        if text is None or not path.is_file() or file_sha256(path) != text.no_text_sha256:
            raise UserError(f"{path} is missing or damaged: copy the dataset again, or prepare it with --text")
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found

    def forget_before(self, row: int) -> None:
        """Close the memory maps of the shards that end at this row or before, for readers that do not go back."""
        self.reader.forget_before(row)

    def split(self, name: str, held_out_fraction: float = 0.05, images: int | None = None) -> Split:
        """The rows of a split, without 8 bytes per row. They depend only on the keys and their order.

        Args:
            name: "train" or "held_out".
            held_out_fraction: the expected fraction of held-out rows; a recipe has it as `data.held_out_fraction`.
            images: only so many of the rows for training, which are a part of any larger number of them; a recipe has
                it as `data.images`. Held-out rows are always all.

        Raises:
            UserError: the split is unknown, it has fewer rows, or a shard or the index is damaged.

        Example:
            train = dataset.split("train")
            first = dataset.rows(train.rows(range(8)))
        """
        if name not in ("train", "held_out"):
            raise UserError(f"split {name!r} is unknown; choose train or held_out")
        found = self._splits.get((name, held_out_fraction, images))
        if found is None:
            parts = self._chosen(name, held_out_fraction, images)
            found = self._splits[name, held_out_fraction, images] = Split(parts, self.reader.starts)
        return found

    def _chosen(self, split: str, held_out_fraction: float, images: int | None) -> Iterator[np.ndarray]:
        """Whether each row is in a split, some rows at a time. The arguments are those of `split`."""
        if split == "held_out" or images is None:
            return (is_held_out(part, held_out_fraction) == (split == "held_out") for part in self._hashes())
        rows = len(self.split("train", held_out_fraction))
        if images > rows:
            raise UserError(
                f"data.images: {images:,} images are wanted, and {self.address} has {rows:,} rows for training: choose "
                f"at most {rows:,}, or none for all"
            )

        def ranked() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            first = 0
            for hashes in self._hashes():
                ranks = row_ranks(hashes, first, self.card.split_by, self.card.mirror)
                yield ~is_held_out(hashes, held_out_fraction), ranks
                first += len(hashes)

        return highest_ranked(ranked, images)

    def indices(self, split: str, held_out_fraction: float = 0.05) -> np.ndarray:
        """The positions of the rows of a split, in ascending order, 8 bytes each; `split` needs less memory.

        Args:
            split: "train", "held_out" or "all".
            held_out_fraction: the expected fraction of held-out rows; a recipe has it as `data.held_out_fraction`.

        Raises:
            UserError: the split is unknown, or a shard or the index is damaged.
        """
        if split == "all":
            return np.arange(len(self))
        if split not in ("train", "held_out"):
            raise UserError(f"split {split!r} is unknown; choose train, held_out or all")
        return self.split(split, held_out_fraction).indices()

    def _hashes(self) -> Iterator[np.ndarray]:
        """The hashes of the keys of all rows, from the index if the dataset has one, or from one in the cache."""
        if self.card.index is not None:
            path = self.path / inner_name(self.card.index.file, self.path / CARD)
            self.reader.check_once(path, self.card.index.sha256)
            yield from read_hashes(path)
        elif len(self) <= INDEXED_ROWS and isinstance(self.reader.files, LocalShards):
            yield np.concatenate([np.empty(0, np.uint64), *self._computed_hashes()])
        else:
            with self._built_index() as path:
                yield from read_hashes(path)

    def _counted_hashes(self, meter: Meter) -> Iterator[np.ndarray]:
        for hashes in self._computed_hashes():
            meter.update(meter.done + len(hashes))
            yield hashes

    def _computed_hashes(self) -> Iterator[np.ndarray]:
        """The hashes of the keys of each shard."""
        for first, last in pairwise(self.reader.starts.tolist()):
            yield unit_hashes(self.rows(np.arange(first, last), ["key"])["key"], self.card.split_by)

    @contextmanager
    def _built_index(self) -> Iterator[Path]:
        """The index of a dataset that was prepared without one, built once per node."""

        def build(folder: Path) -> None:
            with progress("indexing", len(self), "rows") as meter, (folder / INDEX_FILE).open("wb") as file:
                write_hashes(file, self._counted_hashes(meter))

        with ExitStack() as stack:
            try:
                handle, folder = cached_copy("indexes", self._identity, 8 * len(self), build)
                stack.callback(os.close, handle)
            except (OSError, UserError):  # a cache that cannot be written, or that is full
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                build(folder)
            yield folder / INDEX_FILE

    def verify(self) -> None:
        """Read all shards; raises UserError at the first damaged one."""
        for number in range(len(self.shards)):
            self.reader.verify(number)


def is_dataset(folder: Folder) -> bool:
    """Whether a folder contains a complete prepared dataset. EDM's `dataset.json` has no format_version."""
    if not folder.has(CARD):
        return False
    card = folder.read_json(CARD)
    return isinstance(card, dict) and "format_version" in card


def open_dataset(path: str | Path) -> Dataset:
    """Open a prepared dataset. The shards of a remote one are copied to this node's cache when their rows are read.

    Args:
        path: the folder of the dataset, or its address.

    Returns:
        The dataset: `len()`, `.card`, `.rows(indices)` and `.indices(split)`.

    Raises:
        UserError: it is missing or incomplete, or a newer version of Patchloom wrote it.

    Example:
        dataset = patchloom.open_dataset("dataset")
        rows = dataset.rows([0, 1])
        print(len(dataset), rows["image"].shape)
    """
    folder = Folder.at(path)
    card = _read_card(folder)
    if folder.is_remote:
        return _open_remote(folder, card)
    dataset = Dataset(folder.path, card, folder.address)
    for number in range(len(card.shards)):  # a long list is not checked before its shards are read
        dataset.reader.files.path_of(number)
    return dataset


def _read_card(folder: Folder) -> DatasetCard:
    if not folder.is_remote and not folder.path.is_dir():
        raise UserError(f"{folder} does not exist: make a dataset with `patchloom prepare SOURCE {folder}`")
    if not folder.has(CARD):
        for name, advice in NOT_DATASETS.items():
            if folder.has(name):
                raise UserError(f"{folder} has no {CARD}: it is not a prepared dataset but {advice}")
        names = folder.files()
        if not names:
            advice = "check the address, or make a dataset there with `patchloom prepare`"
            raise UserError(f"{folder} is empty or does not exist: {advice}")
        if any(map(is_image, names)):
            raise UserError(f"{folder} has no {CARD}, and it contains images: run `patchloom prepare {folder} DATASET`")
        raise UserError(f"{folder} has no {CARD}: it is not a dataset, or it is incomplete; run prepare again")
    content = folder.read(CARD)
    if b'"format_version"' not in content:
        raise UserError(f"{folder}/{CARD} has no format_version, so it is not a prepared dataset: run prepare first")
    return DatasetCard.parse(content, f"{folder}/{CARD}")


_cached: dict[Path, CachedParts] = {}  # this process uses them until it ends


def _open_remote(remote: Folder, card: DatasetCard) -> Dataset:
    """A dataset at a store. This node gets all files but the shards, which are fetched when they are read."""
    name = f"{hashlib.sha256(remote.read(CARD)).hexdigest()[:32]}-shards"
    place = cache_folder(DATASETS) / name
    if place not in _cached:
        shards = card.shard_list.shards if card.shard_list else len(card.shards)
        _cached[place] = CachedParts(DATASETS, name, remote, shards, lambda: _other_files(remote, card))
    parts = _cached[place]
    dataset = Dataset(place, card, remote.address, files := RemoteShards(parts))
    table = dataset.shards
    parts.remote, parts.list = remote, PartList(table.sizes, table.name_of, table.sha256_of)
    files.forget = dataset.reader.forget
    return dataset


def _other_files(remote: Folder, card: DatasetCard) -> dict[str, int]:
    """The sizes of the files of a remote dataset that are not shards, by name."""
    names = [
        CARD,
        "skipped.jsonl",
        *([NO_TEXT_FILE] if card.text else []),
        *(listed.file for listed in (card.shard_list, card.index) if listed),
    ]
    if card.autoencoder is not None:
        names += [f"autoencoder/{name}" for name in remote.folder("autoencoder").files()]
    return {name: remote.size(name) for name in names if remote.has(name)}
