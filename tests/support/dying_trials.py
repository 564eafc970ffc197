"""Trials whose process dies, in a module that the processes of Ray can import."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Deaths:
    """A job whose process dies `times` times. Each time it leaves a newer checkpoint if it makes progress."""

    notes: Path
    times: int
    makes_progress: bool


def die(job: Deaths) -> None:
    """Note this call, and die if it is not the last one."""
    from ray import tune

    with job.notes.open("a") as file:
        file.write("started\n")
    if calls(job) <= job.times:
        os.kill(os.getpid(), signal.SIGKILL)
    tune.report({"loss": 1.0})


def calls(job: Deaths) -> int:
    """How often the job was started."""
    return len(job.notes.read_text().splitlines()) if job.notes.is_file() else 0


def newest_step(job: Deaths) -> int:
    """The step of its newest checkpoint."""
    return calls(job) if job.makes_progress else 0
