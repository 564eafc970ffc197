"""Labels: the class of each input as a number or a name, and the numbers of the classes.

All sources and label files follow the same rules. An integer is a class number, and a text is a class name. A whole
float is an integer, because pandas stores integers with gaps as floats. None, NaN and an empty text mean no class. A
column of text is read as numbers if every value in it is written as a plain number.
"""

import itertools
import math
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.files.spool import RowSpool, sorted_rows

MOST_CLASSES = 100_000
LONGEST_NAME = 1000  # of a class, in characters
MISSING_TEXTS = ("", "nan", "NaN")  # in a column of numbers that was written as text

Label = int | str | None


class Labels:
    """Keys with their class as a number or name, kept in a temporary file, and the names of the classes if known.

    Args:
        name: the file that they are from, for messages.
        pairs: each key with its label as the file has it.
        class_names: the names of the classes, if the file has them.

    Raises:
        UserError: a label is of no known type.
    """

    def __init__(self, name: str, pairs: Iterable[tuple[str, Any]] = (), class_names: list[str] | None = None) -> None:
        self.name, self.class_names, self._rows = name, class_names, RowSpool()
        different: dict[Label, None] = {}
        for key, value in pairs:
            label = label_of(value, f"{key} in {name}")
            different[label] = None
            self._rows.append((key, label))
        columns = column_of_labels(different, self.class_names)
        self._read_as = dict(zip(different, columns, strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def pairs(self) -> Iterator[tuple[str, Label]]:
        """Each key with its label. A key may be there more than once."""
        return ((key, self._read_as[label]) for key, label in self._rows)

    def conflict(self, key: str, one: Label, other: Label) -> UserError:
        """The error of a key with two different labels."""
        return UserError(f"{self.name} has two labels for {key}, {one!r} and {other!r}: remove one of the rows")

    def matched(self, keys: Iterable[str]) -> "LabelMatches":
        """Find the labels of keys, also of those that are spelled in another way, by sorting all keys on disk.

        Raises:
            UserError: a key has two different labels.
        """
        members = itertools.chain(
            ((plain_key(key), False, number, key, label) for number, (key, label) in enumerate(self.pairs())),
            ((plain_key(key), True, position, key, None) for position, key in enumerate(keys)),
        )
        found, problems = LabelMatches(), dict[int, UserError]()
        groups = itertools.groupby(sorted_rows(members), key=itemgetter(0))
        found.rows = sorted_rows(row for _, group in groups for row in self._group(group, found, problems))
        if problems:
            raise problems[min(problems)]
        return found

    def _group(
        self, group: Iterable[tuple[Any, ...]], found: "LabelMatches", problems: dict[int, UserError]
    ) -> Iterator[tuple[int, Label]]:
        """The position and label of each key of one plain form, of which labels come first."""
        labels, used = dict[str, Label](), set[str]()
        for _, is_wanted, number, key, label in group:
            if not is_wanted:
                if labels.setdefault(key, label) != label:
                    problems[number] = self.conflict(key, labels[key], label)
            elif labels:
                known = key if key in labels else next(iter(labels))
                used.add(known)
                yield number, labels[known]
        found.unused += len(labels) - len(used)


@dataclass
class LabelMatches:
    """The positions of keys that have a label, in ascending order, with the label; and the number of unused labels."""

    rows: Iterator[tuple[Any, ...]] = field(default_factory=lambda: iter(()))
    unused: int = 0


def plain_key(key: str) -> str:
    """A key without differences that users do not see: `./`, backslashes, and the form of Unicode (NFC)."""
    return unicodedata.normalize("NFC", key.replace("\\", "/")).removeprefix("./")


def label_of(value: Any, where: str) -> Label:
    """A label from a value with a type: of JSON, a table, an array or a dictionary of rows.

    Args:
        value: an integer, a whole float, a text, bytes, a one-hot vector, or None or NaN for no class.
        where: what has this label, for the error message.

    Raises:
        UserError: the value is something else.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    if isinstance(value, (list, tuple)):
        value = _one_hot(value, where)
    if value is None or value == "":
        return None
    if isinstance(value, (int, str)) and not _is_too_long(value):
        return int(value) if isinstance(value, bool) else value
    shown = repr(value)[:80] if not isinstance(value, int) else "an integer"
    raise UserError(f"the label of {where} is {shown} ({type(value).__name__}): give a whole number or a name")


def _is_too_long(label: int | str) -> bool:
    """Whether a label cannot be a class: a long text, or a number of more than 64 bits."""
    return len(label) > LONGEST_NAME if isinstance(label, str) else not -(2**63) <= label < 2**63


def _one_hot(values: Sequence[Any], where: str) -> int:
    if len(values) > 1 and all(value in (0, 1) for value in values) and sum(values) == 1:
        return values.index(1)
    shown = f"{list(values[:8])!r}{' ...' if len(values) > 8 else ''}"
    raise UserError(
        f"the label of {where} is the vector {shown}, which is not one-hot: give one whole number or name per image"
    )


def column_of_labels(values: Iterable[Label], class_names: list[str] | None = None) -> list[Label]:
    """Read a column of text as numbers if every value is written as a plain number.

    Other columns stay as they are, and so do texts that are all names of given classes.
    """
    found = list(values)
    texts = {value for value in found if isinstance(value, str) and value not in MISSING_TEXTS}
    if not texts or texts <= set(class_names or ()) or any(isinstance(value, int) for value in found):
        return found
    for number in (plain_number, _whole_float):
        if all(number(text) is not None for text in texts):
            return [None if value in MISSING_TEXTS or value is None else number(str(value)) for value in found]
    return found


def plain_number(text: str) -> int | None:
    """The number that a text is, if it is written in the plain way: `7`, and not `07`, `+7`, `7.0` or `²`."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        return None
    return int(text) if str(int(text)) == text else None


def _whole_float(text: str) -> int | None:
    """The number of `7.0`, as pandas writes a column of integers that has gaps."""
    return plain_number(text.removesuffix(".0")) if text.endswith(".0") else plain_number(text)


def number_classes(labels: Sequence[Label], class_names: list[str] | None) -> tuple[list[str], list[int]]:
    """Number the classes of a source.

    Labels that are numbers are the numbers of the classes; there may be classes without inputs, so that parts of a
    dataset have the same numbers. Names are sorted and numbered.

    Args:
        labels: the label of each input.
        class_names: the names of the classes, if the source has them.

    Returns:
        The class names, and the class number of each input, -1 for none.

    Raises:
        UserError: a label is not one of the named classes, labels are both numbers and names, or there are more than
            100,000 classes.
    """
    if class_names is not None:
        return class_names, _among(labels, class_names)
    numbers = {label for label in labels if isinstance(label, int)}
    names = sorted({label for label in labels if isinstance(label, str)})
    if names and numbers - {-1}:
        found = f"{min(numbers - {-1})} and {names[0]!r}"
        raise UserError(f"the labels are both numbers and names, such as {found}: use one or the other")
    if numbers and min(numbers) < -1:
        raise UserError(f"the label {min(numbers)} is negative: number classes from 0, -1 for none")
    if max(len(names), max(numbers, default=-1) + 1) > MOST_CLASSES:
        found = f"the label {max(numbers)}" if numbers - {-1} else f"{len(names):,} different labels"
        raise UserError(f"{found} would make more than {MOST_CLASSES:,} classes: number classes from 0")
    known = names or [str(number) for number in range(max(numbers, default=-1) + 1)]
    positions = {name: number for number, name in enumerate(names)}
    return known, [positions[label] if isinstance(label, str) else _number(label) for label in labels]


def _among(labels: Sequence[Label], class_names: list[str]) -> list[int]:
    """The numbers of labels among named classes."""
    positions = {name: number for number, name in enumerate(class_names)}
    found = []
    for label in labels:
        number = positions.get(label, -2) if isinstance(label, str) else _number(label)
        if not -1 <= number < len(class_names):
            raise UserError(f"the label {label!r} is not one of the {len(class_names)} classes: fix the labels")
        found.append(number)
    return found


def _number(label: int | None) -> int:
    return -1 if label is None else label


def first_of(wanted: tuple[str, ...], names: Collection[Any]) -> str | None:
    """The first of the wanted names that is in `names`, or None."""
    return next((name for name in wanted if name in names), None)
