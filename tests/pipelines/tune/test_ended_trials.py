"""The row of a trial whose process was stopped: finished if no step was left to take."""

import shutil
from dataclasses import replace
from pathlib import Path

import yaml
from helpers import assert_equal_models, tiny_recipe

from patchloom.pipelines.tune import trials
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.recipe.search import load_search
from patchloom.platform.records.run import read_progress, write_progress
from patchloom.platform.tracking.runs import begin_run


def job_of(search_folder: Path, pixels: Path, **changes: object) -> trials.TrialJob:
    """A trial of a search, without a folder."""
    (search_folder / "base.yaml").write_text(recipe_yaml(tiny_recipe()))
    search = {"name": "s", "recipe": "base.yaml", "space": {"patches.p": {"grid": [0.5]}}, "budget": {"images": 600}}
    (search_folder / "search.yaml").write_text(yaml.safe_dump({**search, **changes}))
    definition, base = load_search(str(search_folder / "search.yaml"))
    run_id = begin_run("search", "search", {}, {})
    shared = trials.search_job(definition, base, open_dataset(pixels), Folder.at(search_folder), run_id, 0)
    return trials.TrialJob(shared, "000", {"patches.p": 0.5})


def test_trial_that_is_stopped_after_its_last_step_is_finished(pixels: Path, trained: Path, tmp_path: Path) -> None:
    late = job_of(tmp_path, pixels)
    early = replace(late, name="001")
    for job in (early, late):
        shutil.copytree(trained, job.folder.path)  # all of its 39 updates
        shutil.rmtree(job.folder.path / "model")
    write_progress(early.folder.path, read_progress(early.folder.path)[:-1])
    stopped, finished = trials.row_of_ended_trial(early, None), trials.row_of_ended_trial(late, None)
    assert stopped.status == "stopped" and stopped.updates < 39
    assert finished.status == "finished" and finished.updates == 39
    assert finished == trials.read_trial(late.folder) == trials.row_of_ended_trial(late, None)
    assert_equal_models(late.folder.path, trained)


def test_trial_without_its_metric_has_failed(pixels: Path, trained: Path, tmp_path: Path) -> None:
    changes = {"metric": "preview_frechet_distance", "set": {"preview.frechet_samples": 1}}
    job = job_of(tmp_path, pixels, **changes)
    shutil.copytree(trained, job.folder.path)
    row = trials.row_of_ended_trial(job, None)
    assert row.status == "failed" and "preview_frechet_distance" in (row.error or "")
