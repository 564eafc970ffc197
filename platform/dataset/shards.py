"""Shards: the Arrow files of a dataset, read through a bounded number of memory maps, verified once per node."""

import contextlib
import hashlib
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from patchloom.errors import UserError
from patchloom.platform.dataset.shard_table import COPY_AGAIN, ShardTable, check_sha256
from patchloom.platform.files.cache import cached_copy

MAPPED_SHARDS = 1024  # at most, in each dataset of a process; Linux allows 65,530 maps per process
RECORD_WORDS = 16  # of 8 bytes, for each shard in the file of verified shards: a stamp, then where its values begin


class ShardFiles(Protocol):
    """Where the shards of a dataset are on this node. The number of a shard is its position in the card.

    Attributes:
        are_verified: whether `path_of` has compared the checksum. If not, the reader does it, once per node.
    """

    are_verified: bool

    def path_of(self, number: int) -> Path:
        """The file of a shard, which may have to be fetched first. It stays until the call of `release`.

        Raises:
            UserError: the file is missing, has another size, or cannot be fetched.
        """

    def release(self, number: int) -> None:
        """The reader has closed the file. Called once for each `path_of`, by any thread, so it must not wait."""


class LocalShards:
    """The shards of a dataset in a local folder."""

    are_verified = False

    def __init__(self, folder: Path, table: ShardTable) -> None:
        self.folder, self.table = folder, table

    def path_of(self, number: int) -> Path:
        """The file of a shard; raises UserError if it is missing or has another size."""
        path, wanted = self.folder / self.table.name_of(number), int(self.table.sizes[number])
        try:
            found = path.stat().st_size
        except OSError:
            raise UserError(f"{path} is missing: {COPY_AGAIN}") from None
        if found != wanted:
            raise UserError(f"{path} has {found} bytes, and dataset.json says {wanted}: {COPY_AGAIN}")
        return path

    def release(self, number: int) -> None:
        """Files of a local dataset stay."""


@dataclass(frozen=True)
class ShardColumn:
    """A column of a dataset: its name, and the type and shape of a value. `dtype` is None for text."""

    name: str
    dtype: np.dtype | None
    shape: tuple[int, ...]

    @staticmethod
    def of_field(field: pa.Field) -> "ShardColumn":
        """The column of a field of an Arrow schema."""
        if isinstance(field.type, pa.FixedShapeTensorType):
            return ShardColumn(field.name, np.dtype(field.type.value_type.to_pandas_dtype()), tuple(field.type.shape))
        is_text = pa.types.is_string(field.type)
        return ShardColumn(field.name, None if is_text else np.dtype(field.type.to_pandas_dtype()), ())

    def empty(self, rows: int) -> np.ndarray:
        """An array for so many values."""
        return np.empty((rows, *self.shape), dtype=self.dtype or object)


@dataclass(frozen=True)
class ShardLayout:
    """Where the values of the columns begin in one shard.

    Args:
        columns: the columns in their order.
        offsets: (K,) int64, in bytes: one of each column of numbers; of text, those of the ends and of the characters.
    """

    columns: tuple[ShardColumn, ...]
    offsets: np.ndarray

    @staticmethod
    def of_file(path: Path, rows: int | None = None) -> "ShardLayout":
        """Read the layout from the schema and the metadata of an Arrow file.

        Raises:
            UserError: it is not a shard of so many rows.
        """
        try:
            return ShardLayout._of_file(path, rows)
        except UserError:
            raise
        except Exception as error:  # of Arrow and NumPy, for a file that nobody checked
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{path} is not a shard of this dataset ({problem}): {COPY_AGAIN}") from None

    @staticmethod
    def _of_file(path: Path, rows: int | None) -> "ShardLayout":
        mapped = pa.memory_map(str(path))
        batch, start = pa.ipc.open_file(mapped).get_batch(0), mapped.read_buffer(mapped.size()).address
        batch.validate(full=True)  # Arrow itself trusts the offsets of texts, also outside of the file
        if rows is not None and len(batch) != rows:
            raise ValueError(f"it has {len(batch):,} rows instead of {rows:,}")
        buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
        columns = tuple(ShardColumn.of_field(field) for field in batch.schema)
        if len(buffers) != sum(2 if column.dtype is None else 1 for column in columns):
            raise ValueError("it has missing values, or columns of another kind")
        offsets = [buffer.address - start for buffer in buffers]
        ends = [offset + buffer.size for offset, buffer in zip(offsets, buffers, strict=True)]
        if min(offsets) < 0 or max(ends) > mapped.size():
            raise ValueError("its values are not in the file as they are")
        return ShardLayout(columns, np.array(offsets, np.int64))


class MappedShard:
    """The memory map of one shard, whose values are read in place."""

    def __init__(self, path: Path, rows: int, layout: ShardLayout) -> None:
        content = pa.memory_map(str(path)).read_buffer()  # the map ends with the last view of it
        self._values: dict[str, np.ndarray | pa.StringArray] = {}
        places = iter(layout.offsets.tolist())
        for column in layout.columns:
            if column.dtype is None:
                ends = content.slice(next(places), 4 * (rows + 1))
                self._values[column.name] = pa.StringArray.from_buffers(rows, ends, content.slice(next(places)))
            else:
                count = rows * int(np.prod(column.shape))
                flat = np.frombuffer(content, column.dtype, count, next(places))
                self._values[column.name] = flat.reshape(rows, *column.shape)

    def tensor(self, name: str) -> np.ndarray:
        """A column of numbers: a read-only view of the map."""
        values = self._values[name]
        assert isinstance(values, np.ndarray)
        return values

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The values of a column at these rows of the shard."""
        values = self._values[name]
        if isinstance(values, pa.StringArray):
            return np.array(values.take(pa.array(rows)).to_pylist(), dtype=object)
        taken: np.ndarray = values[rows]
        return taken


class ShardReader:
    """Reads rows of shards. It keeps the memory maps that were used last, and no object per row or shard.

    Args:
        table: what the card says about the shards.
        files: where they are.
        name: identifies the dataset and its place, for what this node keeps about verified shards.
    """

    def __init__(self, table: ShardTable, files: ShardFiles, name: str) -> None:
        self.table, self.files, self.name = table, files, name
        self.starts = np.concatenate([[0], np.cumsum(table.rows)])  # (S + 1,): where the rows of each shard begin
        self._columns: tuple[ShardColumn, ...] | None = None
        self._maps: dict[int, MappedShard] = {}  # the one that was used last is the last entry
        self._lock = threading.Lock()

    def read(self, wanted: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Rows in the given order.

        Args:
            wanted: (n,) int64, positions of rows in the dataset.
            names: the columns to read; by default all.

        Returns:
            The columns by name, n values each.

        Raises:
            UserError: a shard is missing or damaged.
        """
        by_shard = self._by_shard(wanted)
        first = next(by_shard, None)
        columns = self._columns_of(0 if first is None else first[0])
        chosen = [column for column in columns if names is None or column.name in names]
        out = {column.name: column.empty(len(wanted)) for column in chosen}
        for number, places in chain([first] if first else [], by_shard):
            shard, rows = self.mapped(number), wanted[places] - self.starts[number]
            for name, values in out.items():
                values[places] = shard.take(name, rows)
        return out

    def _by_shard(self, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The shards of these rows, and for each shard the places in `wanted` of its rows."""
        if len(wanted):
            which = np.searchsorted(self.starts, wanted, side="right") - 1
            order = np.argsort(which, kind="stable")
            for places in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
                yield int(which[places[0]]), places

    def _columns_of(self, number: int) -> tuple[ShardColumn, ...]:
        """The columns of the dataset, which are read from this shard if they are not known yet."""
        if self._columns is None:
            with self._file(number) as path:
                if self._known.offsets(number, path) is None:
                    self._verify(number, path)
                self._columns = ShardLayout.of_file(path).columns
        return self._columns

    def mapped(self, number: int) -> MappedShard:
        """The map of a shard; raises UserError if the shard is missing or damaged."""
        with self._lock:
            found = self._maps.pop(number, None)
            if found is not None:
                self._maps[number] = found
                return found
        opened = self._open(number)
        with self._lock:
            self._maps[number] = opened
            while len(self._maps) > MAPPED_SHARDS:
                del self._maps[next(iter(self._maps))]
        return opened

    def forget(self, numbers: Iterable[int]) -> None:
        """Close the maps of these shards, so that their files are released."""
        with self._lock:
            for number in numbers:
                self._maps.pop(number, None)

    def forget_before(self, row: int) -> None:
        """Close the maps of the shards whose rows all are before this one."""
        with self._lock:
            numbers = [number for number in self._maps if self.starts[number + 1] <= row]
        self.forget(numbers)

    def _open(self, number: int) -> MappedShard:
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(self._file(number))
            offsets = self._known.offsets(number, path)
            if offsets is None:
                offsets = self._verify(number, path)
            layout = ShardLayout(self._columns_of(number), offsets)
            mapped = MappedShard(path, int(self.table.rows[number]), layout)
            weakref.finalize(mapped, stack.pop_all().close).atexit = False
        return mapped

    @contextlib.contextmanager
    def _file(self, number: int) -> Iterator[Path]:
        path = self.files.path_of(number)
        try:
            yield path
        finally:
            self.files.release(number)

    def verify(self, number: int) -> None:
        """Read a whole shard; raises UserError if its checksum differs from the card."""
        with self._file(number) as path:
            self._verify(number, path, again=True)

    def _verify(self, number: int, path: Path, again: bool = False) -> np.ndarray:
        """Compare the checksum of a shard, if it has not been compared, and keep where its values begin."""
        status = path.stat()  # before it is read: a change during the reading gives another stamp
        if again or not self.files.are_verified:
            check_sha256(path, self.table.sha256_of(number))
        layout = ShardLayout.of_file(path, int(self.table.rows[number]))
        self._known.keep(number, status, layout.offsets)
        return layout.offsets

    def check_once(self, path: Path, sha256: str) -> None:
        """Compare the checksum of the index of the dataset, once per node; raises UserError if it differs."""
        number = len(self.table)
        if self._known.offsets(number, path) is None:
            status = path.stat()
            check_sha256(path, sha256)
            self._known.keep(number, status, np.zeros(0, np.int64))

    @cached_property
    def _known(self) -> "KnownShards":
        return KnownShards(self.name, len(self.table) + 1)


class KnownShards:
    """Which shards of a dataset were verified on this node, and where their values begin.

    That is a file in the cache with a record of fixed width for each shard, which all processes of the node share. A
    record has the offsets and a stamp: a hash of them and of the size, times and inode of the file. A shard that was
    changed has another stamp, and so has a record that another process has written in part.

    Args:
        name: identifies the dataset and its place.
        shards: number of shards.
    """

    def __init__(self, name: str, shards: int) -> None:
        self._file = _shared_file(name, 8 * RECORD_WORDS * shards)
        weakref.finalize(self, os.close, self._file)

    def offsets(self, number: int, path: Path) -> np.ndarray | None:
        """Where the values of a verified shard begin; None if it was not verified, or was changed later."""
        record = np.frombuffer(os.pread(self._file, 8 * RECORD_WORDS, 8 * RECORD_WORDS * number), np.int64)
        is_known = len(record) == RECORD_WORDS and record[0] == _stamp(path.stat(), record[1:])
        return record[1:] if is_known else None

    def keep(self, number: int, status: os.stat_result, offsets: np.ndarray) -> None:
        """Keep that a shard is verified, if the cache can be written. `status` is from before it was read."""
        if len(offsets) < RECORD_WORDS:  # a dataset of more columns is verified by each process
            padded = np.concatenate([offsets, np.zeros(RECORD_WORDS - 1 - len(offsets), np.int64)])
            record = np.concatenate([[_stamp(status, padded)], padded])
            with contextlib.suppress(OSError):
                os.pwrite(self._file, record.tobytes(), 8 * RECORD_WORDS * number)


def _stamp(status: os.stat_result, offsets: np.ndarray) -> int:
    """8 bytes that change when a file is changed."""
    parts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    digest = hashlib.blake2b(repr(parts).encode() + offsets.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shared_file(name: str, size_bytes: int) -> int:
    """A descriptor of a file of zeros in the cache; of a file of this process if the cache cannot be written."""

    def fill(folder: Path) -> None:
        with (folder / "shards").open("wb") as file:
            file.truncate(size_bytes)

    try:
        handle, folder = cached_copy("verified", name, size_bytes, fill)
    except (OSError, UserError):
        with tempfile.TemporaryFile() as file:
            file.truncate(size_bytes)
            return os.dup(file.fileno())
    try:
        return os.open(folder / "shards", os.O_RDWR)
    finally:
        os.close(handle)
