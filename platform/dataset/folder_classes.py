"""Folder classes: which folder of the path of an image is its class.

A folder that contains everything is no class, because the archives of datasets have one. Neither are the folders of
splits (train, test), nor those that only keep the number of files in a folder small (00000, 00001, ...).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from patchloom.errors import UserError, did_you_mean
from patchloom.platform.dataset.labels import MOST_CLASSES
from patchloom.platform.dataset.splits import Splits, split_named

CLASS_FOLDERS = ("first", "last", "none")  # the values of --classes
STORAGE_FOLDER = re.compile(r"[0-9]{5,}")  # classes with numbers for names, such as 0 to 9 or 000 to 999, are shorter
MOST_LEVELS = 8  # of folders in folders, where a class is looked for
SHOWN_FOLDERS = 3


@dataclass(frozen=True)
class FolderChoice:
    """Which folder of a path is the class.

    Args:
        level: its place in the path, 0 for the first one and -1 for the last one; None: no folder is a class.
        names: the names of the classes, in any order.
        note: what was chosen and what else could be meant, in one line; empty if there are no folders.
    """

    level: int | None = None
    names: Iterable[str] = ()
    note: str = ""

    def class_of(self, key: str) -> str | None:
        """The class of the input with this key, or None."""
        if self.level is None:
            return None
        folders = key.split("/")[:-1]
        return folders[self.level] if len(folders) > max(self.level, 0) else None


@dataclass
class FolderNames:
    """The different names of the folders that inputs are in. Their number is bounded.

    Args:
        levels: the names of the first folders of paths, then those of the second folders, and so on.
        last: the names of the folders that directly contain inputs.
    """

    levels: list[dict[str, None]] = field(default_factory=list)
    last: dict[str, None] = field(default_factory=dict)
    _parent: str = ""

    def take(self, key: str) -> None:
        """Add the folders of an input."""
        parent = key.rpartition("/")[0]
        if parent == self._parent:  # as of most inputs, the folder of the one before
            return
        self._parent = parent
        folders = parent.split("/")
        while len(self.levels) < min(len(folders), MOST_LEVELS):
            self.levels.append({})
        for names, name in [*zip(self.levels, folders, strict=False), (self.last, folders[-1])]:
            if len(names) <= MOST_CLASSES:  # one more than that is refused as classes
                names[name] = None

    def splits(self) -> Splits:
        """The splits that all folders of the first level are named for, or of one below a folder around everything."""
        for level, names in enumerate(self.levels):
            if all(map(split_named, names)):
                return Splits({name: split_named(name) for name in names}, level)
            if len(names) > 1:
                break
        return Splits({})

    def choose(self, wanted: str | None) -> FolderChoice:
        """Which folder is the class.

        Args:
            wanted: one of `CLASS_FOLDERS`; None: the first one that is not a folder around everything, a split, or
                storage.

        Raises:
            UserError: no input is in a folder, and one is wanted.
        """
        if wanted == "none" or not (self.levels or wanted):
            return FolderChoice(note=f"classes: none, as --classes {wanted} says" if wanted else "")
        if wanted is not None:
            if not self.levels:
                raise UserError(f"--classes {wanted}: no image is in a folder; leave the option out")
            level, names = (0, self.levels[0]) if wanted == "first" else (-1, self.last)
            return FolderChoice(level, names, f"classes: {_counted(names)}, as --classes {wanted} says")
        passed = list[str]()
        for level, names in enumerate(self.levels):
            if len(names) == 1:
                passed.append(f"{_listed(names)} is the only folder")
            elif all(map(split_named, names)):
                passed.append(f"{_listed(names)} are splits")
            elif all(STORAGE_FOLDER.fullmatch(name) for name in names):
                passed.append(f"{_listed(names)} are numbered for storage")
                break
            else:
                return FolderChoice(level, names, self._note(_counted(names), passed, level))
        return FolderChoice(note=self._note("none", passed, None))

    def _note(self, chosen: str, passed: list[str], level: int | None) -> str:
        """What was chosen, the folders around it, and what --classes would take."""
        others = [] if level == 0 else [f"or --classes first: {_counted(self.levels[0])}"]
        if self.last != (self.levels[0] if level is None else self.levels[level]):
            others.append(f"or --classes last: {_counted(self.last)}")
        return "; ".join([f"classes: {chosen}", *passed, *others])


def _counted(names: Iterable[str]) -> str:
    """`3 (cat, dog, wild)`."""
    names = list(names)
    return f"{len(names):,} ({_listed(names)})"


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN_FOLDERS]) + (", ..." if len(names) > SHOWN_FOLDERS else "")


def check_class_folder(wanted: str | None, labels: str | None) -> None:
    """Raise UserError if --classes is unknown, or if there are labels too."""
    if wanted is not None and wanted not in CLASS_FOLDERS:
        close = did_you_mean(wanted, CLASS_FOLDERS)
        raise UserError(f"--classes {wanted} is unknown{close}: choose one of {', '.join(CLASS_FOLDERS)}")
    if wanted is not None and labels is not None:
        raise UserError(f"--classes {wanted} and --labels {labels} both say what the classes are: give one of them")
