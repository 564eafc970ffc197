"""Keys: which of millions of keys are equal, found by sorting their hashes on disk."""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from patchloom.platform.files.spool import write_whole

RUN_ROWS = 1 << 17  # in memory, before they are sorted and written
PARTS = 256  # of the range of hashes, which are read one after another
HIGH, LOW, VALUE = 0, 1, 2  # the columns of a part: both halves of the hash, and the value


class KeyTable:
    """Keys with a value each. Of a key, a hash of 128 bits is kept, so that different keys are never taken as equal."""

    def __init__(self) -> None:
        self._hashes, self._values = bytearray(), array("Q")
        self._runs: list[tuple[int, np.ndarray]] = []  # where a sorted run begins in the file, and its parts in rows
        self._file: Any = None
        self._end = 0

    def __len__(self) -> int:
        return sum(int(parts[-1]) for _, parts in self._runs) + len(self._values)

    def add(self, key: str, value: int) -> None:
        """Add a key with its value, which is not negative."""
        self._hashes += hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()
        self._values.append(value)
        if len(self._values) == RUN_ROWS:
            self._write_run()

    def _write_run(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed with the object
        rows = self._pending()
        content = rows.tobytes()
        write_whole(self._file, content)
        self._runs.append((self._end, _ends_of_parts(rows)))
        self._end += len(content)
        self._hashes, self._values = bytearray(), array("Q")

    def _pending(self) -> np.ndarray:
        """(n, 3) uint64, the keys in memory, sorted by hash and value."""
        halves = np.frombuffer(self._hashes, ">u8").reshape(-1, 2)
        rows = np.empty((len(halves), 3), np.uint64)
        rows[:, :VALUE], rows[:, VALUE] = halves, np.frombuffer(self._values, np.uint64)
        return _sorted(rows)

    def parts(self) -> Iterator[np.ndarray]:
        """(n, 3) uint64, sorted by hash and value; one array for each of `PARTS` ranges of hashes."""
        pending = self._pending()
        ends = _ends_of_parts(pending)
        for part in range(PARTS):
            pieces = [self._piece(start, run[part], run[part + 1]) for start, run in self._runs]
            pieces.append(pending[ends[part] : ends[part + 1]])
            yield _sorted(np.concatenate(pieces)) if self._runs else pieces[0]

    def _piece(self, start: int, first: np.int64, end: np.int64) -> np.ndarray:
        size = int(end - first) * 3 * 8
        return np.frombuffer(os.pread(self._file.fileno(), size, start + int(first) * 3 * 8), np.uint64).reshape(-1, 3)

    def repeated(self) -> np.ndarray:
        """The values of all but the first of equal keys, in ascending order; the first has the smallest value."""
        found = [part[~_is_first(part), VALUE] for part in self.parts()]
        return np.sort(np.concatenate(found))


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows[:, VALUE], rows[:, LOW], rows[:, HIGH]))]


def _is_first(rows: np.ndarray) -> np.ndarray:
    """(n,) bool, whether a row of sorted rows has another key than the row before."""
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:, :VALUE] != rows[:-1, :VALUE]).any(1)
    return first


def _ends_of_parts(rows: np.ndarray) -> np.ndarray:
    """(PARTS + 1,) int64, where the parts of sorted rows begin, and where the last one ends."""
    bounds = np.arange(1, PARTS, dtype=np.uint64) << np.uint64(64 - 8)  # by the first byte
    return np.concatenate([[0], np.searchsorted(rows[:, HIGH], bounds), [len(rows)]]).astype(np.int64)
