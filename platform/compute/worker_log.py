"""Worker logs: what each worker of a run prints, in one file per worker and start in the folder of the run."""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.journal import LOG_FOLDER
from patchloom.platform.files.storage import make_folder
from patchloom.redaction import RedactedStream, redacted

MAX_BYTES = 4 << 20  # of a file; its oldest lines are removed
KEPT_STARTS = 10  # files per worker
SEND_EVERY_S = 5.0
SHOWN_LINES, SHOWN_WIDTH = 6, 200  # in the message about a failed worker


class WorkerLog:
    """Writes what this process prints during the block, and an exception of the block, to a file of the run.

    Args:
        run: the run folder. A remote one gets the file every few seconds and at the end.
        rank: number of this worker.
        count: number of workers.
        device: what it computes on, such as `cuda:1`.
    """

    def __init__(self, run: Folder, rank: int, count: int, device: str) -> None:
        self.run = run
        self.title = f"worker {rank} of {count} on {socket.gethostname()}, process {os.getpid()}, device {device}"
        earlier = logs_of_worker(run, rank)
        for name in earlier[: 1 - KEPT_STARTS]:
            run.remove(name)
        number = _start_number(earlier[-1]) + 1 if earlier else 1
        self.name = f"{LOG_FOLDER}/worker-{rank:03d}-{number:04d}.log"
        self.path = run.path / self.name if not run.is_remote else working_copy(run, "worker") / f".{self.name}"
        self._stop, self._sent = threading.Event(), -1
        self._thread = threading.Thread(target=self._follow, name="worker-log", daemon=True)

    def __enter__(self) -> "WorkerLog":
        make_folder(self.path.parent)
        self.path.unlink(missing_ok=True)
        self._file = self.path.open("a", buffering=1)
        self._streams, self._originals = (sys.stdout, sys.stderr), [os.dup(number) for number in (1, 2)]
        for number in (1, 2):  # also what libraries print without Python
            os.dup2(self._file.fileno(), number)
        sys.stdout = sys.stderr = RedactedStream(self._file)
        print(f"{self.title}, {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            traceback.print_exception(error)
        sys.stdout, sys.stderr = self._streams
        self._file.close()
        _redact(self.path)
        for number, original in zip((1, 2), self._originals, strict=True):
            os.dup2(original, number)
            os.close(original)
        self._stop.set()
        self._thread.join()
        self._send()

    def _follow(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self._send()

    def _send(self) -> None:
        """Keep the file small, and send it to a remote run if it has changed. Training does not depend on it."""
        with contextlib.suppress(Exception):
            if self.path.stat().st_size > MAX_BYTES:
                _shorten(self.path)
            size = self.path.stat().st_size
            if self.run.is_remote and size != self._sent:
                self.run.put(self.path, self.name)
                self._sent = size


def _redact(path: Path) -> None:
    """Hide secrets that a library has written without Python's streams."""
    with contextlib.suppress(OSError):
        text = path.read_text(errors="surrogateescape")
        if redacted(text) != text:
            path.write_text(redacted(text), errors="surrogateescape")


def _shorten(path: Path) -> None:
    """Remove lines from a file to which processes append, except the title and the last ones."""
    title, content = path.read_bytes().split(b"\n", 1)
    last = content[-MAX_BYTES // 2 :].split(b"\n", 1)[-1]
    os.truncate(path, 0)
    with path.open("ab") as file:
        file.write(title + b"\n[earlier lines were removed]\n" + last)


def logs_of_worker(run: Folder, rank: int) -> list[str]:
    """The names of the logs of a worker, by its starts."""
    names = run.folder(LOG_FOLDER).files()
    return sorted(f"{LOG_FOLDER}/{name}" for name in names if name.startswith(f"worker-{rank:03d}-"))


def _start_number(name: str) -> int:
    return int(name.removesuffix(".log").rsplit("-", 1)[-1])


def end_of_log(run: Folder, rank: int) -> tuple[str, str]:
    """The host of a worker and the last lines of its newest log, with the name of the file; empty without a log."""
    try:
        name = logs_of_worker(run, rank)[-1]
        title, *lines = run.read(name).decode(errors="replace").splitlines()
    except Exception:  # the store does not answer, or the worker did not come so far
        return "", ""
    host = title.partition(" on ")[2].partition(",")[0]
    last = [f"    {line[:SHOWN_WIDTH]}" for line in lines if line.strip()][-SHOWN_LINES:]
    return host, "\n".join([f"  the end of {run}/{name}:", *(last or ["    (empty)"])])
