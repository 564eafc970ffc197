"""Label files: tables of keys and labels, and EDM's dataset.json, in a source or as a separate file."""

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.dataset.labels import Label, Labels, column_of_labels, first_of, label_of
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say

LABEL_COLUMNS = ("label", "labels", "class", "category", "cls", "fine_label")
NAME_COLUMNS = ("key", "file_name", "filename", "file", "path", "image", "name")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
TABLE_NAMES = tuple(f"{stem}{ending}" for stem in ("labels", "metadata") for ending in TABLE_ENDINGS)
DELIMITERS = ",;\t"
KNOWN_FILES = "a .csv, .tsv, .jsonl or .parquet file, or EDM's dataset.json"

LabelRow = Mapping[str, Any]  # cells by column


def find_labels(names: Collection[str], read: Callable[[str], bytes]) -> Labels | None:
    """The labels in the root folder of a source, or None.

    Looks for `dataset.json` (EDM's), then `labels` or `metadata` with an ending of `TABLE_ENDINGS`. A `metadata` table
    without labels, such as one of captions, is ignored with a message.
    """
    if "dataset.json" in names:
        return parse_labels("dataset.json", read("dataset.json"))
    found = first_of(TABLE_NAMES, names)
    if found is None:
        return None
    content = read(found)
    if found.startswith("metadata.") and not _has_labels(found, content):
        say(f"  {found} has no column of labels ({', '.join(LABEL_COLUMNS[:3])}, ...) and is not used")
        return None
    return parse_labels(found, content)


def read_labels(address: str, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels:
    """The labels in a separate file.

    Args:
        address: a .csv, .tsv, .jsonl or .parquet file, or EDM's dataset.json.
        keys: the columns that may contain the key, by preference.

    Raises:
        UserError: the file does not exist or contains no labels.
    """
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--labels {address} does not exist: give {KNOWN_FILES}")
    labels = parse_labels(name, folder.read(name), keys)
    if labels is None or not labels.of:
        raise UserError(
            f"--labels {address} contains no labels: a .json file needs a list `labels`, as in EDM's dataset.json"
        )
    return labels


def parse_labels(name: str, content: bytes, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels | None:
    """The labels in the content of a file, whose ending defines the format; None for JSON without labels."""
    try:
        if name.lower().endswith(".json"):
            return _edm_labels(name, json.loads(content))
        return _table_labels(name, _rows(name, content), keys)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, csv.Error, pyarrow.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise UserError(
            f"{name} cannot be read as labels ({problem}): fix the file, or move it out of the source"
        ) from None


def _edm_labels(name: str, value: Any) -> Labels | None:
    """`{"labels": [[key, class], ...]}` or `{"labels": {key: class}}`, optionally with class names in `classes`.

    `{"labels": null}` means that the images have no classes, also if they are in folders.
    """
    if not isinstance(value, dict) or "labels" not in value:
        return None
    given = value["labels"] or {}
    pairs = given.items() if isinstance(given, dict) else given
    names = value.get("classes")
    return _labels(name, [(str(key), label) for key, label in pairs], [str(one) for one in names] if names else None)


def _has_labels(name: str, content: bytes) -> bool:
    try:
        rows = _rows(name, content)
    except (ValueError, csv.Error, pyarrow.ArrowException):
        return True  # the error of parsing says what is wrong
    return not rows or not isinstance(rows[0], Mapping) or first_of(LABEL_COLUMNS, rows[0]) is not None


def _rows(name: str, content: bytes) -> list[LabelRow]:
    if name.lower().endswith((".csv", ".tsv")):
        text = content.decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text), delimiter=_delimiter(text.partition("\n")[0])))
    if name.lower().endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    if name.lower().endswith(".parquet"):
        return list(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist())
    raise UserError(f"{name} is a labels file of an unknown format: give {KNOWN_FILES}")


def _delimiter(header: str) -> str:
    """The delimiter that splits the header into the most columns, so that a semicolon or a tab works, too."""
    return max(DELIMITERS, key=header.count)


def _table_labels(name: str, rows: list[LabelRow], keys: tuple[str, ...]) -> Labels | None:
    if not rows:
        return None
    key, label = first_of(keys, rows[0]), first_of(LABEL_COLUMNS, rows[0])
    if key is None or label is None:
        raise UserError(
            f"{name} has the columns {', '.join(map(str, rows[0]))} and needs one for keys and one for labels: "
            f"name them `{keys[0]}` and `label`"
        )
    return _labels(name, [(_key(row[key]), row[label]) for row in rows], None)


def _key(value: Any) -> str:
    """A key as text. A whole float is an integer: pandas stores integers with gaps as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _labels(name: str, pairs: list[tuple[str, Any]], class_names: list[str] | None) -> Labels:
    """Labels by key; raises UserError where a key has two different labels."""
    values = column_of_labels((label_of(value, f"{key} in {name}") for key, value in pairs), class_names)
    found: dict[str, Label] = {}
    for (key, _), label in zip(pairs, values, strict=True):
        if found.setdefault(key, label) != label:
            raise UserError(f"{name} has two labels for {key}, {found[key]!r} and {label!r}: remove one of the rows")
    return Labels(found, class_names)
