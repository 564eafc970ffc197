"""Listed: the inputs of a source as the listers of its formats give them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from patchloom.platform.dataset.labels import Label, Labels
from patchloom.platform.dataset.readers import Place
from patchloom.platform.dataset.splits import Splits


@dataclass(slots=True)
class ListedInput:
    """An input with its label as the source gives it: a number, a name, or None."""

    key: str
    place: Place
    size_bytes: int
    label: Label = None
    error: str | None = None  # why it cannot be read

    def row(self) -> tuple[Any, ...]:
        """Its values, for a spool."""
        return self.key, self.place, self.size_bytes, self.label, self.error


@dataclass
class Listing:
    """What a source contains. The other fields are complete when all inputs have been taken.

    Args:
        inputs: its images, in its order, listed while they are taken.
        labels: the labels that one file of the source gives for all inputs.
        has_folders: keys are paths, and one of their folders can be the class.
        unmatched: number of labels next to images that are not there.
        others: number of files that are not images, by ending.
        splits: the splits of a known dataset; None: folders can be splits.
    """

    inputs: Iterator[ListedInput] = field(default_factory=lambda: iter(()))
    labels: Labels | None = None
    has_folders: bool = False
    unmatched: int = 0
    others: Counter[str] = field(default_factory=Counter)
    splits: Splits | None = None


def readable_input(one: ListedInput) -> ListedInput:
    """The input with a key that can be written. Names that are not UTF-8 cannot be read on every machine."""
    try:
        one.key.encode()
    except UnicodeEncodeError:
        key = one.key.encode(errors="surrogateescape").decode(errors="backslashreplace")
        return ListedInput(key, [key], one.size_bytes, error="its file name is not UTF-8: rename the file")
    return one
