"""Labels: the class of each input, from a file in the source or a separate file, and the numbers of the classes."""

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder

LABEL_COLUMNS = ("label", "labels", "class", "category", "cls", "fine_label")
NAME_COLUMNS = ("key", "file_name", "filename", "file", "path", "image", "name")
TABLE_NAMES = tuple(f"{stem}.{ending}" for stem in ("labels", "metadata") for ending in ("csv", "jsonl", "parquet"))

LabelRow = Mapping[str, Any]  # cells by column, as a CSV, JSON-lines or Parquet file has them


@dataclass(frozen=True)
class Labels:
    """The class of each key, as a number or name, and the names of the classes if the source has them."""

    of: dict[str, int | str | None]
    class_names: list[str] | None = None


def find_labels(names: Collection[str], read: Callable[[str], bytes]) -> Labels | None:
    """The labels in the root folder of a source, or None.

    Looks for `dataset.json` (EDM's), then `labels` or `metadata` with the ending .csv, .jsonl or .parquet.
    """
    if "dataset.json" in names:
        return parse_labels("dataset.json", read("dataset.json"))
    found = first_of(TABLE_NAMES, names)
    return parse_labels(found, read(found)) if found else None


def read_labels(address: str, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels:
    """The labels in a separate file.

    Args:
        address: a .csv, .jsonl or .parquet file, or EDM's dataset.json.
        keys: the columns that may contain the key, by preference.

    Raises:
        UserError: the file does not exist or contains no labels.
    """
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--labels {address} does not exist: give a .csv, .jsonl, .parquet or EDM's dataset.json")
    labels = parse_labels(name, folder.read(name), keys)
    if labels is None:
        raise UserError(
            f"--labels {address} contains no labels: a .json file needs a list `labels`, as in EDM's dataset.json"
        )
    return labels


def parse_labels(name: str, content: bytes, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels | None:
    """The labels in the content of a file, whose ending defines the format; None for JSON without labels."""
    try:
        if name.endswith(".json"):
            return _edm_labels(json.loads(content))
        return _table_labels(name, _rows(name, content), keys)
    except (ValueError, KeyError, TypeError, csv.Error, pyarrow.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise UserError(
            f"{name} cannot be read as labels ({problem}): fix the file, or move it out of the source"
        ) from None


def _edm_labels(value: Any) -> Labels | None:
    """`{"labels": [[key, class], ...]}` or `{"labels": {key: class}}`, optionally with class names in `classes`."""
    if not isinstance(value, dict) or not value.get("labels"):
        return None
    pairs = value["labels"].items() if isinstance(value["labels"], dict) else value["labels"]
    names = value.get("classes")
    return Labels({str(key): label for key, label in pairs}, [str(name) for name in names] if names else None)


def _rows(name: str, content: bytes) -> list[LabelRow]:
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    if name.endswith(".parquet"):
        return list(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist())
    raise UserError(f"{name} is a labels file of an unknown format: give .csv, .jsonl, .parquet or EDM's dataset.json")


def _table_labels(name: str, rows: list[LabelRow], keys: tuple[str, ...]) -> Labels | None:
    if not rows:
        return None
    key, label = first_of(keys, rows[0]), first_of(LABEL_COLUMNS, rows[0])
    if key is None or label is None:
        raise UserError(
            f"{name} has the columns {', '.join(map(str, rows[0]))} and needs one for keys and one for labels: "
            f"name them `{keys[0]}` and `label`"
        )
    return Labels({str(row[key]): _number_or_name(row[label]) for row in rows})


def _number_or_name(value: Any) -> int | str | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) or not str(value).lstrip("-").isdigit():
        return value if isinstance(value, (int, str)) else str(value)
    return int(value)  # CSV has only text


def number_classes(
    labels: list[int | str | None], class_names: list[str] | None
) -> tuple[list[str], Callable[[int | str | None], int]]:
    """The class names, and a function from a label to the number of its class (-1: none).

    Labels that are numbers are the numbers of the classes. Names are sorted and numbered.

    Args:
        labels: the label of each input.
        class_names: the names of the classes, if the source has them.

    Raises:
        UserError: a label is not one of the named classes, or labels are both numbers and names.
    """
    distinct = {label for label in labels if label is not None and label != -1}
    if class_names is not None:
        by_name = {name: number for number, name in enumerate(class_names)}
        unknown = [label for label in distinct if label not in by_name and not _is_within(label, len(class_names))]
        if unknown:
            raise UserError(f"the label {unknown[0]!r} is not one of the {len(class_names)} classes: fix the labels")
        return class_names, lambda label: -1 if label is None else by_name.get(str(label), _as_number(label))
    if all(isinstance(label, int) for label in distinct):
        if any(int(label) < -1 for label in distinct):
            raise UserError(f"the label {min(distinct, key=int)} is negative: number classes from 0, -1 for none")
        names = [str(number) for number in range(max((int(label) for label in distinct), default=-1) + 1)]
        return names, _as_number
    if any(isinstance(label, int) for label in distinct):
        raise UserError("the labels are both numbers and names: use one or the other")
    names = sorted(str(label) for label in distinct)
    numbers = {name: number for number, name in enumerate(names)}
    return names, lambda label: -1 if label is None else numbers[str(label)]


def _is_within(label: int | str, classes: int) -> bool:
    return isinstance(label, int) and -1 <= label < classes


def _as_number(label: int | str | None) -> int:
    return -1 if label is None else int(label)


def first_of(wanted: tuple[str, ...], names: Collection[Any]) -> str | None:
    """The first of the wanted names that is in `names`, or None."""
    return next((name for name in wanted if name in names), None)
