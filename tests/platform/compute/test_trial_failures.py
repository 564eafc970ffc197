"""Trials whose process dies: one that makes progress goes on, one that makes none ends with its reason."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchloom.platform.compute.tuner import TuneResources, run_on_tune
from patchloom.platform.files.folder import Folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
    return len(job.notes.read_text().splitlines()) if job.notes.is_file() else 0


def newest_step(job: Deaths) -> int:
    return calls(job) if job.makes_progress else 0


def test_a_trial_ends_after_four_deaths_without_progress(ray_cluster: None, tmp_path: Path) -> None:
    steady, stuck = Deaths(tmp_path / "steady", 6, True), Deaths(tmp_path / "stuck", 100, False)
    ended = run_on_tune(die, [steady, stuck], Folder.at(tmp_path / "ray"), TuneResources(2), newest_step)
    problems = {found.job: found.problem for found in ended}
    assert problems == {steady: None, stuck: "its process was killed, 4 times in a row"}
    assert (calls(steady), calls(stuck)) == (7, 4)
