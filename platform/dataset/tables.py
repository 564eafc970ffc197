"""Tables: cells of Parquet and Arrow files, read in batches of bounded size."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patchloom.platform.files.bounds import check_rows, reading_damaged
from patchloom.platform.files.cache import cached_copy, copy_name, kept_with
from patchloom.platform.files.folder import Folder

TABLE_BATCH_ROWS, SMALL_BATCH_ROWS, LEAST_BATCH_ROWS = 32, 8192, 16
MOST_BATCH_BYTES = 1 << 31
ARROW_MAGIC = b"ARROW1"  # of files; streams have none
NO_CELLS = (0, pa.array([]))


class SourceTable:
    """A Parquet or Arrow file. `small` reads all rows of small columns; `cell` reads a large column in batches.

    Args:
        schema: its columns.
        rows: its number of rows.
        small: yields batches with the columns of these names.
        batches: yields the number of the first row and the cells of batches of a column, from the one with a row on.
    """

    def __init__(self, schema: pa.Schema, rows: int, small: Callable[[list[str]], Iterator[pa.RecordBatch]],
                 batches: Callable[[str, int], Iterator[tuple[int, pa.Array]]]) -> None:  # fmt: skip
        self.schema, self.rows, self._small = schema, rows, small
        self._batches = batches
        self._iterator: tuple[str, Iterator[tuple[int, pa.Array]]] | None = None
        self._batch: tuple[int, pa.Array] = NO_CELLS

    def values(self, names: list[str | None]) -> Iterator[list[Any]]:
        """The values of small columns, row by row; None for a column without a name."""
        wanted = [name for name in names if name]
        if not wanted:
            yield from ([None] * len(names) for _ in range(self.rows))
            return
        for batch in self._small(wanted):
            columns = [batch.column(name).to_pylist() if name else [None] * len(batch) for name in names]
            yield from map(list, zip(*columns, strict=True))

    def cell(self, column: str, row: int) -> Any:
        """One cell. Rows in ascending order are read once."""
        if self._iterator is None or self._iterator[0] != column or row < self._batch[0]:
            return self._start(column, row)
        try:
            return self._advance(self._iterator[1], row)
        except Exception:  # a damaged page may be between the previous row and this one
            return self._start(column, row)

    def _start(self, column: str, row: int) -> Any:
        batches, self._iterator, self._batch = self._batches(column, row), None, NO_CELLS
        cell = self._advance(batches, row)
        self._iterator = (column, batches)
        return cell

    def _advance(self, batches: Iterator[tuple[int, pa.Array]], row: int) -> Any:
        while row >= self._batch[0] + len(self._batch[1]):
            self._batch = next(batches)
        first, cells = self._batch
        return cells[row - first].as_py()


def open_table(folder: Folder, name: str) -> SourceTable:
    """A Parquet file, or an Arrow IPC file or stream."""
    with reading_damaged(f"{folder}/{name}", "a complete table"):
        table = _parquet(folder, name) if name.lower().endswith(".parquet") else _arrow(folder, name)
    with reading_damaged(f"{folder}/{name}", "a table that can be read"):
        check_rows(table.rows, folder.size(name))
    return table


def _parquet(folder: Folder, name: str) -> SourceTable:
    file = pyarrow.parquet.ParquetFile(folder.open(name))
    starts = np.cumsum([0] + [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])

    damaged: dict[int, tuple[int, str]] = {}  # by row group: the first row that cannot be read, and why

    def batches(column: str, row: int) -> Iterator[tuple[int, pa.Array]]:
        for group in range(int(np.searchsorted(starts, row, side="right")) - 1, file.num_row_groups):
            first, problem = damaged.get(group, (row + 1, ""))
            if row >= first:
                raise ValueError(problem)
            yield from cells(group, column)

    def cells(group: int, column: str) -> Iterator[tuple[int, pa.Array]]:
        """Cells in small batches, because a group may have gigabytes. Before a damaged page, cells one by one."""
        done = int(starts[group])
        for rows in (_batch_rows(file.metadata, group, TABLE_BATCH_ROWS, 1), 1):
            first = int(starts[group])
            try:
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                    if first >= done:
                        yield first, batch.column(0)
                        done = first + len(batch)
                    first += len(batch)
                return
            except (pa.ArrowException, OSError) as error:
                problem = f"is in or after a damaged page of its row group ({error})"
        damaged[group] = done, problem
        raise ValueError(problem)

    def small(names: list[str]) -> Iterator[pa.RecordBatch]:
        groups = range(file.num_row_groups)
        rows = min(
            (_batch_rows(file.metadata, group, SMALL_BATCH_ROWS, LEAST_BATCH_ROWS) for group in groups), default=1
        )
        with reading_damaged(f"{folder}/{name}", "a complete table"):
            yield from file.iter_batches(rows, columns=names)

    return SourceTable(file.schema_arrow, file.metadata.num_rows, small, batches)


def _batch_rows(metadata: Any, group: int, most: int, least: int) -> int:
    """The rows of a batch. A value that a column stores once may be in every row, and takes its size each time.

    The metadata of columns are not used: those of a damaged file end the process.
    """
    return max(least, min(most, MOST_BATCH_BYTES // max(1, int(metadata.row_group(group).total_byte_size))))


def _arrow(folder: Folder, name: str) -> SourceTable:
    """An Arrow IPC file or stream, memory-mapped; a remote one is copied to the cache of this node."""
    if folder.is_remote:
        place = copy_name(folder, name)
        size = folder.size(name)
        handle, here = cached_copy("tables", place, size, lambda new: folder.fetch(name, new / "table.arrow"))
        batches = _ArrowBatches(here / "table.arrow")
        kept_with(batches, handle)
    else:
        batches = _ArrowBatches(folder.path / name)

    def cells(column: str, row: int) -> Iterator[tuple[int, pa.Array]]:
        number = int(np.searchsorted(batches.starts, row, side="right")) - 1
        for batch in batches.read([column], number):
            yield int(batches.starts[number]), batch.column(column)
            number += 1

    def small(names: list[str]) -> Iterator[pa.RecordBatch]:
        for batch in batches.read(names):
            for first in range(0, len(batch), SMALL_BATCH_ROWS):
                yield batch.slice(first, SMALL_BATCH_ROWS)

    return SourceTable(batches.schema, int(batches.starts[-1]), small, cells)


class _ArrowBatches:
    """The record batches of an Arrow IPC file or stream. One is in memory: batches may be compressed."""

    def __init__(self, path: Path) -> None:
        self._mapped = pa.memory_map(str(path))
        self._is_file = self._mapped.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        self.schema = self._reader(None).schema
        narrow = min(range(len(self.schema)), key=lambda column: _width(self.schema.field(column).type), default=0)
        names = self.schema.names[narrow : narrow + 1]
        rows = [len(batch) for batch in self.read(names)]
        self.starts = np.cumsum([0, *rows])

    def _reader(self, names: list[str] | None) -> Any:
        fields = None if names is None else [self.schema.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        self._mapped.seek(0)
        return (pa.ipc.open_file if self._is_file else pa.ipc.open_stream)(self._mapped, options=options)

    def read(self, names: list[str], first: int = 0) -> Iterator[pa.RecordBatch]:
        """Batches with some columns, from one on."""
        reader = self._reader(sorted(set(names), key=self.schema.get_field_index))
        numbers = range(first, reader.num_record_batches) if self._is_file else ()
        for batch in map(reader.get_batch, numbers) if self._is_file else itertools.islice(reader, first, None):
            batch.validate(full=True)  # Arrow itself trusts the offsets of texts, also outside of the file
            yield batch


def _width(kind: pa.DataType) -> int:
    """Bits per value; many for texts and lists."""
    try:
        return int(kind.bit_width)
    except ValueError:
        return 1 << 30
