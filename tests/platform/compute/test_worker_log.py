"""Worker logs: what processes print on any level is in the run's folder, bounded, and without a node of its own."""

import os
from pathlib import Path

import pytest

from patchloom.platform.compute import worker_log
from patchloom.platform.compute.worker_log import WorkerLog, end_of_log, logs_of_worker
from patchloom.platform.files.folder import Folder


def write_log(run: Folder, lines: int) -> None:
    with WorkerLog(run, 1, 2, "cpu"):
        os.write(2, b"from a library in C\n")
        for number in range(lines):
            print(f"line {number}", flush=True)


def test_log_has_all_output_and_the_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Folder.at(tmp_path)
    with pytest.raises(ValueError, match="broken"), WorkerLog(run, 0, 1, "cpu"):
        os.write(2, b"from a library in C\n")
        raise ValueError("broken")
    (name,) = logs_of_worker(run, 0)
    text = (tmp_path / name).read_text()
    assert "from a library in C" in text and text.rstrip().endswith("ValueError: broken")
    host, end = end_of_log(run, 0)
    assert host == os.uname().nodename and end.endswith("ValueError: broken") and name in end
    print("printed again", flush=True)
    assert capfd.readouterr().out == "printed again\n"


def test_logs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: object) -> None:
    monkeypatch.setattr(worker_log, "MAX_BYTES", 10_000)
    run = Folder.at(tmp_path)
    for _ in range(worker_log.KEPT_STARTS + 2):
        write_log(run, 5000)
    names = logs_of_worker(run, 1)
    assert len(names) == worker_log.KEPT_STARTS
    assert names[-1].endswith("-0012.log")
    for name in names:
        text = (tmp_path / name).read_text()
        assert len(text) <= 10_000 and text.endswith("line 4999\n")


def test_logs_of_a_remote_run_are_sent(s3: str, cache: Path, capfd: object) -> None:
    run = Folder.at(f"{s3}/logs-test/run")
    write_log(run, 3)
    (name,) = logs_of_worker(run, 1)
    assert run.read(name).endswith(b"line 2\n")
