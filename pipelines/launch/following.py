"""Following: shows what a job prints, on a terminal with its progress as one live line."""

import re
import signal
from collections.abc import Iterable
from contextlib import nullcontext

from rich.live import Live
from rich.text import Text

from patchloom.platform.compute.job_server import JobReport, JobState
from patchloom.platform.progress import console
from patchloom.redaction import printable

PROGRESS_LINE = re.compile(r"^  \S.*: [\d,]+/[\d,]+ \S")  # as platform/progress.py prints it to a log
RAY_LINE = re.compile(r"^Running entrypoint for job |^[\d:, -]+\s+INFO job_manager")
STOPPED = 128 + signal.SIGTERM


def show_logs(pieces: Iterable[str]) -> None:
    """Print lines as they come. On a terminal, a line of progress replaces the one before."""
    live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
    rest = ""
    with live or nullcontext():
        for piece in pieces:
            *lines, rest = (rest + piece.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
            for line in lines:
                _show_line(line, live)
    if rest:
        _show_line(rest, None)


def _show_line(line: str, live: Live | None) -> None:
    if RAY_LINE.match(line):
        return
    line = printable(line)
    if live and PROGRESS_LINE.match(line):
        live.update(Text(line), refresh=True)
    else:
        console.print(line, markup=False)


def exit_code_of(job: JobReport) -> int:
    """The exit code of a job's command; 143 for one that was stopped, and 1 for one that was lost."""
    if job.state == JobState.SUCCEEDED:
        return 0
    if job.state == JobState.STOPPED:
        return STOPPED
    return job.exit_code or 1
