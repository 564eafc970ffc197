"""Splits: which inputs of a source are for training and which for testing, by the names of their folders."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from patchloom.errors import UserError, did_you_mean

ALL_SPLITS = "all"
SPLIT_CHOICES = ("train", "test", "val", ALL_SPLITS)  # the values of --split
SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?|data_batch)|(?P<test>test(?:ing|_batch)?|t10k)|(?P<val>val(?:id(?:ation)?)?))"
    r"(?:[-_]?[0-9]+)?",
    re.IGNORECASE,
)


def split_named(name: str) -> str | None:
    """The split that a name means: `test` for `testing`, `test_batch` or `t10k`. None if it is not one of a split."""
    found = SPLIT_NAME.fullmatch(name)
    return found.lastgroup if found else None


def check_split(wanted: str | None) -> None:
    """Raise UserError if --split is unknown."""
    if wanted is not None and wanted not in SPLIT_CHOICES:
        close = did_you_mean(wanted, SPLIT_CHOICES)
        raise UserError(f"--split {wanted} is unknown{close}: choose one of {', '.join(SPLIT_CHOICES)}")


@dataclass(frozen=True)
class Splits:
    """The splits of a source.

    Args:
        names: the split of each folder of the keys at `level`, None if it is of none.
        level: the place of the folder in a key, 0 for the first one and -1 for the last one.
        default: the split to read if none is chosen, where the source has it; else all are read.
    """

    names: Mapping[str, str | None]
    level: int = -1
    default: str = ALL_SPLITS

    @property
    def known(self) -> list[str]:
        """The splits that the source has."""
        return [split for split in SPLIT_CHOICES if split in self.names.values()]

    def of(self, key: str) -> str | None:
        """The split of the input with this key, or None."""
        folders = key.split("/")[:-1]
        return self.names.get(folders[self.level]) if len(folders) > max(self.level, 0) else None

    def choose(self, wanted: str | None, source: str) -> str:
        """The split to read.

        Args:
            wanted: one of `SPLIT_CHOICES`; None: the default.
            source: the name of the source, for messages.

        Raises:
            UserError: the source does not have the split.
        """
        if wanted is None:
            return self.default if self.default in self.known else ALL_SPLITS
        if not self.known:
            raise UserError(f"--split {wanted}: {source} has no splits such as train and test; leave the option out")
        if wanted not in (*self.known, ALL_SPLITS):
            raise UserError(f"--split {wanted}: {source} has the splits {', '.join(self.known)}; choose one, or all")
        return wanted

    def note(self, chosen: str, left_out: Counter[str | None]) -> str:
        """What is read, and how many inputs of which other splits are not, in one line; empty if there is one split."""
        if chosen == ALL_SPLITS:
            several = len(self.known) > 1
            return f"splits: {', '.join(self.known)}; all are read (or --split {self.known[0]})" if several else ""
        others = [f"{count:,} images of {split or 'no split'}" for split, count in left_out.most_common()]
        return f"split: {chosen}" + (f"; {', '.join(others)} are left out (or --split all)" if others else "")
