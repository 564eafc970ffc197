"""Trials whose process dies: one that makes progress goes on, one that makes none ends with its reason."""

from pathlib import Path

import pytest
from dying_trials import Deaths, calls, die, newest_step

from patchloom.platform.compute.tuner import TuneResources, run_on_tune
from patchloom.platform.files.folder import Folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_trial_ends_after_four_deaths_without_progress(ray_cluster: None, tmp_path: Path) -> None:
    steady, stuck = Deaths(tmp_path / "steady", 6, True), Deaths(tmp_path / "stuck", 100, False)
    ended = run_on_tune(die, [steady, stuck], Folder.at(tmp_path / "ray"), TuneResources(2), newest_step)
    problems = {found.job: found.problem for found in ended}
    assert problems == {steady: None, stuck: "its process was killed, again and again without a newer checkpoint"}
    assert (calls(steady), calls(stuck)) == (7, 4)
