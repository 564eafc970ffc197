"""Labels: which class an input belongs to, from what lies beside the images, and the numbers of the classes."""

import csv
import io
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder

LABEL_COLUMNS = ("label", "labels", "class", "category", "cls", "fine_label")
NAME_COLUMNS = ("key", "file_name", "filename", "file", "path", "image", "name")
TABLE_NAMES = tuple(f"{stem}.{ending}" for stem in ("labels", "metadata") for ending in ("csv", "jsonl", "parquet"))


@dataclass(frozen=True)
class Labels:
    """The class of each key, as a number or a name, and the classes' names where the source tells them."""

    of: dict[str, int | str | None]
    class_names: list[str] | None = None


def find_labels(names: Collection[str], read: Callable[[str], bytes]) -> Labels | None:
    """The labels that lie in the root of a source under a usual name, or None.

    `dataset.json` as EDM writes it; else `labels` or `metadata` as .csv, .jsonl or .parquet.
    """
    if "dataset.json" in names:
        return parse_labels("dataset.json", read("dataset.json"))
    found = first_of(TABLE_NAMES, names)
    return parse_labels(found, read(found)) if found else None


def read_labels(address: str, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels:
    """The labels in a file of the user's; raises UserError where it holds none. keys: columns that may name the key."""
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--labels {address} does not exist: give a .csv, .jsonl, .parquet or EDM's dataset.json")
    labels = parse_labels(name, folder.read(name), keys)
    if labels is None:
        raise UserError(f"--labels {address} holds no labels: EDM's dataset.json has a list `labels`")
    return labels


def parse_labels(name: str, content: bytes, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels | None:
    """The labels in a file's bytes, told by the ending of its name; None for a JSON file without any."""
    try:
        if name.endswith(".json"):
            return _edm_labels(json.loads(content))
        return _table_labels(name, _rows(name, content), keys)
    except (ValueError, KeyError, TypeError, csv.Error, pyarrow.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{name} cannot be read as labels ({problem}): mend it, or move it away") from None


def _edm_labels(value: Any) -> Labels | None:
    """`{"labels": [[name, class], ...]}` or `{"labels": {name: class}}`, perhaps with `classes`, their names."""
    if not isinstance(value, dict) or not value.get("labels"):
        return None
    pairs = value["labels"].items() if isinstance(value["labels"], dict) else value["labels"]
    names = value.get("classes")
    return Labels({str(key): label for key, label in pairs}, [str(name) for name in names] if names else None)


def _rows(name: str, content: bytes) -> list[dict[str, Any]]:
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    if name.endswith(".parquet"):
        return list(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist())
    raise UserError(f"{name} is no file of labels known here: give .csv, .jsonl, .parquet or EDM's dataset.json")


def _table_labels(name: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Labels | None:
    if not rows:
        return None
    key, label = first_of(keys, rows[0]), first_of(LABEL_COLUMNS, rows[0])
    if key is None or label is None:
        raise UserError(
            f"{name} has the columns {', '.join(map(str, rows[0]))}, and a {keys[0]} and a label were wanted: "
            f"name them `{keys[0]}` and `label`"
        )
    return Labels({str(row[key]): _number_or_name(row[label]) for row in rows})


def _number_or_name(value: Any) -> int | str | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) or not str(value).lstrip("-").isdigit():
        return value if isinstance(value, (int, str)) else str(value)
    return int(value)  # CSV knows no numbers


def number_classes(
    labels: list[int | str | None], class_names: list[str] | None
) -> tuple[list[str], Callable[[int | str | None], int]]:
    """The classes' names and the number of a label: -1 for none.

    Numbers are classes already; names are sorted and numbered. Raises UserError for a number without a name
    where the source names its classes, and for a mixture of numbers and names.
    """
    told = {label for label in labels if label is not None and label != -1}
    if class_names is not None:
        by_name = {name: number for number, name in enumerate(class_names)}
        beyond = [label for label in told if label not in by_name and not _is_within(label, len(class_names))]
        if beyond:
            raise UserError(f"the label {beyond[0]!r} is none of the {len(class_names)} classes: mend the labels")
        return class_names, lambda label: -1 if label is None else by_name.get(str(label), _as_number(label))
    if all(isinstance(label, int) for label in told):
        if any(int(label) < -1 for label in told):
            raise UserError(f"the label {min(told, key=int)} is negative: number classes from 0, -1 for none")
        names = [str(number) for number in range(max((int(label) for label in told), default=-1) + 1)]
        return names, _as_number
    if any(isinstance(label, int) for label in told):
        raise UserError("the labels are a mixture of numbers and names: use either")
    names = sorted(str(label) for label in told)
    numbers = {name: number for number, name in enumerate(names)}
    return names, lambda label: -1 if label is None else numbers[str(label)]


def _is_within(label: int | str, classes: int) -> bool:
    return isinstance(label, int) and -1 <= label < classes


def _as_number(label: int | str | None) -> int:
    return -1 if label is None else int(label)


def first_of(wanted: tuple[str, ...], there: Collection[Any]) -> str | None:
    """The first of these names that is there."""
    return next((name for name in wanted if name in there), None)
