"""The index of a dataset: a hash of each row's key, which decides whether the row is held out; and splits of rows."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from patchloom.platform.records.dataset import SplitBy

MIRRORED = "#mirror"  # the end of the key of a row that was encoded from a mirror image
INDEX_FILE = "index.npy"
HEADER_BYTES = 128  # of an index file, before its hashes
HASHES_AT_ONCE = 1 << 18
ROWS_PER_COUNT = 512  # of a split, for which the number of earlier rows is kept
ENTRIES_AT_ONCE = 1024


def unit_hashes(keys: Iterable[str], split_by: SplitBy) -> np.ndarray:
    """The hash of what is held out together with each key: (n,) uint64, the first 8 bytes of a sha256.

    A mirror image is in the same split as its image. Crops of a region overlap, so they are in the same split too.
    """

    def unit(key: str) -> bytes:
        key = key.removesuffix(MIRRORED)
        return (key.rsplit("#", 1)[0] if split_by == "region" else key).encode()

    digests = b"".join(hashlib.sha256(unit(key)).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8").astype("<u8")


def write_hashes(file: IO[bytes], parts: Iterable[np.ndarray]) -> int:
    """Write an index: a .npy file of one little-endian uint64 per row.

    Args:
        file: an empty file.
        parts: the hashes, in the order of the rows.

    Returns:
        The number of rows.
    """
    rows = 0
    file.write(bytes(HEADER_BYTES))
    for hashes in parts:
        file.write(hashes.astype("<u8").tobytes())
        rows += len(hashes)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u8", "fortran_order": False, "shape": (rows,)})
    assert header.tell() == HEADER_BYTES
    file.seek(0)
    file.write(header.getvalue())
    return rows


def read_hashes(path: Path) -> Iterator[np.ndarray]:
    """The hashes of an index, some at a time; a map of the file would count as memory of each process."""
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while len(hashes := np.fromfile(file, "<u8", HASHES_AT_ONCE)):
            yield hashes


class Split:
    """The rows of a split of a dataset, in ascending order: one bit per row and one count per `ROWS_PER_COUNT` rows.

    Args:
        hashes: the hashes of all rows in their order, some at a time; parts have whole blocks, except the last one.
        starts: (S + 1,) int64: where the rows of each shard begin, and the number of rows.
        held_out_fraction: the expected fraction of held-out rows.
        is_held_out: whether these are the held-out rows, or those for training.

    Example:
        train = dataset.split("train", 0.05)
        dataset.rows(train.rows([0, len(train) - 1]))
    """

    def __init__(
        self, hashes: Iterable[np.ndarray], starts: np.ndarray, held_out_fraction: float, is_held_out: bool
    ) -> None:
        total = int(starts[-1])
        self._total_rows = total
        self._bits = np.zeros((-(-total // ROWS_PER_COUNT), ROWS_PER_COUNT // 8), np.uint8)
        self._before = np.zeros(len(self._bits) + 1, np.int64)  # rows of the split before each block
        self.starts = np.zeros(len(starts), np.int64)  # entries of the split before each shard
        first = count = shard = 0
        for part in hashes:
            chosen = _held_out(part, held_out_fraction) == is_held_out
            packed = np.packbits(chosen)
            self._bits.reshape(-1)[first // 8 : first // 8 + len(packed)] = packed
            counts = np.concatenate([[count], count + np.cumsum(chosen)])
            blocks = np.arange(0, len(part), ROWS_PER_COUNT)
            self._before[first // ROWS_PER_COUNT : first // ROWS_PER_COUNT + len(blocks)] = counts[blocks]
            last = int(np.searchsorted(starts, first + len(part), side="right"))
            self.starts[shard:last] = counts[starts[shard:last] - first]
            first, count, shard = first + len(part), int(counts[-1]), last
        self._before[-1] = count

    def __len__(self) -> int:
        return int(self._before[-1])

    def rows(self, entries: Sequence[int] | range | np.ndarray) -> np.ndarray:
        """The positions in the dataset of these entries of the split.

        Args:
            entries: (n,), 0 is the first row of the split.

        Returns:
            (n,) int64.

        Raises:
            IndexError: an entry is negative or not below `len()`.
        """
        wanted = np.asarray(entries, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"entries {wanted.min()} to {wanted.max()} are not within 0 to {len(self) - 1}")
        found = np.empty(len(wanted), np.int64)
        for first in range(0, len(wanted), ENTRIES_AT_ONCE):
            part = wanted[first : first + ENTRIES_AT_ONCE]
            block = np.searchsorted(self._before, part, side="right") - 1
            seen = np.cumsum(np.unpackbits(self._bits[block], axis=1), axis=1, dtype=np.uint16)
            inside = (seen <= (part - self._before[block])[:, None]).sum(1)
            found[first : first + len(part)] = block * ROWS_PER_COUNT + inside
        return found

    def spread(self, count: int) -> np.ndarray:
        """The positions of up to so many rows, at equal distances over the split."""
        return self.rows(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))

    def indices(self) -> np.ndarray:
        """The positions of all rows of the split: 8 bytes per row."""
        return np.flatnonzero(np.unpackbits(self._bits, count=self._total_rows))


def _held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Whether hash < fraction * 2^64, without rounding the hash."""
    limit = math.ceil(fraction * 2**64)
    return hashes < np.uint64(limit) if 0 <= limit < 2**64 else np.full(len(hashes), limit > 0)
