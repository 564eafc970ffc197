"""Storage on bad days: a full disk, a user without rights, a line cut in the middle of a letter."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import run_python

from patchloom.errors import UserError
from patchloom.platform.files.storage import (
    each_json_line,
    local_path,
    locked,
    make_folder,
    sweep_partial,
    whole_folder,
    write_atomic,
    write_json_lines,
)

BECOME_NOBODY = "import os\nif os.geteuid() == 0:\n    os.setgid(65534)\n    os.setuid(65534)\n"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_text("old")
    done = run_python(
        "import resource\nfrom pathlib import Path\nfrom patchloom.platform.files.storage import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try:\n    write_atomic(Path({str(path)!r}), b'x' * 5000)\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    assert done.stdout.strip() == "File too large", done.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(target) as folder:
        (folder / "new").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_sweeping_removes_only_temporary_files(tmp_path: Path) -> None:
    (tmp_path / ".step.12345678.partial").mkdir()
    (tmp_path / ".step.12345678.partial" / "half").write_text("x")
    (tmp_path / ".card.json.12345678.partial").write_text("x")
    (tmp_path / "notes.partial").write_text("mine")
    (tmp_path / ".hidden").write_text("mine")
    sweep_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.partial"]


def test_a_line_cut_in_the_middle_of_a_character_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    write_json_lines(path, [{"key": "Ærø"}, {"key": "Åland"}])
    whole = path.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    for end in range(len(first), len(whole)):
        path.write_bytes(whole[:end])
        assert list(each_json_line(path)) == [{"key": "Ærø"}]


def test_missing_permissions_raise(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # may be read by all, and is written by its owner alone
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from patchloom.errors import UserError\nfrom patchloom.platform.files.storage import make_folder\n"
        f"os.chdir({str(tmp_path)!r})\n{BECOME_NOBODY}"
        "for path in ('.', 'new'):\n"
        "    try:\n        make_folder(Path(path))\n"
        "    except UserError as error:\n        print(error)\n"
    )
    if not run_python("import os; print(os.geteuid())").stdout.startswith("0"):
        tmp_path.chmod(0o555)  # the owner is an ordinary user
    done = run_python(code)
    tmp_path.chmod(0o755)
    assert done.stdout.lower().count("permission denied") == 2, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_a_folder_at_or_below_a_file_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        make_folder(tmp_path / path)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("uri", ["s3://bucket/a", "gs://bucket/a", "hdfs://host/a"])
def test_a_remote_address_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=uri):
        local_path(uri)


def test_a_file_address_and_the_home_folder_are_local(tmp_path: Path) -> None:
    assert local_path(f"file://{tmp_path}/a") == tmp_path / "a"
    assert local_path("~/a") == Path.home() / "a"
    assert local_path("a") == Path.cwd() / "a"


def test_a_lock_waits_for_the_given_time(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nimport time\nfrom patchloom.platform.files.storage import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(UserError, match=str(tmp_path)), locked(tmp_path, wait_s=0.3):
            pass
        assert time.monotonic() - began >= 0.3
        threading.Timer(0.3, holder.communicate, args=("\n",)).start()
        with locked(tmp_path, wait_s=20):
            assert (tmp_path / ".lock").exists()


def test_locks_with_different_names_are_independent(tmp_path: Path) -> None:
    with locked(tmp_path, "one"), locked(tmp_path, "two"):
        pass
    with locked(tmp_path, "one"), pytest.raises(UserError, match=str(tmp_path)), locked(tmp_path, "one"):
        pass


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "Ærø")
    assert (tmp_path / "a").read_bytes() == b"\xc3\x86r\xc3\xb8"


def test_a_reader_of_a_replaced_file_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_atomic(path, "old and long")
    with path.open() as reader:
        write_atomic(path, "new")
        assert reader.read() == "old and long"
    assert path.read_text() == "new"
