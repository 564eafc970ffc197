"""Remote datasets: their shards are fetched in the order of need, kept while they are needed, and removed later."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import dataset_card

from patchloom.platform.dataset.prepared import Dataset, open_dataset, write_shard
from patchloom.platform.dataset.remote_shards import RemoteShards, ShardsInNeed
from patchloom.platform.files.folder import Folder

SHARDS, ROWS = 12, 5
IMAGES = np.random.default_rng(0).integers(0, 256, (SHARDS * ROWS, 3, 4, 4), dtype=np.uint8)


@pytest.fixture
def there(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A dataset of 12 shards at a store, and an empty cache."""
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    folder, shards = Folder.at(f"{s3}/{tmp_path.name}/dataset"), []
    for number in range(SHARDS):
        rows = range(number * ROWS, (number + 1) * ROWS)
        path = tmp_path / f"part-{number:05d}.arrow"
        entry = write_shard(path, [f"{row:04d}" for row in rows], rows, {"image": IMAGES[rows.start : rows.stop]})
        folder.put(path, entry.file)
        shards.append(entry.to_dict())
    folder.write_json("dataset.json", dataset_card(shards))
    return folder


@pytest.fixture
def room(there: Folder, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the limit of the cache, in shards next to the card."""
    card = there.read_json("dataset.json")
    size, other = card["shards"][0]["bytes"], len(there.read("dataset.json"))
    return lambda shards: monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str((shards * size + other) / 2**30))


def files_of(dataset: Dataset) -> RemoteShards:
    """The shards of a remote dataset."""
    assert isinstance(dataset.reader.files, RemoteShards)
    return dataset.reader.files


def here(dataset: Dataset) -> list[int]:
    """The shards that are here."""
    return [number for number in range(SHARDS) if files_of(dataset).parts.is_here(number)]


def need(dataset: Dataset, *stages: list[int]) -> None:
    """Need these shards, in this order."""
    files_of(dataset).need([ShardsInNeed(np.array(stage), iter(stage)) for stage in stages])


def wait_for(dataset: Dataset, wanted: set[int]) -> None:
    """Wait until these shards are here."""
    deadline = time.monotonic() + 10
    while not wanted <= set(here(dataset)):
        assert time.monotonic() < deadline, (here(dataset), wanted)
        time.sleep(0.005)


def test_only_the_shards_of_the_rows_that_are_read_are_fetched(there: Folder) -> None:
    dataset = open_dataset(str(there))
    assert len(dataset) == SHARDS * ROWS and here(dataset) == []
    assert np.array_equal(dataset.rows([17, 38, 16])["image"], IMAGES[[17, 38, 16]])
    assert here(dataset) == [3, 7]


def test_needed_shards_are_fetched_first_to_last_and_kept(there: Folder, room: Callable[[float], None]) -> None:
    room(6)
    dataset = open_dataset(str(there))
    need(dataset, [4, 0], [8, 2])
    wait_for(dataset, {0, 2, 4, 8})
    assert here(dataset) == [0, 2, 4, 8]
    for row in range(len(dataset)):  # the two other places go round
        assert np.array_equal(dataset.rows([row])["image"], IMAGES[row : row + 1])
        assert {0, 2, 4, 8} <= set(here(dataset)) and len(here(dataset)) <= 6
    need(dataset, [8, 2], [5, 6])
    wait_for(dataset, {8, 2, 5, 6})
    room(4)
    need(dataset, [5, 6], [1, 3])
    wait_for(dataset, {1, 3, 5, 6})
    assert here(dataset) == [1, 3, 5, 6]
    files_of(dataset).close()


def test_a_cache_without_room_for_all_needs_still_gives_every_row(there: Folder, room: Callable[[float], None]) -> None:
    room(3)
    dataset, largest, is_done = open_dataset(str(there)), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not is_done.is_set():
            largest = max(largest, len(here(dataset)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for first in range(0, SHARDS, 3):  # two stages of three shards are twice the cache
            need(dataset, [first, first + 1, first + 2], [(first + 3 + k) % SHARDS for k in range(3)])
            rows = np.random.default_rng(first).permutation(np.arange(first * ROWS, (first + 3) * ROWS))
            for some in np.split(rows, 5):
                assert np.array_equal(dataset.rows(some)["image"], IMAGES[some])
    finally:
        is_done.set()
        watcher.join()
        files_of(dataset).close()
    assert largest <= 3


def test_two_datasets_of_a_process_share_what_is_here(there: Folder, room: Callable[[float], None]) -> None:
    room(4)
    one, other = open_dataset(str(there)), open_dataset(str(there))
    need(one, [0, 1])
    need(other, [1, 2])
    wait_for(one, {0, 1, 2})
    files_of(one).close()
    for row in range(15, len(one), ROWS):
        one.rows([row])
    assert {1, 2} <= set(here(one)) and 0 not in here(one)
    files_of(other).close()


def test_an_error_of_the_background_is_raised_by_the_reader_alone(there: Folder) -> None:
    dataset = open_dataset(str(there))
    content = there.read("shards/part-00003.arrow")
    there.remove("shards/part-00003.arrow")
    need(dataset, [3, 4])
    wait_for(dataset, {4})
    assert np.array_equal(dataset.rows([20])["image"], IMAGES[20:21])
    with pytest.raises(Exception, match=r"part-00003\.arrow is missing"):
        dataset.rows([15])
    there.write("shards/part-00003.arrow", content)
    assert np.array_equal(dataset.rows([15])["image"], IMAGES[15:16])
    files_of(dataset).close()
