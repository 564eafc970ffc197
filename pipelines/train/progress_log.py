"""The progress log of a run, continued from its newest checkpoint, and measurements that its lines wait for."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from patchloom.platform.records.run import LineFields, ProgressLine, read_progress, write_progress


class ProgressLog:
    """Writes `progress.jsonl`. Lines of steps after `step` are removed, because the steps are taken again."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        lines = [line for line in read_progress(folder) if line.step <= step]
        write_progress(folder, lines)
        self.last = lines[-1] if lines else None

    def write(self, fields: LineFields) -> None:
        """Append a line with these fields and the time, unless they have one."""
        self.last = ProgressLine.model_validate({"time_unix_s": time.time()} | fields)
        self.last.append_to(self.folder)


class LineWriter:
    """Completes and writes lines one after the other: in the caller, or in a thread while the caller goes on.

    A line waits for the ones before it, so the file has the same lines in the same order either way.

    Args:
        log: where the lines are written.
        in_background: whether to use a thread.
    """

    def __init__(self, log: ProgressLog, in_background: bool) -> None:
        self.log = log
        self.newest: Future[ProgressLine | None] = _done(log.last)
        self._thread = ThreadPoolExecutor(1, "lines") if in_background else None

    def write(self, complete: Callable[[], LineFields]) -> None:
        """Write the line of the fields that `complete` returns, after the lines before it.

        Raises:
            OSError: an earlier line could not be written, or without a thread this one.
        """
        if self.newest.done():
            self.newest.result()  # raises its error
        if self._thread is None:
            self.newest = _done(self._write(complete))
        else:
            self.newest = self._thread.submit(self._write, complete)

    def wait(self) -> None:
        """Wait until all lines are written.

        Raises:
            OSError: a line could not be written.
        """
        self.newest.result()

    def close(self) -> None:
        """Wait until all lines are written, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()
        self.wait()

    def _write(self, complete: Callable[[], LineFields]) -> ProgressLine | None:
        self.log.write(complete())
        return self.log.last


def _done(line: ProgressLine | None) -> Future[ProgressLine | None]:
    future: Future[ProgressLine | None] = Future()
    future.set_result(line)
    return future
