"""Sources of conditions: what `prepare` finds in a second source, and which input each condition belongs to."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.dataset.image_names import IMAGE_EXTENSIONS, is_hidden
from patchloom.platform.dataset.labels import plain_key
from patchloom.platform.dataset.listing import LISTERS
from patchloom.platform.dataset.readers import Place, SourceReader, zip_images
from patchloom.platform.dataset.sources import kind_of_source
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool, sorted_rows

ARRAY_ENDING = ".npy"
CONDITION_ENDINGS = (*IMAGE_EXTENSIONS, ARRAY_ENDING)
NO_CONDITION = "has no condition"


class ConditionSource:
    """The conditions in a source: images and, in folders and zip archives, `.npy` arrays.

    Args:
        address: a source as for `open_source`.
        option: the option that names it, for messages.

    Raises:
        UserError: the source does not exist, is damaged or contains no condition.
    """

    def __init__(self, address: str, option: str = "--condition") -> None:
        self.kind, folder, names = kind_of_source(address)
        self.address, self.name = folder.address, str(Folder.at(address))
        self._rows = RowSpool.of(_listed(self.kind, folder, names))
        if not self._rows:
            raise UserError(f"{option} {self.name} contains no images or .npy arrays: give a condition for each image")

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Iterator[tuple[str, Place, int, str | None]]:
        """The key, place, size in bytes (-1: unknown) and a known error of each condition."""
        return ((key, place, size_bytes, error) for key, place, size_bytes, error in self._rows)

    def reader(self) -> SourceReader:
        """Reads the conditions by their places."""
        return SourceReader(self.kind, self.address)

    def matched(self, keys: Iterable[str]) -> "ConditionMatches":
        """Find the condition of each key, by sorting all keys on disk.

        Keys belong together if they differ only in the ending of a file, or as in files of labels. Of several
        conditions, the one with the same key counts.
        """
        conditions = (
            (condition_key(key), 0, number, key, place, size_bytes, error)
            for number, (key, place, size_bytes, error) in enumerate(self.rows())
        )
        wanted = ((condition_key(key), 1, position, key) for position, key in enumerate(keys))
        found = ConditionMatches()
        groups = itertools.groupby(sorted_rows(itertools.chain(conditions, wanted)), key=itemgetter(0))
        found.rows = sorted_rows(row for _, group in groups for row in found.of_group(group))
        return found


@dataclass
class ConditionMatches:
    """What belongs to each key, in the order of the keys.

    Args:
        rows: (position, place or None, size in bytes, error or None).
        unused: number of conditions that belong to no key.
    """

    rows: Iterator[tuple[Any, ...]] = field(default_factory=lambda: iter(()))
    unused: int = 0

    def of_group(self, group: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """The rows of the keys of one group, in which conditions come first."""
        known, used = list[tuple[Any, ...]](), set[str]()
        for row in group:
            if row[1] == 0:
                known.append(row[3:])
                continue
            position, key = row[2:]
            same = [one for one in known if plain_key(one[0]) == plain_key(key)]
            chosen = same or known
            if len(chosen) == 1:
                name, place, size_bytes, error = chosen[0]
                used.add(name)
                yield position, place, size_bytes, error and f"its condition: {error}"
            else:
                several = " and ".join(name for name, *_ in chosen[:2])
                yield position, None, -1, f"has several conditions: {several}" if several else NO_CONDITION
        self.unused += len({one[0] for one in known} - used)


def condition_key(key: str) -> str:
    """The key of an image or its condition, without the ending of the file."""
    ending = next((ending for ending in CONDITION_ENDINGS if key.lower().endswith(ending)), "")
    return plain_key(key[: len(key) - len(ending)])


def _listed(kind: str, folder: Folder, names: dict[str, int]) -> Iterator[tuple[str, Place, int, str | None]]:
    """The rows of a source of conditions, in any order."""
    files: Iterable[tuple[str, Place, int]]
    if kind == "files":
        files = ((name, [name], size) for name, size in folder.walk(follow_links=True))
    elif kind == "zip":
        (archive,) = names
        files = zip_images(folder, archive)
    else:
        yield from ((one.key, one.place, one.size_bytes, one.error) for one in LISTERS[kind](folder, names).inputs)
        return
    for key, place, size in files:
        if key.lower().endswith(CONDITION_ENDINGS) and not is_hidden(key):
            yield key, place, size, None
