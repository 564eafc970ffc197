"""Spools: temporary files for what is too much for memory. They have no name, so that nothing is left behind."""

import heapq
import itertools
import marshal
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

SPOOL_BLOCK_ROWS = 1024  # of a spool, which are written and read together
SORTED_ROWS = 1 << 15  # at most, in memory
MERGED_RUNS = 32  # sorted runs that become one, so that few files are open, with a block of each in memory


def temporary_file(pieces: Iterable[bytes]) -> BinaryIO:
    """A temporary file of these pieces, open for reading from its start."""
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 the caller closes it
    file.writelines(pieces)
    file.seek(0)
    return file


def write_whole(file: Any, content: bytes) -> None:
    """Write all of the content to an unbuffered file, which may take less at once, such as on a full disk."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


class Spool:
    """Texts or bytes that are kept in a temporary file, by number.

    Args:
        size: how many numbers there are.
    """

    def __init__(self, size: int) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed with the object
        self._starts, self._sizes = array("q", [-1]) * size, array("q", [0]) * size
        self._end = 0

    def __contains__(self, number: int) -> bool:
        return self._starts[number] >= 0

    def keep(self, number: int, content: bytes) -> None:
        """Keep the content of a number."""
        write_whole(self._file, content)
        self._starts[number], self._sizes[number] = self._end, len(content)
        self._end += len(content)

    def read(self, number: int) -> bytes:
        """The content of a number that is kept. Several threads may read."""
        return os.pread(self._file.fileno(), self._sizes[number], self._starts[number])


class RowSpool:
    """Rows of plain values: tuples of numbers, texts, lists and None. Reading may begin again, also while it grows."""

    def __init__(self) -> None:
        self._file: Any = None
        self._starts = array("q", [0])  # of each block that was written, and the end of the last one
        self._pending: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return (len(self._starts) - 1) * SPOOL_BLOCK_ROWS + len(self._pending)

    @classmethod
    def of(cls, rows: Iterable[tuple[Any, ...]]) -> "RowSpool":
        """A spool of these rows."""
        spool = cls()
        for row in rows:
            spool.append(row)
        return spool

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a row at the end."""
        self._pending.append(row)
        if len(self._pending) == SPOOL_BLOCK_ROWS:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed with the object
            block = marshal.dumps(self._pending)
            write_whole(self._file, block)
            self._starts.append(self._starts[-1] + len(block))
            self._pending = []

    def blocks(self) -> Iterator[list[tuple[Any, ...]]]:
        """The rows in order, in lists of `SPOOL_BLOCK_ROWS` rows; the last one may be shorter."""
        for number in range(len(self._starts) - 1):
            yield self._block(number)
        if self._pending:
            yield list(self._pending)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return itertools.chain.from_iterable(self.blocks())

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        block, row = divmod(range(len(self))[number], SPOOL_BLOCK_ROWS)
        return (self._block(block) if block < len(self._starts) - 1 else self._pending)[row]

    def _block(self, number: int) -> list[tuple[Any, ...]]:
        start, end = self._starts[number], self._starts[number + 1]
        rows: list[tuple[Any, ...]] = marshal.loads(os.pread(self._file.fileno(), end - start, start))
        return rows


def sorted_rows(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Rows of plain values in ascending order, with a bounded number of them in memory."""
    rows, levels = iter(rows), [list[RowSpool]()]  # a run of a level is `MERGED_RUNS` of the level below
    while batch := sorted(itertools.islice(rows, SORTED_ROWS)):
        if len(batch) < SORTED_ROWS and levels == [[]]:
            return iter(batch)
        levels[0].append(RowSpool.of(batch))
        del batch
        for level, runs in enumerate(levels):
            if len(runs) < MERGED_RUNS:
                break
            if level + 1 == len(levels):
                levels.append([])
            levels[level + 1].append(RowSpool.of(heapq.merge(*runs)))
            runs.clear()
    return heapq.merge(*itertools.chain.from_iterable(levels))
