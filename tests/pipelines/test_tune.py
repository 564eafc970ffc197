"""Searching: equal budgets, one MLflow child a trial, and a best recipe at full length."""

from pathlib import Path

import mlflow
import pytest
import yaml
from helpers import tiny_recipe

from patchloom.pipelines.tune import plan_trials, tune
from patchloom.platform.dataset import open_dataset
from patchloom.platform.errors import UserError
from patchloom.platform.recipe import load_recipe, recipe_yaml
from patchloom.platform.search import load_search
from patchloom.platform.storage import read_json, read_json_lines

pytestmark = pytest.mark.ray


def write_search(folder: Path, **changes: object) -> str:
    (folder / "base.yaml").write_text(recipe_yaml(tiny_recipe()))
    search = {
        "name": "two-p",
        "recipe": "base.yaml",
        "set": {"preview.every_images": 0},
        "space": {"patches.p": {"grid": [0.5, 1.0]}},
        "budget": {"updates": 5},
        **changes,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(search))
    return str(folder / "search.yaml")


def test_a_search_compares_its_trials_and_keeps_the_best(
    ray_cluster: None, pixels: Path, tmp_path: Path, mlflow_store: Path
) -> None:
    folder = tmp_path / "search"
    result = tune(write_search(tmp_path), str(pixels), str(folder))
    trials = read_json_lines(folder / "trials.jsonl")
    assert sorted(trial["settings"]["patches.p"] for trial in trials) == [0.5, 1.0]
    assert [trial["updates"] for trial in trials] == [5, 5]
    assert trials[0]["held_out_loss"] == min(trial["held_out_loss"] for trial in trials)
    best = load_recipe(folder / "best.yaml")
    assert best.patches.p == trials[0]["settings"]["patches.p"]
    assert best.train.images == tiny_recipe().train.images
    assert best.preview == tiny_recipe().preview

    client = mlflow.MlflowClient(f"sqlite:///{mlflow_store / 'mlflow.db'}")
    for trial in trials:
        run = client.get_run(trial["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == result.run_id
        assert run.data.params["patches.p"] == str(trial["settings"]["patches.p"])
        assert run.data.metrics["held_out_loss"] == pytest.approx(trial["held_out_loss"])
    assert client.get_run(result.run_id).data.metrics["trials"] == 2

    with pytest.raises(UserError, match="--restore"):
        tune(write_search(tmp_path), str(pixels), str(folder))
    written = {trial["folder"]: (Path(trial["folder"]) / "model/model.json").stat().st_mtime_ns for trial in trials}
    restored = tune(write_search(tmp_path), str(pixels), str(folder), restore=True)
    assert [trial["held_out_loss"] for trial in restored.trials] == [trial["held_out_loss"] for trial in trials]
    assert written == {place: (Path(place) / "model/model.json").stat().st_mtime_ns for place in written}
    with pytest.raises(UserError, match="another search"):
        tune(write_search(tmp_path, budget={"updates": 6}), str(pixels), str(folder), restore=True)


def test_equal_flops_buy_more_updates_of_smaller_patches(pixels: Path, tmp_path: Path) -> None:
    search, base = load_search(write_search(tmp_path, budget={"flops": 1e10}))
    dataset = open_dataset(pixels)
    half, full = (trial.recipe for trial in plan_trials(search, base, dataset))
    # R = 16: a step costs 1 at full size, 2/4 at R/2 and 4/16 at R/4, so .5 + .3 x .5 + .2 x .25 = .7 of a full one
    updates = [half.train.images / 8 / 1.9, full.train.images / 8]
    assert updates[0] / updates[1] == pytest.approx(1 / 0.7, rel=0.05)


def test_repeats_differ_in_their_seed_and_ramps_follow_the_length(pixels: Path, tmp_path: Path) -> None:
    changes = {"repeats": 2, "of_budget": {"optimizer.lr_rampup_images": 0.1, "ema.0.halflife_images": 0.25}}
    search, base = load_search(write_search(tmp_path, budget={"updates": 100}, **changes))
    planned = plan_trials(search, base, open_dataset(pixels))
    assert [(trial.settings["patches.p"], trial.repeat, trial.recipe.seed) for trial in planned] == [
        (0.5, 0, 3), (0.5, 1, 4), (1.0, 0, 3), (1.0, 1, 4),
    ]  # fmt: skip
    for trial in planned:
        images = trial.recipe.train.images
        assert images == pytest.approx(100 * 8 * (1.9 if trial.settings["patches.p"] == 0.5 else 1))
        assert trial.recipe.optimizer.lr_rampup_images == pytest.approx(images / 10, abs=1)
        assert trial.recipe.ema[0].halflife_images == pytest.approx(images / 4, abs=1)


def test_seconds_buy_what_a_step_was_measured_to_take(pixels: Path, tmp_path: Path) -> None:
    search, base = load_search(write_search(tmp_path, budget={"seconds": 10}))
    dataset = open_dataset(pixels)
    half, full = plan_trials(search, base, dataset)
    updates = [half.recipe.train.images / 8 / 1.9, full.recipe.train.images / 8]
    assert updates[0] > updates[1] > 1  # smaller patches take less time, whatever the machine
    again = plan_trials(search, base, dataset, images=[100, 200])
    assert [trial.recipe.train.images for trial in again] == [100, 200]  # measured once, and kept


def test_a_setting_that_cannot_be_built_is_named_before_anything_starts(pixels: Path, tmp_path: Path) -> None:
    path = write_search(tmp_path, space={"model.width": {"grid": [8, 144]}})
    with pytest.raises(UserError, match=r"setting 1 \(width 144\)"):
        tune(path, str(pixels), str(tmp_path / "search"))
    assert not (tmp_path / "search").exists()


def test_a_trial_that_fails_is_marked_and_the_others_finish(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    (folder / "trials" / "001").mkdir(parents=True)
    (folder / "trials" / "001" / "progress.jsonl").mkdir()  # the second trial cannot write its lines
    result = tune(write_search(tmp_path), str(pixels), str(folder))
    assert [trial["status"] for trial in result.trials] == ["finished", "failed"]
    assert "progress.jsonl" in result.trials[1]["error"]
    assert read_json(folder / "search.json")["kind"] == "search"
