"""Storage: whole or not at all, and one process at a time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.platform.files.storage import (
    each_json_line,
    local_path,
    locked,
    make_folder,
    read_json,
    whole_folder,
    write_atomic,
    write_json_lines,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step"
    with pytest.raises(RuntimeError), whole_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with whole_folder(target) as folder:
            (folder / "file").write_text(content)
            assert not target.exists() or (target / "file").read_text() == "one"
        assert (target / "file").read_text() == content
    assert list(tmp_path.iterdir()) == [target]


def test_a_lock_excludes_others_and_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nimport time\n"
        "from patchloom.platform.files.storage import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=tmp_path.name), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with locked(tmp_path):
        pass


def test_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    write_json_lines(path, [{"step": 1}, {"step": 2}])
    with path.open("a") as file:
        file.write('{"step": 3')
    assert list(each_json_line(path)) == [{"step": 1}, {"step": 2}]
    assert list(each_json_line(tmp_path / "none.jsonl")) == []


def test_invalid_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="s3://"):
        local_path("s3://bucket/data")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json")


def test_a_tail_reads_complete_lines_once_and_a_replaced_file_from_the_start(tmp_path: Path) -> None:
    from patchloom.platform.tracking.forwarder import JsonLinesTail

    path = tmp_path / "progress.jsonl"
    tail = JsonLinesTail(path)
    assert tail.new_lines() == []
    with path.open("a") as file:
        file.write(json.dumps({"step": 1}) + "\n" + '{"st')
        file.flush()
        assert [line.step for line in tail.new_lines()] == [1]
        file.write('ep": 2}\n')
    assert [line.step for line in tail.new_lines()] == [2]
    assert tail.new_lines() == []
    write_json_lines(path, [{"step": 1}])
    assert [line.step for line in tail.new_lines()] == [1]
