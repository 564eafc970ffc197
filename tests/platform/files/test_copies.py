"""Copies of remote folders, mirrors of local ones, and the cache that the processes of a node share."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from helpers import names_in

from patchloom.errors import UserError
from patchloom.platform.files import copies
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.copies import (
    ProgressFetcher,
    RemoteMirror,
    local_copy,
    pull_folder,
    send_unsent,
    update_copy,
)
from patchloom.platform.files.fence import FENCE_FILE
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.journal import has_unsent
from patchloom.platform.files.storage import whole_folder

TENSORS = ("a.safetensors", "b.safetensors", "z.safetensors")


def checkpoint(run: Path, step: int, kilobytes: int = 1) -> None:
    """A checkpoint that appears whole, as training writes it."""
    (run / "checkpoints").mkdir(exist_ok=True)
    with whole_folder(run / "checkpoints" / f"step-{step}") as folder:
        for name in TENSORS:
            (folder / name).write_bytes(bytes([step]) * 1024 * kilobytes)
        (folder / "checkpoint.json").write_text(f'{{"step": {step}}}')


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


def test_tensors_without_a_card_are_pulled_each_time(there: Folder, here: Path) -> None:
    for weights in ("first", "other"):  # the averages of a run that was trained anew into the same address
        there.write("ema/sigma-rel-0.1/step-1.safetensors", weights)
        pull_folder(there, here)
        assert (here / "ema/sigma-rel-0.1/step-1.safetensors").read_text() == weights


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
                deadline = time.monotonic() + 60
                while f"checkpoints/step-{step}/checkpoint.json" not in seen and time.monotonic() < deadline:
                    time.sleep(0.01)
    finally:
        done.set()
        reader.join()
    assert len(seen) == 8 and not halves
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


def test_initial_weights_that_another_node_fetched_stay_in_the_store(there: Folder, here: Path) -> None:
    there.write("beginning/snapshot.pkl", "weights")
    there.write("checkpoints/step-1/state.safetensors", "tensors")
    there.write("checkpoints/step-1/checkpoint.json", "{}")
    pull_folder(there, here, lambda name: not name.startswith("beginning/"))
    with RemoteMirror(here, there):
        (here / "progress.jsonl").write_text("{}\n")
    assert there.read("beginning/snapshot.pkl") == b"weights" and there.has("progress.jsonl")


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


@pytest.fixture
def proxy(s3: str, s3_environment: str) -> Iterator[FaultyProxy]:
    """A proxy in front of the store."""
    with FaultyProxy(s3_environment) as started:
        yield started


def through(proxy: FaultyProxy, folder: Folder) -> Folder:
    """The same remote folder, reached through the proxy."""
    return Folder(f"{folder.address}?endpoint_override={proxy.address.removeprefix('http://')}&scheme=http")


def test_a_store_that_does_not_answer_at_the_end_raises(
    there: Folder, here: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHLOOM_STORE_WAIT_S", "0.1")
    away = through(proxy, there)
    checkpoint(here, 1)
    with pytest.raises(UserError, match=r"--resume") as refused:  # noqa: SIM117
        with RemoteMirror(here, away):
            proxy.set("503")
    message = str(refused.value)
    assert "\n" not in message and all(str(part) in message for part in (away, here, socket.gethostname()))
    assert has_unsent(here)
    proxy.set("ok")
    assert send_unsent(away, here) == 4 and not has_unsent(here)
    with RemoteMirror(here, away):
        pass
    assert list(there.files()) == names_in(here) and len(names_in(here)) == 4


def test_a_store_that_answers_again_gets_all_files(
    there: Folder, here: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.05)
    with RemoteMirror(here, through(proxy, there)):
        proxy.set("503")
        checkpoint(here, 1)
        timer = threading.Timer(1.5, proxy.set, ["ok"])
        timer.start()
    timer.join()
    assert proxy.refused
    assert list(there.files()) == names_in(here) and len(there.files()) == 4


def test_work_that_was_not_sent_is_kept_aside_when_another_copy_continued(
    there: Folder, here: Path, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHLOOM_STORE_WAIT_S", "0.1")
    away, other = through(proxy, there), tmp_path / "other"
    with RemoteMirror(here, away):
        checkpoint(here, 1)
    with pytest.raises(UserError), RemoteMirror(here, away):
        proxy.set("503")
        checkpoint(here, 3)
    proxy.set("ok")
    other.mkdir()
    update_copy(there, other, lambda name: True)
    with RemoteMirror(other, there):
        checkpoint(other, 2)
    assert send_unsent(there, here) == 0
    update_copy(there, here, lambda name: True)
    assert names_in(here) == names_in(other) == list(there.files())
    aside = tmp_path / "here-unsent-1"
    assert names_in(aside) == [
        f"checkpoints/step-3/{name}" for name in (*TENSORS[:2], "checkpoint.json", "z.safetensors")
    ]
    assert has_unsent(aside) and not has_unsent(here)


def test_a_mirror_whose_fence_was_taken_over_sends_nothing_more(
    there: Folder, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "SYNC_EVERY_S", 0.05)
    there.write_json(FENCE_FILE, {"owner": "mine"})
    with pytest.raises(UserError, match="another command"), RemoteMirror(here, there, ".stop", "mine"):
        there.write_json(FENCE_FILE, {"owner": "another"})
        checkpoint(here, 1)
        deadline = time.monotonic() + 5
        while not (here / ".stop").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (here / ".stop").exists()
    assert not [name for name in there.files() if not name.startswith(".")] and has_unsent(here)


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
    monkeypatch.setenv("PATCHLOOM_STORE_WAIT_S", "0.1")
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
