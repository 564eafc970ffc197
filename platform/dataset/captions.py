"""Captions: the texts of images in a table, by the keys of the images."""

import csv
import itertools
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import pyarrow

from patchloom.errors import UserError
from patchloom.platform.dataset.condition_source import condition_key
from patchloom.platform.dataset.label_files import (
    NAME_COLUMNS,
    TABLE_ENDINGS,
    key_of_cell,
    opened_here,
    table_rows,
)
from patchloom.platform.dataset.labels import first_of, plain_key
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool, sorted_rows

CAPTION_COLUMNS = ("text", "caption", "prompt")


class Captions:
    """The captions in a table, kept in a temporary file.

    Args:
        address: a .csv, .tsv, .jsonl or .parquet file with a column of keys, with or without the endings of the images,
            and one of texts (`CAPTION_COLUMNS`).

    Raises:
        UserError: the file is missing or damaged, or lacks a column.
    """

    def __init__(self, address: str) -> None:
        folder, name = Folder.of_file(address)
        if not folder.has(name):
            raise UserError(f"--text {address} does not exist: give a table of keys and texts, or an .npz file")
        self.name = name
        try:
            with opened_here(folder, name) as file:
                self._rows = RowSpool.of(self._pairs(table_rows(name, file)))
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, csv.Error, pyarrow.ArrowException) as error:
            problem = " ".join(str(error).split())[:300]
            raise UserError(f"--text {address} cannot be read as a table of texts ({problem}): fix the file") from None

    def __len__(self) -> int:
        return len(self._rows)

    def _pairs(self, rows: Iterator[Any]) -> Iterator[tuple[str, str | None]]:
        first = next(rows, None)
        if first is None:
            raise UserError(f"--text {self.name} has no rows: give a text for each image")
        key, text = first_of(NAME_COLUMNS, first), first_of(CAPTION_COLUMNS, first)
        if key is None or text is None:
            raise UserError(
                f"--text {self.name} has the columns {', '.join(map(str, first))[:200]} and needs one for keys "
                f"and one for texts: name them `{NAME_COLUMNS[0]}` and `{CAPTION_COLUMNS[0]}`"
            )
        for row in itertools.chain([first], rows):
            if not isinstance(row[text], str | None):
                raise UserError(f"--text {self.name}: the {text} of {row[key]} is no text: give one text per row")
            yield key_of_cell(row[key]), row[text]

    def matched(self, keys: Iterable[str]) -> Iterator[str | None]:
        """The caption of each key, by sorting all keys on disk; None for a key without one.

        Keys belong together if they differ only in the ending of a file, or as in files of labels. Of several captions,
        the first one of the same key counts, else the first one.
        """
        members = itertools.chain(
            ((condition_key(key), 0, number, key, text) for number, (key, text) in enumerate(self._rows)),
            ((condition_key(key), 1, position, key, None) for position, key in enumerate(keys)),
        )
        groups = itertools.groupby(sorted_rows(members), key=itemgetter(0))
        return (text for _, text in sorted_rows(row for _, group in groups for row in _of_group(group)))


def is_caption_table(address: str) -> bool:
    """Whether the ending of a file is that of a table."""
    return address.lower().endswith(TABLE_ENDINGS)


def _of_group(group: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, str | None]]:
    """The position and caption of the keys of one group, in which captions come first."""
    known: dict[str, str | None] = {}
    for _, is_wanted, number, key, text in group:
        if not is_wanted:
            known.setdefault(plain_key(key), text)
        else:
            yield number, known.get(plain_key(key), next(iter(known.values()), None))
