"""Parts: files of a store that are fetched one by one into a bounded cache, which the processes of a node share."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import part_user
import pytest
from faulty_proxy import FaultyProxy
from helpers import environment, within
from part_user import CARD_SIZE, CONTENTS, COUNT, SIZE, opened

from patchloom.errors import UserError
from patchloom.platform.files.cache import cache_entries, cached_copy, remove_entry
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.parts import CachedParts, PartState


@pytest.fixture
def store(there: Folder, cache: Path) -> Folder:
    """A folder at the store with the parts and a card."""
    for number, content in enumerate(CONTENTS):
        there.write(f"part-{number}", content)
    there.write("card", bytes(CARD_SIZE))
    return there


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the limit of the cache, in parts next to the card."""
    return lambda parts: monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str((parts * SIZE + CARD_SIZE) / 2**30))


@pytest.fixture
def process(store: Folder) -> Iterator[Callable[[], Any]]:
    """Starts processes that hold the parts that they are told to."""
    started: list[subprocess.Popen[str]] = []

    def start(address: str = store.address) -> Callable[[str], str]:
        command = [sys.executable, part_user.__file__, address]
        one = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(one)

        def do(action: str, until: str = "done") -> str:
            assert one.stdin is not None and one.stdout is not None
            one.stdin.write(f"{action}\n")
            one.stdin.flush()
            while not (line := str(within(20, one.stdout.readline)).strip()).startswith(until):
                assert line, "it ended"
            return line

        do.__dict__["process"] = one
        return do

    yield start
    for one in started:
        one.kill()
        one.communicate()


def read(parts: CachedParts, number: int, keep: bool = False) -> bytes:
    """The content of a part, which is let go again unless it is kept."""
    parts.hold(np.array([number]))
    content = parts.get(number, lambda: False).read_bytes()
    if not keep:
        parts.let_go(np.array([number]))
    return content


def here(parts: CachedParts) -> list[int]:
    """The parts that are here."""
    return [number for number in range(COUNT) if parts.is_here(number)]


def test_parts_are_the_files_and_are_fetched_once(store: Folder, process: Callable[[], Any]) -> None:
    parts = opened(store)
    assert here(parts) == [] and (parts.folder / "card").read_bytes() == bytes(CARD_SIZE)
    assert [read(parts, number) for number in range(COUNT)] == CONTENTS
    for number in range(COUNT):
        store.remove(f"part-{number}")
    assert [read(parts, number) for number in range(COUNT)] == CONTENTS
    assert process()(f"get {' '.join(map(str, range(COUNT)))}") == "done 0"


def test_the_cache_never_exceeds_its_limit_and_loses_the_oldest_use_first(
    store: Folder, room: Callable[[int], None]
) -> None:
    room(4)
    parts, is_done = opened(store), threading.Event()
    folder, held_bytes = parts.folder / "parts", [0]

    def watch() -> None:
        while not is_done.is_set():
            # the folder is made with the first part, and a part may go between listing and stat
            with contextlib.suppress(FileNotFoundError):
                held_bytes.append(sum(entry.stat().st_size for entry in os.scandir(folder)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        used: list[int] = []
        for number in random.Random(0).choices(range(COUNT), k=60):
            assert read(parts, number) == CONTENTS[number]
            used = [*(earlier for earlier in used if earlier != number), number]
            assert here(parts) == sorted(used[-4:])
    finally:
        is_done.set()
        watcher.join()
    assert sum(path.stat().st_size for path in folder.iterdir()) == 4 * SIZE
    assert max(held_bytes) <= 4 * SIZE


def test_held_parts_stay_and_no_room_is_an_error_only_if_nothing_can_go(
    store: Folder, room: Callable[[int], None], process: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    room(4)
    parts, other = opened(store), process()
    assert other("get 0 1") == "done 2"
    read(parts, 2, keep=True)
    for number in range(3, COUNT):
        read(parts, number)
        assert here(parts) == [0, 1, 2, number]
    parts.hold(np.array([3, 11]))
    assert parts.attempt(3) is PartState.FULL and here(parts) == [0, 1, 2, 11]
    monkeypatch.setattr("patchloom.platform.files.parts.ROOM_WAIT_S", 0.2)
    with pytest.raises(UserError, match=r"PATCHLOOM_CACHE_GIB"):
        parts.get(3, lambda: False)
    waiting = threading.Thread(target=lambda: parts.get(3, lambda: False))
    monkeypatch.setattr("patchloom.platform.files.parts.ROOM_WAIT_S", 20)
    waiting.start()
    other("let 1")
    waiting.join(10)
    assert here(parts) == [0, 2, 3, 11]
    other.__dict__["process"].kill()  # its holds end with it
    other.__dict__["process"].wait()
    read(parts, 5)
    assert here(parts) == [2, 3, 5, 11]


def test_two_processes_fetch_each_part_once(store: Folder, process: Callable[[], Any]) -> None:
    one, other, wanted = process(), process(), " ".join(map(str, range(COUNT)))
    said: list[str] = []
    threads = [threading.Thread(target=lambda do=do: said.append(do(f"get {wanted}"))) for do in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(int(line.split()[1]) for line in said) == COUNT


def test_what_a_killed_process_had_fetched_in_part_counts_and_is_fetched_again(
    store: Folder, room: Callable[[int], None], process: Callable[[], Any], s3_environment: str
) -> None:
    room(2)
    with FaultyProxy(s3_environment) as proxy, environment(AWS_ENDPOINT_URL=proxy.address):
        killed = process()
        killed("get 0")
        proxy.set("hang")
        killed("get 1", until="fetching")
        killed.__dict__["process"].kill()
        killed.__dict__["process"].wait()
    parts = opened(store)
    assert here(parts) == [0] and read(parts, 1) == CONTENTS[1] and read(parts, 2) == CONTENTS[2]
    assert here(parts) == [1, 2] and len(list((parts.folder / "parts").iterdir())) == 2


def test_a_damaged_part_is_fetched_again_three_times_at_most(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches, damaged, fetch = 0, bytes([CONTENTS[3][0] ^ 1]) + CONTENTS[3][1:], Folder.fetch_hashed

    def counted(*arguments: Any) -> tuple[int, str]:
        nonlocal fetches
        fetches += 1
        if fetches == 6:
            store.write("part-3", CONTENTS[3])
        return fetch(*arguments)

    monkeypatch.setattr(Folder, "fetch_hashed", counted)
    store.write("part-3", damaged)
    parts = opened(store)
    with pytest.raises(UserError, match=r"part-3 was changed.*sha256") as error:
        read(parts, 3)
    assert fetches == 3 and "\n" not in str(error.value) and not list((parts.folder / "parts").iterdir())
    assert read(parts, 3) == CONTENTS[3] and fetches == 6
    store.remove("part-4")
    with pytest.raises(UserError, match=r"part-4 is missing"):
        read(parts, 4)


def test_a_limit_below_one_part_is_refused_at_once(
    store: Folder, room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    room(0)
    parts = opened(store)
    monkeypatch.setattr("patchloom.platform.files.parts.ROOM_WAIT_S", 20)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"PATCHLOOM_CACHE_GIB"):
        read(parts, 0)
    assert time.monotonic() - start < 10


def test_whole_copies_and_other_folders_share_the_limit(
    store: Folder, room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    room(4)
    for name in ("whole", "in-use"):
        handle, _ = cached_copy("kind", name, SIZE, lambda folder: (folder / "file").write_bytes(bytes(SIZE)) and None)
        if name == "whole":
            os.close(handle)
    parts = opened(store)
    assert read(parts, 0) == CONTENTS[0] and read(parts, 1) == CONTENTS[1]
    assert [entry.name for entry in cache_entries("kind")] == ["in-use", "parts", "whole"]
    read(parts, 2)
    assert [entry.name for entry in cache_entries("kind")] == ["in-use", "parts"] and here(parts) == [0, 1, 2]
    read(parts, 3)
    assert here(parts) == [1, 2, 3]
    assert not any(remove_entry(entry) for entry in cache_entries("kind"))
    os.close(handle)
    assert sum(entry.size_bytes for entry in cache_entries("kind") if entry.name == "in-use") == SIZE


def test_a_use_of_parts_of_an_unused_folder_counts_for_their_removal(
    store: Folder, room: Callable[[int], None], process: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = process()
    other("get 0 1 2")
    other("let 0 1 2")
    other.__dict__["process"].kill()
    other.__dict__["process"].wait()
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str((3 * SIZE + 2 * CARD_SIZE) / 2**30))  # with two cards
    newer = opened(store, "newer")
    assert read(newer, 5) == CONTENTS[5]
    assert sorted(path.name for path in (newer.cache / "parts" / "parts").iterdir()) == ["00000001", "00000002"]
    for number in range(6, 8):
        read(newer, number)
    assert here(newer) == [5, 6, 7]
    assert (newer.cache / "parts" / "card").is_file()
    room(4)  # of one card
    read(newer, 8)
    assert here(newer) == [5, 6, 7, 8] and not (newer.cache / "parts").exists()
