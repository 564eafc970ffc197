"""Label files: tables of keys and labels, and EDM's dataset.json, in a source or as a separate file."""

import csv
import io
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.dataset.json_stream import JsonStream
from patchloom.platform.dataset.labels import Labels, first_of
from patchloom.platform.files.folder import COPY_BYTES, Folder
from patchloom.platform.files.spool import RowSpool, temporary_file
from patchloom.platform.files.storage import parse_json_object
from patchloom.platform.progress import say

LABEL_COLUMNS = ("label", "labels", "class", "category", "cls", "fine_label")
NAME_COLUMNS = ("key", "file_name", "filename", "file", "path", "image", "name")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
TABLE_NAMES = tuple(f"{stem}{ending}" for stem in ("labels", "metadata") for ending in TABLE_ENDINGS)
ROOT_TABLES = (*TABLE_NAMES, "dataset.json")  # in the root folder of a source
PARQUET_BATCH_ROWS = 1024
DELIMITERS = ",;\t"
KNOWN_FILES = "a .csv, .tsv, .jsonl or .parquet file, or EDM's dataset.json"

LabelRow = Mapping[str, Any]  # cells by column


def find_labels(names: Collection[str], opened: Callable[[str], BinaryIO]) -> Labels | None:
    """The labels in the root folder of a source, or None.

    Looks for `dataset.json` (EDM's), then `labels` or `metadata` with an ending of `TABLE_ENDINGS`. A `metadata` table
    without labels, such as one of captions, is ignored with a message.
    """
    if "dataset.json" in names:
        return parse_labels("dataset.json", opened("dataset.json"))
    found = first_of(TABLE_NAMES, names)
    if found is None:
        return None
    if found.startswith("metadata.") and not _has_labels(found, opened(found)):
        say(f"  {found} has no column of labels ({', '.join(LABEL_COLUMNS[:3])}, ...) and is not used")
        return None
    return parse_labels(found, opened(found))


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
    labels = parse_labels(name, opened_here(folder, name), keys)
    if not labels:
        raise UserError(
            f"--labels {address} contains no labels: a .json file needs a list `labels`, as in EDM's dataset.json"
        )
    return labels


def parse_labels(name: str, file: BinaryIO, keys: tuple[str, ...] = NAME_COLUMNS) -> Labels | None:
    """The labels in a file, whose ending defines the format; None for JSON without labels. The file is closed."""
    try:
        with file:
            return _edm_labels(name, file) if name.lower().endswith(".json") else _table_labels(name, file, keys)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error, pyarrow.ArrowException) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} cannot be read as labels ({problem}): fix the file, or move it out of the source"
        ) from None


def _edm_labels(name: str, file: BinaryIO) -> Labels | None:
    """`{"labels": [[key, class], ...]}` or `{"labels": {key: class}}`, optionally with class names in `classes`.

    `{"labels": null}` means that the images have no classes, also if they are in folders.
    """
    text = JsonStream(file)
    if text.next_character() != "{":
        text.value()
        return None
    given, names, has_labels = RowSpool(), None, False
    for key in text.members():
        if key == "labels":
            has_labels = True
            if text.next_character() in ("[", "{"):
                for one, label in text.items():
                    given.append((str(one), label))
            elif text.value():
                raise ValueError("`labels` is no list")
        elif key == "classes":
            names = [str(one) for one in text.value() or ()] or None
        else:
            text.value()
    return Labels(name, ((key, label) for key, label in given), names) if has_labels else None


def _has_labels(name: str, file: BinaryIO) -> bool:
    with file:
        try:
            first = next(table_rows(name, file), None)
        except (ValueError, csv.Error, pyarrow.ArrowException):
            return True  # the error of parsing says what is wrong
    return not isinstance(first, Mapping) or first_of(LABEL_COLUMNS, first) is not None


def table_rows(name: str, file: BinaryIO) -> Iterator[LabelRow]:
    """The rows of a table, one by one."""
    if name.lower().endswith((".csv", ".tsv")):
        text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
        header = text.readline()
        yield from csv.DictReader(itertools.chain([header], text), delimiter=_delimiter(header))
    elif name.lower().endswith(".jsonl"):
        yield from (parse_json_object(line) for line in file if line.strip())
    elif name.lower().endswith(".parquet"):
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_BATCH_ROWS):
            yield from batch.to_pylist()
    else:
        raise UserError(f"{name} is a labels file of an unknown format: give {KNOWN_FILES}")


def _delimiter(header: str) -> str:
    """The delimiter that splits the header into the most columns, so that a semicolon or a tab works, too."""
    return max(DELIMITERS, key=header.count)


def _table_labels(name: str, file: BinaryIO, keys: tuple[str, ...]) -> Labels | None:
    rows = table_rows(name, file)
    first = next(rows, None)
    if first is None:
        return None
    key, label = first_of(keys, first), first_of(LABEL_COLUMNS, first)
    if key is None or label is None:
        raise UserError(
            f"{name} has the columns {', '.join(map(str, first))} and needs one for keys and one for labels: "
            f"name them `{keys[0]}` and `label`"
        )
    return Labels(name, ((key_of_cell(row[key]), row[label]) for row in itertools.chain([first], rows)))


def key_of_cell(value: Any) -> str:
    """A key as text. A whole float is an integer: pandas stores integers with gaps as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def opened_here(folder: Folder, name: str) -> BinaryIO:
    """A file, open for reading from its start; a remote one is copied first, because it is read piece by piece."""
    if not folder.is_remote:
        return folder.open(name)
    with folder.open(name) as source:
        return temporary_file(iter(lambda: source.read(COPY_BYTES), b""))
