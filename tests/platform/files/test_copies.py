"""Copies of remote folders, mirrors of local ones, and the cache that the processes of a node share."""

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dataset_card

from patchloom.errors import UserError
from patchloom.platform.dataset.prepared import open_dataset, write_shard
from patchloom.platform.files import copies
from patchloom.platform.files.copies import (
    COMPLETE,
    ProgressFetcher,
    RemoteMirror,
    cached_copy,
    local_copy,
    pull_folder,
    working_copy,
)
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import file_sha256, whole_folder, write_json

TENSORS = ("a.safetensors", "b.safetensors", "z.safetensors")


@pytest.fixture
def there(s3: str, tmp_path: Path) -> Folder:
    """An empty remote folder."""
    return Folder.at(f"{s3}/{tmp_path.name}/run")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty local folder."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test."""
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names_in(folder: Path) -> list[str]:
    """Files that are not hidden."""
    return [name for name in Folder(str(folder)).files() if "/." not in f"/{name}"]


def checkpoint(run: Path, step: int, kilobytes: int = 1) -> None:
    """A checkpoint that appears whole, as training writes it."""
    (run / "checkpoints").mkdir(exist_ok=True)
    with whole_folder(run / "checkpoints" / f"step-{step}") as folder:
        for name in TENSORS:
            (folder / name).write_bytes(bytes([step]) * 1024 * kilobytes)
        (folder / "checkpoint.json").write_text(f'{{"step": {step}}}')


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns; fails where it does not come back."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert out, f"nothing came back within {seconds} s"
    return out[0]


def test_a_pulled_folder_equals_the_remote_one(there: Folder, here: Path) -> None:
    for name in ("run.json", "deep/er/a.txt", ".stop", ".work/b"):
        there.write(name, f"there {name}")
    for name in ("run.json", "gone.txt", "deep/gone.json", ".lock", ".ray/c"):
        Folder(str(here)).write(name, "here")
    pull_folder(there, here)
    assert names_in(here) == ["deep/er/a.txt", "run.json"]
    assert (here / "run.json").read_text() == "there run.json"
    assert (here / ".lock").read_text() == (here / ".ray" / "c").read_text() == "here"
    assert not (here / ".stop").exists() and not (here / ".work").exists()
    there.remove_folder("deep")
    pull_folder(there, here)
    assert names_in(here) == ["run.json"]


def test_only_wanted_files_are_pulled_and_hidden_files_are_kept(there: Folder, here: Path) -> None:
    for name in ("a/x.safetensors", "b/x.safetensors", "c/x.safetensors"):
        there.write(name, "there")
    Folder(str(here)).write("b/x.safetensors", "here")
    Folder(str(here)).write("d/x.safetensors", "here")
    pull_folder(there, here, lambda name: name.startswith("a/"))
    assert names_in(here) == ["a/x.safetensors", "b/x.safetensors"]
    assert (here / "b" / "x.safetensors").read_text() == "here"


def test_tensors_are_pulled_once_and_small_files_each_time(there: Folder, here: Path) -> None:
    there.write("a/x.safetensors", "12345")
    there.write("a/y.safetensors", "12345")
    there.write("a/model.json", "{}")
    there.write("run.json", "old")
    pull_folder(there, here)
    kept = (here / "a" / "x.safetensors").stat().st_ino
    (here / "a" / "y.safetensors").write_text("half")
    there.write("run.json", "new")
    pull_folder(there, here)
    assert (here / "a" / "x.safetensors").stat().st_ino == kept
    assert (here / "a" / "y.safetensors").read_text() == "12345"
    assert (here / "run.json").read_text() == "new"


def test_tensors_whose_card_changed_are_pulled_again(there: Folder, here: Path) -> None:
    for weights in ("first", "other"):  # trained anew into the same address, by another recipe
        there.write("model/model.safetensors", weights)
        there.write("model/model.json", f'{{"weights_sha256": "of {weights}"}}')
        pull_folder(there, here)
        assert (here / "model" / "model.json").read_text() == f'{{"weights_sha256": "of {weights}"}}'
        assert (here / "model" / "model.safetensors").read_text() == weights


def test_a_file_that_is_removed_during_a_pull_is_skipped(there: Folder, here: Path) -> None:
    there.write("checkpoints/step-1/checkpoint.json", "{}")
    there.write("run.json", "{}")

    def wanted(name: str) -> bool:
        there.remove_folder("checkpoints")  # the run goes on, and lets a checkpoint go
        return True

    pull_folder(there, here, wanted)
    assert names_in(here) == ["run.json"]


def test_each_address_and_role_has_its_own_copy(there: Folder, cache: Path, here: Path) -> None:
    there.write("a.txt", "1")
    there.folder("b").write("c.txt", "2")
    assert local_copy(str(here)) == here
    copy = local_copy(str(there))
    assert copy.is_relative_to(cache) and names_in(copy) == ["a.txt", "b/c.txt"]
    other = local_copy(str(there.folder("b")))
    assert names_in(other) == ["c.txt"] and names_in(copy) == ["a.txt", "b/c.txt"]
    assert len({copy, other, working_copy(there, "driver"), working_copy(there, "worker")}) == 4
    assert local_copy(str(there)) == copy


def test_a_reader_never_finds_an_incomplete_checkpoint(
    there: Folder, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.05)
    halves: list[str] = []
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            names = there.files()
            for name in names:
                if name.endswith("checkpoint.json"):
                    seen.add(name)
                    folder = name.rpartition("/")[0]
                    halves.extend(tensor for tensor in TENSORS if f"{folder}/{tensor}" not in names)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with RemoteMirror(here, there):
            for step in range(1, 9):
                checkpoint(here, step)
                if step > 2:
                    for path in sorted((here / "checkpoints" / f"step-{step - 2}").iterdir(), reverse=step % 2 == 0):
                        path.unlink()
                time.sleep(0.2)
    finally:
        done.set()
        reader.join()
    assert len(seen) > 2 and not halves
    whole = {f"checkpoints/step-{step}/{name}" for step in (7, 8) for name in (*TENSORS, "checkpoint.json")}
    assert set(there.files()) == whole
    assert there.read("checkpoints/step-8/z.safetensors") == b"\x08" * 1024


def test_incomplete_uploads_are_removed_and_files_that_were_never_fetched_are_kept(there: Folder, here: Path) -> None:
    for step in (1, 2):
        there.write(f"checkpoints/step-{step}/checkpoint.json", "{}")
    for step in (1, 2, 3):  # the third was cut off before its card
        there.write(f"checkpoints/step-{step}/state.safetensors", "tensors")
    there.write(".stop", "")
    (here / "run.json").write_text("{}")
    old, new = (f"checkpoints/step-{step}" for step in (1, 2))
    pull_folder(there, here, lambda name: not name.startswith("checkpoints/") or name.startswith(new) or "json" in name)
    (here / "run.json").write_text("{}")
    assert names_in(here) == [
        f"{old}/checkpoint.json",
        f"{new}/checkpoint.json",
        f"{new}/state.safetensors",
        "run.json",
    ]
    (here / "checkpoints" / "step-3").mkdir()
    with RemoteMirror(here, there):
        pass
    kept = [f"{step}/{name}" for step in (old, new) for name in ("checkpoint.json", "state.safetensors")]
    assert list(there.files()) == [".stop", *kept, "run.json"]
    with RemoteMirror(here, there):
        (here / old / "checkpoint.json").unlink()
    assert list(there.files()) == [".stop", *kept[2:], "run.json"]


def test_the_remote_file_has_only_complete_lines(there: Folder, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.01)
    found: list[bytes] = []
    with RemoteMirror(here, there), (here / "progress.jsonl").open("ab", buffering=0) as file:
        for number in range(40):
            file.write(b'{"step": ')
            time.sleep(0.005)
            file.write(b"%d}\n" % number)
            if there.has("progress.jsonl"):
                found.append(there.read("progress.jsonl"))
        file.write(b'{"step": 4')
    assert found and all(content == b"" or content.endswith(b"}\n") for content in found)
    assert there.read("progress.jsonl") == b"".join(b'{"step": %d}\n' % number for number in range(40))
    with RemoteMirror(here, there), (here / "progress.jsonl").open("ab") as file:
        file.write(b"0}\n")
    assert there.read("progress.jsonl").endswith(b'9}\n{"step": 40}\n')


def bucket(method: str, name: str) -> None:
    """Make (PUT) or remove (DELETE) a bucket of the tests' server."""
    request = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{name}", method=method)
    urllib.request.urlopen(request, timeout=5).close()


def test_a_store_that_does_not_answer_at_the_end_raises(s3: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SEND_RETRY_S", 0.01)
    bucket("PUT", "away")
    away = Folder.at("s3://away/run")
    checkpoint(here, 1)
    with pytest.raises(UserError, match=r"s3://away/run .*--resume") as refused:  # noqa: SIM117
        with RemoteMirror(here, away):
            bucket("DELETE", "away")
    assert "\n" not in str(refused.value)
    bucket("PUT", "away")
    with RemoteMirror(here, away):
        pass
    assert list(away.files()) == names_in(here) and len(away.files()) == 4


def test_a_store_that_answers_again_gets_all_files(s3: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SEND_RETRY_S", 0.2)
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.05)
    bucket("PUT", "back")
    back = Folder.at("s3://back/run")
    timer = threading.Timer(0.8, bucket, ["PUT", "back"])
    with RemoteMirror(here, back):
        bucket("DELETE", "back")
        checkpoint(here, 1)
        time.sleep(0.3)  # looks that fail cost nothing
        timer.start()
    timer.join()
    assert list(back.files()) == names_in(here) and len(back.files()) == 4


def test_a_remote_signal_file_appears_here(there: Folder, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.05)
    with RemoteMirror(here, there, ".stop"):
        time.sleep(0.2)
        assert not (here / ".stop").exists()
        there.write(".stop", "")
        deadline = time.monotonic() + 5
        while not (here / ".stop").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (here / ".stop").exists()


def test_a_mirror_that_cannot_send_raises(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SEND_RETRY_S", 0.01)
    there = Folder.at(f"local://{here.parent}/there")  # writes only into folders that exist, as sftp:// does
    checkpoint(here, 1)
    try:
        with RemoteMirror(here, there):
            pass
    except UserError as error:
        assert "--resume" in str(error)
    else:
        assert list(there.files()) == names_in(here)


def test_new_lines_are_appended_after_their_pictures_are_fetched(
    there: Folder, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.05)
    lines = here / "progress.jsonl"
    there.write("progress.jsonl", "1\n")
    there.write("checkpoints/step-1/state.safetensors", "tensors")
    with ProgressFetcher(there, here):
        deadline = time.monotonic() + 5
        while not lines.is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        file = lines.stat().st_ino
        there.write("previews/one.png", "picture")
        there.write("progress.jsonl", "1\n2 with previews/one.png\n")
    assert lines.read_text() == "1\n2 with previews/one.png\n"
    assert lines.stat().st_ino == file
    assert (here / "previews" / "one.png").read_text() == "picture"
    assert names_in(here) == ["previews/one.png", "progress.jsonl"]
    with lines.open() as reader:
        there.write("progress.jsonl", "1\n3\n")  # a worker was restarted, and wrote a line anew
        ProgressFetcher(there, here).fetch()
        assert lines.read_text() == "1\n3\n" and lines.stat().st_ino != file
        assert reader.read() == "1\n2 with previews/one.png\n"


FILLER = """
import os, sys, time
from pathlib import Path
from patchloom.platform.files.copies import cached_copy

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
    """A process that fills a copy in so many seconds and holds it until it is told to end."""

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
    with pytest.raises(UserError, match=r"part-00001\.arrow .*sha256"):
        open_dataset(str(there))
    assert not list(cache.rglob(COMPLETE))
    there.write(name, right)
    assert np.array_equal(within(4, lambda: open_dataset(str(there))).rows([9])["image"], IMAGES[9:])


def test_a_truncated_or_missing_remote_dataset_is_refused(dataset: Path, there: Folder, cache: Path) -> None:
    there.write("shards/part-00000.arrow", there.read("shards/part-00000.arrow")[:-1])
    with pytest.raises(UserError, match=r"part-00000\.arrow .*\d+ bytes"):
        open_dataset(str(there))
    assert not list(cache.rglob(COMPLETE))
    there.remove("dataset.json")
    with pytest.raises(UserError, match=rf"{there} .*dataset\.json"):
        open_dataset(str(there))
