"""The cache that the processes of a node share: copies are filled once, kept while in use, and removed to make room."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dataset_card, names_in, within

from patchloom.errors import UserError
from patchloom.platform.dataset.prepared import open_dataset, write_shard
from patchloom.platform.files.cache import COMPLETE, cache_entries, cached_copy, remove_entry, working_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.journal import Journal, stamps_of
from patchloom.platform.files.storage import file_sha256, make_folder, write_json

FILLER = """
import os, sys, time
from pathlib import Path
from patchloom.platform.files.cache import cached_copy

name, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

def fill(folder):
    with Path(os.environ["PATCHLOOM_CACHE"], "filled").open("a") as file:
        file.write(name + "\\n")
    (folder / "half").write_bytes(bytes(size // 2))
    print("filling", flush=True)
    time.sleep(seconds)
    (folder / "rest").write_bytes(bytes(size - size // 2))

_, folder = cached_copy("kind", name, size, fill)
print("held", sum(path.stat().st_size for path in folder.iterdir()), flush=True)
sys.stdin.read()
"""


class Filler:
    """A process that fills a copy in so many seconds and uses it until its input ends."""

    def __init__(self, name: str, size: int, seconds: float = 0.0) -> None:
        command = [sys.executable, "-c", FILLER, name, str(size), str(seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        """The next line, which must come soon."""
        assert self.process.stdout is not None
        return str(within(20, self.process.stdout.readline)).strip()

    def end(self) -> None:
        """Let it go, and wait for it."""
        self.process.communicate("", timeout=20)


@pytest.fixture
def filler(cache: Path) -> Iterator[Callable[..., Filler]]:
    """Starts fillers, which end with the test."""
    started: list[Filler] = []

    def start(*arguments: Any) -> Filler:
        started.append(Filler(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout):
            if pipe is not None:
                pipe.close()


def filled_with(size: int) -> Callable[[Path], None]:
    """Fills a copy with so many bytes."""
    return lambda folder: (folder / "file").write_bytes(bytes(size)) and None


def copies_in(cache: Path) -> list[str]:
    """The names of the whole copies."""
    return sorted(path.parent.name for path in (cache / "kind").glob(f"*/{COMPLETE}"))


def test_concurrent_processes_fill_a_copy_once(cache: Path, filler: Callable[..., Filler]) -> None:
    one, other = filler("a", 1000, 0.3), filler("a", 1000, 0.3)
    said = {asker: asker.says() for asker in (one, other)}  # the one that waited says nothing before it holds
    assert sorted(said.values()) == ["filling", "held 1000"]
    assert next(asker for asker, word in said.items() if word == "filling").says() == "held 1000"
    handle, folder = cached_copy("kind", "a", 1000, filled_with(1))
    os.close(handle)
    assert (cache / "filled").read_text() == "a\n" and (folder / "rest").stat().st_size == 500


def test_concurrent_processes_do_not_wait_for_each_other_to_end(cache: Path) -> None:
    for number in range(6):  # each asker has a lock of its own, as processes have
        together = threading.Barrier(4)

        def ask(together: threading.Barrier = together, name: str = f"copy{number}") -> int:
            together.wait()
            return cached_copy("kind", name, 10, lambda folder: time.sleep(0.05))[0]

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            try:
                handles = [future.result(4) for future in asked]
            except TimeoutError:
                for future in as_completed(asked):  # lets go one by one, so that this test ends
                    os.close(future.result())
                raise AssertionError("one holds the copy, and another waits for it") from None
        for handle in handles:
            os.close(handle)


def test_the_copy_with_the_oldest_use_is_removed_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str(3500 / 2**30))
    for name in ("b", "a", "c", "b"):  # b is used again
        handle, _ = cached_copy("kind", name, 1000, filled_with(1000))
        os.close(handle)
        time.sleep(0.02)  # the clock of a file system is coarse
    for name, left in (("d", ["b", "c", "d"]), ("e", ["b", "d", "e"]), ("f", ["d", "e", "f"])):
        handle, _ = cached_copy("kind", name, 1000, filled_with(1000))
        os.close(handle)
        time.sleep(0.02)
        assert copies_in(cache) == left
    handle, _ = cached_copy("kind", "large", 3400, filled_with(3400))
    os.close(handle)
    assert copies_in(cache) == ["large"]


def test_a_copy_in_use_is_never_removed(
    cache: Path, filler: Callable[..., Filler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str(1500 / 2**30))
    holder = filler("a", 1000)
    assert [holder.says(), holder.says()] == ["filling", "held 1000"]
    with pytest.raises(UserError, match="PATCHLOOM_CACHE_GIB"):
        cached_copy("kind", "b", 1000, filled_with(1000))
    assert copies_in(cache) == ["a"] and (cache / "kind" / "a" / "rest").is_file()
    handle, _ = cached_copy("kind", "small", 400, filled_with(400))
    os.close(handle)
    assert copies_in(cache) == ["a", "small"]
    holder.end()
    handle, _ = cached_copy("kind", "c", 1000, filled_with(1000))
    os.close(handle)
    assert "c" in copies_in(cache) and "a" not in copies_in(cache)


def test_a_cache_that_is_too_small_raises_until_it_is_enlarged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", "0.5")
    with pytest.raises(UserError, match=r"0\.5 GiB.* 1\.0") as refused:
        cached_copy("kind", "a", 2**30, filled_with(10))
    assert "\n" not in str(refused.value) and copies_in(cache) == []
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", "2")
    within(4, lambda: cached_copy("kind", "a", 2**30, filled_with(10)))
    assert copies_in(cache) == ["a"]


def test_a_cache_size_that_is_not_a_number_raises(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", "much")
    with pytest.raises(UserError, match="PATCHLOOM_CACHE_GIB"):
        cached_copy("kind", "a", 10, filled_with(10))


def test_a_fill_that_fails_leaves_no_complete_copy_and_is_repeated(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise RuntimeError("the line broke")

    with pytest.raises(RuntimeError, match="the line broke"):
        cached_copy("kind", "a", 10, fail)
    assert copies_in(cache) == []
    handle, folder = within(4, lambda: cached_copy("kind", "a", 10, filled_with(10)))
    os.close(handle)
    assert copies_in(cache) == ["a"] and (folder / "file").stat().st_size == 10


def test_a_killed_fill_is_repeated_by_the_next_process(cache: Path, filler: Callable[..., Filler]) -> None:
    killed = filler("a", 1000, 60)
    assert killed.says() == "filling"
    waiting = filler("a", 1000)
    killed.process.kill()
    assert [waiting.says(), waiting.says()] == ["filling", "held 1000"]
    assert copies_in(cache) == ["a"] and (cache / "filled").read_text() == "a\na\n"


IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)


@pytest.fixture
def dataset(there: Folder, tmp_path: Path) -> Path:
    """A dataset of two shards, here and at `there`; its keys are of this test alone, and so is its copy."""
    folder, shards = tmp_path / "dataset", []
    (folder / "shards").mkdir(parents=True)
    for number, rows in enumerate((range(4), range(4, 10))):
        path = folder / "shards" / f"part-{number:05d}.arrow"
        write_shard(path, [f"{tmp_path.name}-{row}" for row in rows], rows, {"image": IMAGES[rows.start : rows.stop]})
        entry = {"file": f"shards/{path.name}", "rows": len(rows), "bytes": path.stat().st_size}
        shards.append(entry | {"sha256": file_sha256(path)})
    write_json(folder / "dataset.json", dataset_card(shards))
    for name in names_in(folder):
        there.put(folder / name, name)
    return folder


def test_a_remote_dataset_equals_the_local_one_and_is_fetched_once(dataset: Path, there: Folder, cache: Path) -> None:
    here, far = open_dataset(dataset), open_dataset(str(there))
    assert len(far) == 10 and far.fingerprint == here.fingerprint and far.address == str(there)
    assert far.path.is_relative_to(cache)
    for name, column in here.rows(range(10)).items():
        assert np.array_equal(far.rows(range(10))[name], column)
    there.remove_folder("shards")
    assert open_dataset(str(there)).path == far.path
    code = (
        "import sys; from patchloom.platform.dataset import open_dataset as o; print(o(sys.argv[1]).rows([9])['label'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(there)], capture_output=True, text=True)
    assert done.stdout == "[9]\n", done.stderr


def test_damaged_bytes_on_the_server_are_refused_and_not_kept(dataset: Path, there: Folder, cache: Path) -> None:
    name = "shards/part-00001.arrow"
    right = there.read(name)
    there.write(name, right[:-200] + bytes([right[-200] ^ 1]) + right[-199:])
    far = open_dataset(str(there))
    assert np.array_equal(far.rows([3])["image"], IMAGES[3:4])
    with pytest.raises(UserError, match=r"part-00001\.arrow .*sha256"):
        far.rows([9])
    assert len(list((far.path / "parts").iterdir())) == 1
    there.write(name, right)
    assert np.array_equal(within(4, lambda: far.rows([9])["image"]), IMAGES[9:])


def test_a_truncated_or_missing_remote_dataset_is_refused(dataset: Path, there: Folder) -> None:
    there.write("shards/part-00000.arrow", there.read("shards/part-00000.arrow")[:-1])
    with pytest.raises(UserError, match=r"part-00000\.arrow .*\d+ bytes"):
        open_dataset(str(there)).rows([0])
    there.remove("shards/part-00000.arrow")
    with pytest.raises(UserError, match=r"part-00000\.arrow is missing"):
        open_dataset(str(there)).rows([0])
    there.remove("dataset.json")
    with pytest.raises(UserError, match=rf"{there} .*dataset\.json"):
        open_dataset(str(there))


def unsent_run(cache: Path, name: str, size: int) -> Path:
    """A working copy of a remote run whose last file was never sent."""
    run = make_folder(cache / "runs" / name)
    (run / "model.safetensors").write_bytes(bytes(size))
    Journal().write(run)
    return run


def test_working_copies_of_runs_are_removed_to_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str(3500 / 2**30))
    sent, unsent, finished = unsent_run(cache, "sent", 1000), unsent_run(cache, "unsent", 1000), cache / "runs" / "old"
    Journal(sent=stamps_of(sent)).write(sent)
    make_folder(finished / "model")
    (finished / "model" / "model.json").write_bytes(bytes(1000))
    finished.with_name("old.lock").touch()
    os.utime(sent, (1, 1))  # used before the finished one, which still goes first
    in_use = working_copy(Folder("s3://bucket/mine"), "worker")
    assert all(path.is_dir() for path in (sent, unsent, finished, in_use))
    (in_use / "state.safetensors").write_bytes(bytes(1000))
    working_copy(Folder("s3://bucket/second"), "worker")
    assert not finished.exists() and sent.is_dir() and unsent.is_dir() and in_use.is_dir()
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str(100 / 2**30))
    working_copy(Folder("s3://bucket/third"), "worker")
    assert not sent.exists() and unsent.is_dir() and in_use.is_dir()


def test_entries_in_use_and_unsent_work_are_listed_and_not_removed(cache: Path) -> None:
    unsent_run(cache, "unsent", 500)
    handle, _ = cached_copy("kind", "a", 1000, filled_with(1000))
    by_name = {entry.name: entry for entry in cache_entries()}
    assert {name: (entry.kind, entry.in_use, entry.is_unsent) for name, entry in by_name.items()} == {
        "a": ("kind", True, False),
        "unsent": ("runs", False, True),
    }
    assert by_name["a"].size_bytes == 1000 and abs(by_name["a"].used_unix_s - time.time()) < 60
    assert [entry.name for entry in cache_entries("runs")] == ["unsent"]
    assert not remove_entry(by_name["a"]) and not remove_entry(by_name["unsent"])
    os.close(handle)
    assert remove_entry(by_name["a"]) and [entry.name for entry in cache_entries()] == ["unsent"]
