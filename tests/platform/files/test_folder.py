"""Folders: the same verbs here, on a real S3-compatible server, and on what fsspec adds."""

import hashlib
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from patchloom.errors import UserError
from patchloom.platform.files import patience
from patchloom.platform.files.folder import Folder, is_remote

NAMES = ("with space", "Läufe/ε 日本", "run#2", "a?b", "a%20b", "a+b&c=d")
CANNOT_BE_READ = Path("/proc/self/mem")  # opens, and fails at its first byte


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder of each kind."""
    if request.param == "local":
        return Folder.at(tmp_path / "folder")
    base = request.getfixturevalue("s3") if request.param == "s3" else "memory://patchloom"
    return Folder.at(f"{base}/{tmp_path.name}/folder/")


def test_written_files_can_be_read_and_listed(folder: Folder) -> None:
    folder.write("b.txt", "zwölf")
    folder.write("a/b/c.bin", b"\x00\xff")
    folder.write("empty", "")
    assert folder.read("b.txt") == b"zw\xc3\xb6lf" and folder.read("a/b/c.bin") == b"\x00\xff"
    assert folder.read("empty") == b""
    assert list(folder.files().items()) == [("a/b/c.bin", 2), ("b.txt", 6), ("empty", 0)]
    assert folder.folder("a").files() == {"b/c.bin": 2}
    assert folder.folder("a/b").read("c.bin") == b"\x00\xff"
    assert folder.has("a/b/c.bin") and not folder.has("a/b") and not folder.has("c.bin")
    folder.write("b.txt", "12")
    assert folder.read("b.txt") == b"12"
    with folder.open("a/b/c.bin") as file:
        file.seek(1)
        assert file.read(1) == b"\xff"
    assert folder.name == "folder" and folder.folder("a/b").name == "b"


def test_a_file_name_may_contain_any_character(folder: Folder, tmp_path: Path) -> None:
    for name in NAMES:
        folder.write(name, name)
        assert folder.has(name) and folder.read(name) == name.encode()
    assert folder.files() == {name: len(name.encode()) for name in NAMES}
    for number, name in enumerate(NAMES):
        folder.fetch(name, tmp_path / str(number))
        assert (tmp_path / str(number)).read_text() == name
        folder.remove(name)
    assert folder.files() == {}


def test_a_folder_name_may_contain_any_character(folder: Folder) -> None:
    for name in ("with space", "Läufe", "run#2"):
        folder.folder(name).write("x", "1")
        assert list(folder.files()) == [f"{name}/x"]
        assert folder.folder(name).files() == {"x": 1}
        folder.remove_folder(name)
        assert folder.files() == {}


def test_removing_a_folder_keeps_the_others(folder: Folder) -> None:
    for name in ("step/x", "step/deep/y", "step-2/x", "step#1/x", "steps"):
        folder.write(name, "1")
    folder.remove_folder("step#1")
    folder.remove_folder("step#1")
    assert sorted(folder.files()) == ["step-2/x", "step/deep/y", "step/x", "steps"]
    folder.remove_folder("step")
    assert sorted(folder.files()) == ["step-2/x", "steps"]


def test_a_piece_of_a_file_can_be_read(folder: Folder) -> None:
    folder.write("a", b"0123456789")
    assert folder.read_piece("a", 3, 4) == b"3456"
    with pytest.raises(FileNotFoundError):
        folder.read_piece("absent", 0, 1)


def test_calls_at_once_keep_their_order_and_raise_their_error(folder: Folder) -> None:
    for number in range(40):
        folder.write(str(number), f"<{number}>")
    numbers = (str(number) for number in range(40))
    assert list(folder.at_once(folder.read, numbers)) == [f"<{number}>".encode() for number in range(40)]
    with pytest.raises(FileNotFoundError):
        list(folder.at_once(folder.read, ["1", "absent", "2"]))


def test_a_missing_file_raises_the_same_error_on_every_file_system(folder: Folder, tmp_path: Path) -> None:
    for exists in (False, True):
        if exists:
            folder.write("other", "1")
        assert not folder.has("absent") and folder.folder("absent").files() == {}
        with pytest.raises(FileNotFoundError):
            folder.read("absent")
        with pytest.raises(FileNotFoundError):
            folder.fetch("absent", tmp_path / "here" / "file")
        assert list((tmp_path / "here").iterdir()) == []
        folder.remove("absent")
        folder.remove_folder("absent")
    assert folder.files() == {"other": 1}


def test_json_keeps_its_order_and_damaged_json_raises(folder: Folder) -> None:
    folder.write_json("card.json", {"b": "ü", "a": [1, None]})
    assert list(folder.read_json("card.json").items()) == [("b", "ü"), ("a", [1, None])]
    assert folder.read("card.json").endswith(b"}\n") and "ü".encode() in folder.read("card.json")
    folder.write("card.json", "{")
    with pytest.raises(UserError, match=r"folder/card\.json"):
        folder.read_json("card.json")


def test_a_large_file_is_unchanged_after_put_and_fetch(folder: Folder, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((17 << 20) + 3)
    (tmp_path / "large").write_bytes(content)
    folder.put(tmp_path / "large", "deep/large")
    assert folder.files() == {"deep/large": (17 << 20) + 3}
    (tmp_path / "back").write_text("what was here before")
    folder.fetch("deep/large", tmp_path / "back")
    assert hashlib.sha256((tmp_path / "back").read_bytes()).digest() == hashlib.sha256(content).digest()
    assert not list(tmp_path.rglob("*.partial"))


def test_an_upload_that_fails_leaves_no_partial_file(folder: Folder) -> None:
    folder.write("file", "old")
    for name in ("file", "new"):
        with pytest.raises((OSError, UserError)):
            folder.put(CANNOT_BE_READ, name)
    assert not folder.has("new")
    assert not folder.has("file") or folder.read("file") == b"old"


def test_secrets_of_an_address_are_not_shown() -> None:
    folder = Folder.at("s3://bucket/runs/a/?endpoint_override=host:1&session_token=hush")
    assert str(folder) == "s3://bucket/runs/a" and folder.name == "a"
    assert folder.folder("b/c").address == "s3://bucket/runs/a/b/c?endpoint_override=host:1&session_token=hush"
    assert str(folder.folder("b")) == "s3://bucket/runs/a/b"
    assert "hush" not in str(Folder.at("s3://key:hush@bucket/runs/a"))
    with pytest.raises(UserError) as refused:
        Folder.at("nosuch://bucket/runs?token=hush").files()
    assert "hush" not in str(refused.value)


def test_options_of_an_address_reach_the_store(s3: str, tmp_path: Path) -> None:
    place = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    folder = Folder.at(f"{s3}/{tmp_path.name}?endpoint_override={place}&scheme=http&region=eu-central-1")
    folder.folder("a").write("x", "1")
    assert folder.files() == {"a/x": 1} == Folder.at(str(folder)).files()


def test_a_local_address_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.at("file:///data/a?b").path == Path("/data/a?b") and not is_remote("file:///data")
    assert Folder.at("runs/#1").path == tmp_path / "runs" / "#1"
    assert str(Folder.at(tmp_path)) == str(tmp_path) and not Folder.at(tmp_path).is_remote
    with pytest.raises(ValueError, match="remote"):
        _ = Folder.at("s3://bucket/a").path


def one_line(error: UserError) -> str:
    """The words of an error, which must be one line of bearable length."""
    assert "\n" not in str(error) and len(str(error)) < 400
    return str(error)


def test_the_error_of_a_missing_bucket_is_one_line(s3: str, tmp_path: Path) -> None:
    folder = Folder.at("s3://no-such-bucket/run")
    (tmp_path / "file").write_text("x")
    for verb in (lambda: folder.write("x", "1"), lambda: folder.put(tmp_path / "file", "x")):
        with pytest.raises(UserError, match="s3://no-such-bucket/run") as refused:
            verb()
        assert "bucket does not exist" in one_line(refused.value)


def test_the_error_of_a_server_that_does_not_answer_is_one_line(s3: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^s3://bucket/x ") as refused:
        Folder.at("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http").files()
    assert time.monotonic() - began < 30  # six seconds, in which pyarrow tries again
    assert "connect" in one_line(refused.value) and "scheme=http" not in str(refused.value)


def test_the_error_of_an_invalid_address_is_one_line(s3: str) -> None:
    with pytest.raises(UserError, match="nosuch://") as refused:
        Folder.at("nosuch://bucket/x").write("a", "1")
    one_line(refused.value)
    with pytest.raises(UserError, match="s3://"):
        Folder.at("s3://").files()


def test_a_misspelled_option_is_named(s3: str) -> None:
    with pytest.raises(UserError, match="endpoint_overide") as refused:
        Folder.at(f"{s3}/x?endpoint_overide=127.0.0.1:1").files()
    assert "s3fs" not in one_line(refused.value)


def test_folders_are_created_on_a_file_system_that_has_them(tmp_path: Path) -> None:
    folder = Folder.at(f"local://{tmp_path}/there")  # writes only into folders that exist, as sftp:// does
    folder.write("a/b", "1")
    folder.put(tmp_path / "there" / "a" / "b", "c/d")
    assert folder.files() == {"a/b": 1, "c/d": 1}


def test_the_s3_server_of_the_tests_answers_as_s3_does(s3: str, tmp_path: Path) -> None:
    url = f"{os.environ['AWS_ENDPOINT_URL']}/patchloom/{tmp_path.name}"
    public = urllib.request.Request(
        f"{url}/a", b"12", {"x-amz-acl": "public-read", "Content-Type": "image/png"}, method="PUT"
    )
    urllib.request.urlopen(public, timeout=5).close()
    assert Folder.at(f"{s3}/{tmp_path.name}").files() == {"a": 2}
    with urllib.request.urlopen(f"{url}/a", timeout=5) as answer:
        assert answer.read() == b"12"
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(f"{url}/b", timeout=5)
    refused.value.close()


def test_a_store_that_has_not_answered_yet_is_named_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class SlowStore:
        @patience.patient(lambda _: "s3://slow")
        def ask(self) -> None:
            time.sleep(0.5)

    monkeypatch.setattr(patience, "STORE_NOTICE_AFTER_S", 0.05)
    SlowStore().ask()
    assert "s3://slow" in capsys.readouterr().out
    SlowStore().ask()  # it has answered
    assert capsys.readouterr().out == ""
