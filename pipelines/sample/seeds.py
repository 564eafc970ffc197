"""Seeds: which images are sampled, and which class each one has, without a Python object per seed."""

import io
import itertools
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.generate import class_number
from patchloom.platform.dataset.label_files import opened_here, read_labels
from patchloom.platform.dataset.labels import Labels, plain_number
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import existing_file, whole_number

SEED_COLUMNS = ("seed", "key")
SEEDS_IN_ERROR = 5
MOST_SEED = 2**63 - 1
MOST_FOLDER_SEEDS = 1_000_000_000  # in a folder


class Seeds:
    """Different seeds in ascending order, as ranges: 16 bytes for each range of consecutive seeds.

    Args:
        firsts: the first seed of each range. Ranges may be in any order, and may overlap.
        lasts: the last seed of each range.

    Example:
        seeds = Seeds([0, 70], [63, 70])
        assert len(seeds) == 65
    """

    def __init__(self, firsts: Sequence[int] | np.ndarray = (), lasts: Sequence[int] | np.ndarray = ()) -> None:
        low, high = np.asarray(firsts, np.int64), np.asarray(lasts, np.int64)
        order = np.argsort(low, kind="stable")
        low, high = low[order], np.maximum.accumulate(high[order])
        begins = np.ones(len(low), bool)
        begins[1:] = low[1:] - 1 > high[:-1]  # the first seed after a gap
        self.firsts, self.lasts = low[begins], high[np.roll(begins, -1)]
        self._before = np.concatenate([[0], np.cumsum(self.lasts - self.firsts + 1)])

    def __len__(self) -> int:
        return int(self._before[-1])

    def __iter__(self) -> Iterator[int]:
        for first, last in self.ranges():
            yield from range(first, last + 1)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The first and the last seed of each range."""
        return zip(self.firsts.tolist(), self.lasts.tolist(), strict=True)

    def numbers(self) -> np.ndarray:
        """(n,) int64, all seeds."""
        lengths = np.diff(self._before)
        return np.repeat(self.firsts - self._before[:-1], lengths) + np.arange(len(self))

    def positions(self, seeds: np.ndarray) -> np.ndarray:
        """The position of each of these seeds among all; -1 where it is not there.

        Args:
            seeds: (n,) int64, in any order.

        Returns:
            (n,) int64.
        """
        if not len(self.firsts):
            return np.full(len(seeds), -1)
        at = np.maximum(np.searchsorted(self.firsts, seeds, side="right") - 1, 0)
        inside = (seeds >= self.firsts[at]) & (seeds <= self.lasts[at])
        return np.where(inside, self._before[at] + (seeds - self.firsts[at]), -1)

    def without(self, other: "Seeds") -> "Seeds":
        """The seeds that are not among others."""
        firsts, lasts, removed = array("q"), array("q"), other.ranges()
        gap = next(removed, None)
        for first, last in self.ranges():
            while gap is not None and gap[0] <= last:
                if gap[1] >= first:
                    if gap[0] > first:
                        firsts.append(first)
                        lasts.append(gap[0] - 1)
                    first = gap[1] + 1
                if gap[1] > last:  # it may remove seeds of the next range too
                    break
                gap = next(removed, None)
            if first <= last:
                firsts.append(first)
                lasts.append(last)
        return Seeds(firsts, lasts)

    def in_parts(self, size: int) -> "Iterator[Seeds]":
        """Consecutive parts of so many seeds; the last one may have fewer."""
        for start in range(0, len(self), size):
            yield self._between(start, min(start + size, len(self)))

    def by_archive(self, size: int) -> "Iterator[tuple[int, Seeds]]":
        """The seeds of each archive: its number, seed // size, and those of its seeds that are here."""
        start = 0
        while start < len(self):
            number = self._at(start) // size
            limit = min((number + 1) * size - 1, MOST_SEED)
            at = int(np.searchsorted(self.firsts, limit, side="right")) - 1
            stop = int(self._before[at]) + min(limit, int(self.lasts[at])) - int(self.firsts[at]) + 1
            yield number, self._between(start, stop)
            start = stop

    def _at(self, position: int) -> int:
        """The seed at a position."""
        at = int(np.searchsorted(self._before, position, side="right")) - 1
        return int(self.firsts[at]) + position - int(self._before[at])

    def _between(self, start: int, stop: int) -> "Seeds":
        """The seeds from one position to another, of which there is at least one."""
        first, last = self._at(start), self._at(stop - 1)
        low, high = np.searchsorted(self.lasts, first), np.searchsorted(self.firsts, last, side="right")
        return Seeds(self.firsts[low:high].clip(first), self.lasts[low:high].clip(max=last))


class SeedList:
    """Seeds that are found one by one in ascending order."""

    def __init__(self) -> None:
        self._firsts, self._lasts = array("q"), array("q")

    def add(self, seed: int) -> None:
        """Add a seed, which is larger than all before."""
        if self._lasts and self._lasts[-1] + 1 == seed:
            self._lasts[-1] = seed
        else:
            self._firsts.append(seed)
            self._lasts.append(seed)

    def seeds(self) -> Seeds:
        """All that were added."""
        return Seeds(self._firsts, self._lasts)


def parse_seeds(text: str) -> Seeds:
    """`0-63`, `0,5,9`, a mix of both, or a file with one seed per line."""
    path, shown = existing_file(text), text if len(text) <= 80 else f"{text[:77]}..."
    firsts, lasts = array("q"), array("q")
    with path.open(errors="replace") if path else io.StringIO() as file:
        parts = itertools.chain.from_iterable(map(str.split, file)) if path else text.split(",")
        for part in parts:
            first, dash, last = part.strip().partition("-")
            low, high = whole_number(first), whole_number(last if dash else first)
            if low is None or high is None:
                raise UserError(f"--seeds {shown}: {part[:80]!r} is not a seed; write 0-63, 0,5,9 or a file of seeds")
            if max(low, high) > MOST_SEED:
                raise UserError(f"--seeds {shown}: {str(max(low, high))[:80]} is too large; seeds are below 2^63")
            if low <= high:
                firsts.append(low)
                lasts.append(high)
    if not firsts:
        raise UserError(f"--seeds {shown}: contains no seed; write 0-63, 0,5,9 or a file of seeds")
    return _bounded_seeds(firsts, lasts, f"--seeds {shown}")


def _bounded_seeds(firsts: Sequence[int], lasts: Sequence[int], where: str) -> Seeds:
    widest = max(last - first for first, last in zip(firsts, lasts, strict=True))  # before sums of 64 bits overflow
    seeds = Seeds(firsts, lasts) if widest < MOST_FOLDER_SEEDS and len(firsts) < MOST_FOLDER_SEEDS else None
    if seeds is None or len(seeds) > MOST_FOLDER_SEEDS:
        raise UserError(f"{where}: these are more than {MOST_FOLDER_SEEDS:,} seeds; sample them in several folders")
    return seeds


def listed_seeds(seeds: Iterable[int]) -> Seeds:
    """Seeds that a program gives; raises UserError for what is not a whole number, negative or too large."""
    try:
        found = np.fromiter(map(operator.index, itertools.islice(seeds, MOST_FOLDER_SEEDS + 1)), np.int64)
    except OverflowError:
        raise UserError("seeds: a number is too large; seeds are below 2^63") from None
    except TypeError as error:  # 1.5 is not seed 1
        raise UserError(f"seeds: one is not a whole number ({error})") from None
    if len(found) > MOST_FOLDER_SEEDS:
        raise UserError(f"seeds: these are more than {MOST_FOLDER_SEEDS:,} seeds; sample them in several folders")
    if len(found) and found.min() < 0:
        raise UserError(f"seeds: {found.min()} is negative; seeds are numbers from 0")
    return Seeds(found, found)


@dataclass(frozen=True)
class SeedClasses:
    """The class number of each seed, -1 for none.

    Args:
        in_turn: the classes that take turns, by seed; empty for none.
        seeds: the seeds whose classes are in a file; None if classes take turns.
        numbers: (n,) int32, the classes of these seeds.
    """

    in_turn: tuple[int, ...] = ()
    seeds: Seeds | None = None
    numbers: np.ndarray | None = None

    def of(self, seeds: np.ndarray) -> np.ndarray:
        """The classes of (n,) int64 seeds. Of a file, only seeds that it has may be given."""
        numbers = np.array(self.in_turn or (-1,)) if self.numbers is None else self.numbers
        at = seeds % len(numbers) if self.seeds is None else self.seeds.positions(seeds)
        return np.asarray(numbers[at])

    def within(self, seeds: Seeds) -> "SeedClasses":
        """Only what these seeds need, to be sent to a worker."""
        return self if self.seeds is None else replace(self, seeds=seeds, numbers=self.of(seeds.numbers()))


def choose_labels(
    seeds: Seeds, card: ModelCard, label: str | int | None, labels: str | None
) -> tuple[SeedClasses, str, int | None]:
    """Choose the class of every seed.

    Args:
        seeds: the seeds.
        card: the card of the model.
        label: one class for all seeds, by name or number.
        labels: a file with the class of each seed. Without `label` and `labels`, all classes that have training images
            take turns.

    Returns:
        The class number of every seed, and the `labels` and `label` of `sampling.json`.

    Raises:
        UserError: the model does not know a class, or a seed has none in the file.
    """
    if label is not None and labels is not None:
        raise UserError(f"--label {label} and --labels {labels} exclude each other: give one of them")
    if labels is not None:
        return _labels_of_file(seeds, card.class_names, labels), "file", None
    if label is not None:
        number = _class_number(label, card.class_names, f"--label {label}")
        return SeedClasses((number,)), "fixed", number
    return SeedClasses(tuple(card.sampled_classes)), "balanced", None


def _labels_of_file(seeds: Seeds, class_names: Sequence[str], address: str) -> SeedClasses:
    """The classes in a table with columns `seed` and `label`, or in a `.txt` whose first line is seed 0.

    A column of plain numbers is class numbers, also if classes are named by numbers; other text is class names. A seed
    needs 12 bytes of memory, and so does a line of the file.
    """
    found = _labels_of_lines(address) if address.endswith(".txt") else read_labels(address, SEED_COLUMNS)
    codes: dict[int | str | None, int] = {}
    keys, values = array("q"), array("i")
    for key, one in found.pairs():
        number = plain_number(key)
        if number is not None and 0 <= number <= MOST_SEED:
            keys.append(number)
            values.append(codes.setdefault(one, len(codes)))
    known, position, chosen = list(codes), seeds.positions(np.asarray(keys)), np.asarray(values)
    wanted, chosen = position[position >= 0], chosen[position >= 0]
    coded = np.full(len(seeds), -1, np.int32)
    coded[wanted[::-1]] = chosen[::-1]  # the first of several labels
    other = np.flatnonzero(coded[wanted] != chosen)
    if len(other):
        at = int(other[0])
        one, two = known[coded[wanted[at]]], known[chosen[at]]
        raise found.conflict(str(seeds.numbers()[wanted[at]]), one, two)
    missing = np.flatnonzero(coded < 0)
    if len(missing):
        first = seeds.numbers()[missing[:SEEDS_IN_ERROR]].tolist()
        named = ", ".join(map(str, first)) + (", ..." if len(missing) > SEEDS_IN_ERROR else "")
        raise UserError(f"--labels {address}: {len(missing)} of the seeds have no label ({named}): add them")
    numbers = np.zeros(len(known), np.int32)
    for code in np.unique(coded).tolist():
        numbers[code] = _class_number(known[code], class_names, f"--labels {address}: {known[code]}")
    return SeedClasses(seeds=seeds, numbers=numbers[coded])


def _labels_of_lines(address: str) -> Labels:
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--labels {address}: there is no such file")
    with io.TextIOWrapper(opened_here(folder, name), "utf-8") as lines:
        return Labels(address, ((str(seed), line.strip()) for seed, line in enumerate(lines)))


def _class_number(label: int | str | None, class_names: Sequence[str], option: str) -> int:
    try:
        return class_number(label, class_names)
    except ValueError as error:
        raise UserError(f"{option} {error}") from None
