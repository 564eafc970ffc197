"""The index of a dataset: a hash of each row's key, which decides whether the row is held out; and splits of rows."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
RANK_BITS = 16  # of a rank, by which rows are counted to find the least rank of so many


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
        parts: for each row of the dataset in its order whether it is in the split, some at a time; parts have whole
            blocks, except the last one.
        starts: (S + 1,) int64: where the rows of each shard begin, and the number of rows.

    Example:
        train = dataset.split("train", 0.05)
        dataset.rows(train.rows([0, len(train) - 1]))
    """

    def __init__(self, parts: Iterable[np.ndarray], starts: np.ndarray) -> None:
        total = int(starts[-1])
        self._total_rows = total
        self._bits = np.zeros((-(-total // ROWS_PER_COUNT), ROWS_PER_COUNT // 8), np.uint8)
        self._before = np.zeros(len(self._bits) + 1, np.int64)  # rows of the split before each block
        self.starts = np.zeros(len(starts), np.int64)  # entries of the split before each shard
        first = count = shard = 0
        for chosen in parts:
            packed = np.packbits(chosen)
            self._bits.reshape(-1)[first // 8 : first // 8 + len(packed)] = packed
            counts = np.concatenate([[count], count + np.cumsum(chosen)])
            blocks = np.arange(0, len(chosen), ROWS_PER_COUNT)
            self._before[first // ROWS_PER_COUNT : first // ROWS_PER_COUNT + len(blocks)] = counts[blocks]
            last = int(np.searchsorted(starts, first + len(chosen), side="right"))
            self.starts[shard:last] = counts[starts[shard:last] - first]
            first, count, shard = first + len(chosen), int(counts[-1]), last
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


def is_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """(n,) bool: whether hash < fraction * 2^64, without rounding the hash."""
    limit = math.ceil(fraction * 2**64)
    return hashes < np.uint64(limit) if 0 <= limit < 2**64 else np.full(len(hashes), limit > 0)


def row_ranks(hashes: np.ndarray, first: int, split_by: SplitBy, is_mirrored: bool) -> np.ndarray:
    """(n,) uint64: the ranks of rows, by which a few of them are chosen; a mirror image has the rank of its image.

    The windows of a region have one hash, and are ranked apart: a few images then come from many regions.

    Args:
        hashes: (n,) uint64, the hashes of the rows.
        first: the position of the first of them in the dataset.
        split_by: what a hash is of.
        is_mirrored: whether each image is followed by its mirror image.
    """
    if split_by == "key":
        return hashes
    places = np.arange(first, first + len(hashes), dtype=np.uint64) // np.uint64(2 if is_mirrored else 1)
    mixed: np.ndarray = hashes + places * np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 (Steele et al. 2014)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def highest_ranked(parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], count: int) -> Iterator[np.ndarray]:
    """Whether each row is one of so many with the highest ranks; of rows with equal ranks, the first ones are.

    Fewer rows are a part of more rows. The memory does not grow with the number of rows.

    Args:
        parts: gives, some rows at a time, (n,) bool: which may be chosen, and (n,) uint64: their ranks. Called three
            times.
        count: the number of rows to choose; at least 1.

    Raises:
        ValueError: fewer rows may be chosen.
    """
    shift = np.uint64(64 - RANK_BITS)
    counts = np.zeros(1 << RANK_BITS, np.int64)
    for allowed, ranks in parts():
        counts += np.bincount((ranks[allowed] >> shift).astype(np.int64), minlength=len(counts))
    at_least = counts[::-1].cumsum()[::-1]  # rows whose first bits are these or higher
    if at_least[0] < count:
        raise ValueError(f"{at_least[0]:,} rows may be chosen, not {count:,}")
    last = int(np.flatnonzero(at_least >= count)[-1])
    same_bits = [ranks[allowed & ((ranks >> shift).astype(np.int64) == last)] for allowed, ranks in parts()]
    found, wanted = np.sort(np.concatenate(same_bits)), count - int(at_least[last] - counts[last])
    least = found[-wanted]
    equal = wanted - int((found > least).sum())
    for allowed, ranks in parts():
        chosen = allowed & (ranks > least)
        first = np.flatnonzero(allowed & (ranks == least))[:equal]
        chosen[first] = True
        equal -= len(first)
        yield chosen
