"""Spools and sorting on disk: the same rows in the same order as in memory."""

import random

import pytest

from patchloom.platform.dataset import keys
from patchloom.platform.dataset.keys import KeyTable
from patchloom.platform.files import spool
from patchloom.platform.files.spool import RowSpool, Spool, sorted_rows


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is kept in memory, so that small tests use the disk."""
    monkeypatch.setattr(spool, "SPOOL_BLOCK_ROWS", 3)
    monkeypatch.setattr(spool, "SORTED_ROWS", 7)
    monkeypatch.setattr(spool, "MERGED_RUNS", 3)
    monkeypatch.setattr(keys, "RUN_ROWS", 10)


def some_rows(count: int) -> list[tuple[str, int, list[int] | None]]:
    draw = random.Random(0)
    names = ["a", "a/b", "é", "\udce9", "a-"]  # also a name that is not UTF-8
    return [(draw.choice(names), number, [number] if draw.random() < 0.5 else None) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 50, 700])
def test_rows_are_read_as_they_were_written_and_sorted(count: int) -> None:
    rows, kept = some_rows(count), RowSpool()
    for row in rows:
        kept.append(row)
    assert list(kept) == list(kept) == rows and len(kept) == count
    assert [kept[number] for number in range(count)] == rows
    assert list(sorted_rows(kept)) == sorted(rows)
    with pytest.raises(IndexError):
        kept[count]


def test_contents_are_kept_by_number() -> None:
    kept = Spool(3)
    kept.keep(2, b"two")
    kept.keep(0, b"")
    assert (kept.read(2), kept.read(0)) == (b"two", b"") and 0 in kept and 1 not in kept


@pytest.mark.parametrize("count", [0, 5, 200])
def test_repeated_keys_are_those_that_an_earlier_row_has(count: int) -> None:
    table, seen, wanted = KeyTable(), set[str](), list[int]()
    for position in range(count):
        key = str(random.Random(position).randrange(60))
        table.add(key, position)
        if key in seen:
            wanted.append(position)
        seen.add(key)
    assert table.repeated().tolist() == wanted and len(table) == count
