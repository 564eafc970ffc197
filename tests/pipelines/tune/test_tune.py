"""Searching: equal budgets, one MLflow child a trial, and a best recipe at full length."""

import contextlib
import json
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from helpers import start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.models.flops import training_flops
from patchloom.models.step_plan import plan_step
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.evaluate.memorisation import memorised_shares
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.pipelines.train.run import step_settings
from patchloom.pipelines.tune import planning, trials, tune
from patchloom.pipelines.tune.planning import plan_trials
from patchloom.platform.dataset import open_dataset
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import each_json_line, read_json
from patchloom.platform.recipe import Recipe, load_recipe, recipe_yaml
from patchloom.platform.recipe.search import load_search
from patchloom.platform.records.search import SearchCard

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
    rows = list(each_json_line(folder / "trials.jsonl"))
    assert sorted(trial["settings"]["patches.p"] for trial in rows) == [0.5, 1.0]
    assert [trial["updates"] for trial in rows] == [5, 5]
    assert rows[0]["held_out_loss"] == min(trial["held_out_loss"] for trial in rows)
    best = load_recipe(folder / "best.yaml")
    assert best.patches.p == rows[0]["settings"]["patches.p"]
    assert best.train.images == tiny_recipe().train.images
    assert best.preview == tiny_recipe().preview

    client = mlflow.MlflowClient(f"sqlite:///{mlflow_store / 'mlflow.db'}")
    for trial in rows:
        run = client.get_run(trial["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == result.run_id
        assert run.data.params["patches.p"] == str(trial["settings"]["patches.p"])
        setting = f"p {trial['settings']['patches.p']:g}"
        assert run.info.run_name == f"trial {trial['name']}: {setting}, seed {tiny_recipe().seed}"
        assert run.data.metrics["held_out_loss"] == pytest.approx(trial["held_out_loss"])
    assert client.get_run(result.run_id).data.metrics["trials"] == 2

    with pytest.raises(UserError, match="--restore"):
        tune(write_search(tmp_path), str(pixels), str(folder))
    written = {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*/model/model.json")}
    assert len(written) == 2
    restored = tune(write_search(tmp_path), str(pixels), str(folder), restore=True)
    assert [trial["held_out_loss"] for trial in restored.trials] == [trial["held_out_loss"] for trial in rows]
    assert written == {path: path.stat().st_mtime_ns for path in written}
    with pytest.raises(UserError, match="another search"):
        tune(write_search(tmp_path, budget={"updates": 6}), str(pixels), str(folder), restore=True)

    more = tune(write_search(tmp_path), str(pixels), str(folder), restore=True, add_seeds=1)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    by_name = {trial.name: trial for trial in more.trials}
    assert sorted(by_name) == ["000", "001", "002", "003"]
    assert [by_name[name].repeat for name in sorted(by_name)] == [0, 0, 1, 1]
    assert [by_name[name].settings for name in ("002", "003")] == [by_name[name].settings for name in ("000", "001")]
    seeds = [load_recipe(folder / "trials" / name / "recipe.yaml").seed for name in sorted(by_name)]
    assert seeds == [tiny_recipe().seed] * 2 + [tiny_recipe().seed + 1] * 2
    again = tune(write_search(tmp_path), str(pixels), str(folder), restore=True)  # the added seeds belong to it
    assert again.trials == more.trials and "(n = 2)" in (folder / "report.html").read_text()
    with pytest.raises(UserError, match="--restore"):
        tune(write_search(tmp_path), str(pixels), str(tmp_path / "new"), add_seeds=1)


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
    order = [(0.5, 0, 3), (0.5, 1, 4), (1.0, 0, 3), (1.0, 1, 4)]
    assert [(trial.settings["patches.p"], trial.repeat, trial.recipe.seed) for trial in planned] == order
    longer = plan_trials(search, base, open_dataset(pixels), added_seeds=1)  # after the others
    assert longer[:4] == planned
    assert [(trial.settings["patches.p"], trial.repeat, trial.recipe.seed) for trial in longer[4:]] == [
        (0.5, 2, 5), (1.0, 2, 5),
    ]  # fmt: skip
    for trial in planned:
        images = trial.recipe.train.images
        assert images == pytest.approx(100 * 8 * (1.9 if trial.settings["patches.p"] == 0.5 else 1))
        assert trial.recipe.optimizer.lr_rampup_images == pytest.approx(images / 10, abs=1)
        assert trial.recipe.ema[0].halflife_images == pytest.approx(images / 4, abs=1)


@dataclass(frozen=True)
class DrawnCost:
    updates: int
    crops: int
    flops: int


def drawn_cost(recipe: Recipe, dataset: Dataset) -> DrawnCost:
    """What the steps of a recipe cost with the patch sizes that they draw."""
    settings = step_settings(recipe, 16)
    plans = [plan_step(settings, step, 0) for step in range(settings.updates)]
    crops = [(group.size.pixels, len(group.crops)) for plan in plans for group in plan.share()]
    denoiser = new_model_card(recipe, dataset).denoiser
    flops = sum(training_flops(denoiser, side) * count for side, count in crops)
    return DrawnCost(len(plans), sum(count for _, count in crops), flops)


def test_equal_costs_add_trials_as_long_as_the_cheapest_one(pixels: Path, tmp_path: Path) -> None:
    changes = {"repeats": 2, "equal_costs": ["images", "updates"], "of_budget": {"optimizer.lr_rampup_images": 0.1}}
    search, base = load_search(write_search(tmp_path, budget={"flops": 1e10}, **changes))
    dataset = open_dataset(pixels)
    planned = plan_trials(search, base, dataset)
    assert [(trial.settings["patches.p"], trial.repeat, trial.equal) for trial in planned] == [
        *[(p, repeat, None) for p in (0.5, 1.0) for repeat in (0, 1)],
        *[(0.5, repeat, unit) for unit in ("images", "updates") for repeat in (0, 1)],  # p = 1 has the fewest of both
    ]  # fmt: skip
    recipes = [trial.recipe for trial in planned if trial.recipe]
    assert [recipe.seed for recipe in recipes] == [3, 4] * 4
    spent = [drawn_cost(recipe, dataset) for recipe in recipes]
    full = recipes[2].train.images
    for number, recipe in enumerate(recipes):
        assert recipe.optimizer.lr_rampup_images == pytest.approx(recipe.train.images / 10, abs=1)
        if number < 4:  # the sizes of the seed decide how many steps cost as much, within half of a full-size step
            assert spent[number].flops == pytest.approx(1e10, abs=0.5 * spent[2].flops / spent[2].updates)
    assert [one.crops for one in spent[4:6]] == pytest.approx([full] * 2, abs=16)  # a step has up to 32 crops
    assert [one.updates for one in spent[6:]] == [spent[2].updates] * 2
    lengths = [trial.expected_images for trial in planned if trial.repeat == 0 and trial.equal is None]
    assert plan_trials(search, base, dataset, lengths) == planned  # as a restored search does
    with pytest.raises(UserError, match="equal_costs"):
        load_search(write_search(tmp_path, equal_costs=["images"], scheduler={"kind": "asha"}))


def test_seconds_buy_what_a_step_was_measured_to_take(
    pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, base = load_search(write_search(tmp_path, budget={"seconds": 10}))
    dataset = open_dataset(pixels)
    assert all(trial.recipe and trial.recipe.train.images > 0 for trial in plan_trials(search, base, dataset))
    seconds_of_crop = {16: 0.01, 8: 0.004, 4: 0.001}
    monkeypatch.setattr(planning, "seconds_of_crops", lambda *_: seconds_of_crop)
    half, full = (trial.recipe for trial in plan_trials(search, base, dataset))
    assert half and full
    # a step has 8 crops of 16 pixels, 16 of 8 or 32 of 4: 0.08, 0.064 or 0.032 s, in shares of .5, .3 and .2
    assert full.train.images == round(10 / 0.08 * 8)
    assert half.train.images == round(10 / (0.5 * 0.08 + 0.3 * 0.064 + 0.2 * 0.032) * 8 * 1.9)
    again = plan_trials(search, base, dataset, lengths=[100, 200])
    assert [trial.recipe.train.images for trial in again if trial.recipe] == [100, 200]  # measured once, and kept


def test_lengths_of_a_budget_in_seconds_are_measured_like_a_trial_and_kept(
    ray_cluster: None, pixels: Path, tmp_path: Path
) -> None:
    result = tune(write_search(tmp_path, budget={"seconds": 0.5}), str(pixels), str(tmp_path / "search"))
    card = SearchCard.read(Folder.at(tmp_path / "search"))
    assert len(card.images) == 2 and all(length and length > 1 for length in card.images)
    trained = [load_recipe(tmp_path / "search" / "trials" / name / "recipe.yaml") for name in ("000", "001")]
    assert [recipe.train.images for recipe in trained] == card.images
    rows = sorted(result.trials, key=lambda trial: trial.name)
    assert [row.updates for row in rows] == [step_settings(recipe, 16).updates for recipe in trained]


def test_what_no_recipe_can_be_is_named_before_anything_starts(pixels: Path, tmp_path: Path) -> None:
    path = write_search(tmp_path, space={"patches.p": {"grid": [0.5, 1.4]}})
    with pytest.raises(UserError, match=r"setting 1 \(p 1.4\): patches.p: 1.4 "):
        tune(path, str(pixels), str(tmp_path / "search"))
    path = write_search(tmp_path, space={"model.blocks": {"grid": [0, -1]}})
    with pytest.raises(UserError, match="blocks"):
        tune(path, str(pixels), str(tmp_path / "search"))
    assert not (tmp_path / "search").exists()


@pytest.mark.slow
def test_impossible_settings_are_failed_trials_with_their_reason(
    ray_cluster: None, pixels: Path, tmp_path: Path
) -> None:
    third = [{"fraction": 0.3, "weight": 1.0, "batch_multiplier": 2}]
    also = [{"patches.sizes": third}, {"optimizer.lr": 1e30, "optimizer.lr_rampup_images": 0}, {"patches.p": 0.5}]
    path = write_search(tmp_path, space={"patches.p": {"grid": [1.0]}}, also=also)
    result = tune(path, str(pixels), str(tmp_path / "search"), register_best="tuned")
    assert [trial["status"] for trial in result.trials] == ["finished", "finished", "failed", "failed"]
    not_divisible, diverged = sorted(result.trials[2:], key=lambda trial: str(trial["name"]))
    assert "fraction 0.3 of 16 pixels is 4.8" in not_divisible["error"]
    assert "the loss diverged" in diverged["error"]
    best = tmp_path / "search" / "trials" / result.trials[0]["name"]
    version = mlflow.MlflowClient().get_model_version("tuned", "1")
    assert version.run_id == result.trials[0]["run_id"] == read_json(best / "run.json")["run_id"]
    page = (tmp_path / "search" / "report.html").read_text()
    assert "fraction 0.3 of 16 pixels" in page and "lowest mean" in page


def test_a_trial_that_fails_is_marked_and_the_others_finish(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    (folder / "trials" / "001").mkdir(parents=True)
    (folder / "trials" / "001" / "progress.jsonl").mkdir()  # the second trial cannot write its lines
    result = tune(write_search(tmp_path), str(pixels), str(folder))
    assert [trial["status"] for trial in result.trials] == ["finished", "failed"]
    assert "progress.jsonl" in result.trials[1]["error"]
    assert read_json(folder / "search.json")["kind"] == "search"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"patches.schedule": {"grid": ["stochastic", "progressive"]}}}, r"^scheduler\.kind"),
        (
            {"space": {"patches.p": {"grid": [0.5]}}, "also": [{"patches.schedule": "progressive"}]},
            r"^scheduler\.kind",
        ),
        ({"set": {"preview.every_images": 0}}, "held_out_loss.*held_out_every_images"),
    ],
)
def test_what_cannot_be_compared_half_way_does_not_compete(
    changes: dict[str, Any], words: str, pixels: Path, tmp_path: Path
) -> None:
    path = write_search(tmp_path, scheduler={"kind": "asha"}, **changes)
    with pytest.raises(UserError, match=words):
        tune(path, str(pixels), str(tmp_path / "search"))
    assert not (tmp_path / "search").exists()


def test_advice_and_early_stops_end_in_time(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "space": {"optimizer.lr": {"loguniform": [1e-6, 1e-2]}, "loss.reduction": {"choice": ["mean", "sum"]}},
        "searcher": "tpe",
        "trials": 4,
        "scheduler": {"kind": "asha", "grace": 0.3, "reduction": 2},
        "of_budget": {"train.held_out_every_images": 0.1},
        "budget": {"updates": 60},
    }
    began = time.monotonic()
    result = tune(write_search(tmp_path, **changes), str(pixels), str(tmp_path / "search"))
    assert time.monotonic() - began < 300
    assert sorted(trial["name"] for trial in result.trials) == ["000", "001", "002", "003"]
    assert {trial["status"] for trial in result.trials} <= {"finished", "stopped"}
    assert all(1e-6 <= trial["settings"]["optimizer.lr"] <= 1e-2 for trial in result.trials)
    client = mlflow.MlflowClient()
    for trial in result.trials:
        assert trial["status"] == "finished" or trial["updates"] < 60
        assert (
            client.get_run(trial["run_id"]).info.status
            == {"finished": "FINISHED", "stopped": "KILLED"}[trial["status"]]
        )
    again = tune(write_search(tmp_path, **changes), str(pixels), str(tmp_path / "search"), restore=True)
    assert again.trials == result.trials


def test_a_forgotten_trials_folder_does_not_answer_for_another_setting(pixels: Path, tmp_path: Path) -> None:
    space = {"patches.p": {"uniform": [0, 1]}}
    search, base = load_search(write_search(tmp_path, space=space, searcher="tpe", trials=2))
    shared = trials.search_job(search, base, open_dataset(pixels), Folder.at(tmp_path), "no-run", 0)
    one, other = (trials.TrialJob(shared, "000", {"patches.p": p}) for p in (0.25, 0.75))
    folder = one.folder.path
    folder.mkdir(parents=True)
    recipe = trials._adaptive_recipe(one)
    assert recipe.patches.p == 0.25
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    (folder / "trial.json").write_text(json.dumps(one.row("finished").to_dict()))
    assert trials.is_finished(one) and not trials.is_finished(other)
    assert trials._adaptive_recipe(one) == recipe and (folder / "trial.json").is_file()
    assert trials._adaptive_recipe(other).patches.p == 0.75
    assert not folder.exists()


@pytest.mark.slow
def test_a_frontier_and_trials_of_two_workers_end_in_time(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "space": {"patches.p": {"uniform": [0, 1]}, "budget.share": {"choice": [0.2, 1]}},
        "searcher": "frontier",
        "trials": 2,
        "budget": {"updates": 10},
    }
    began = time.monotonic()
    result = tune(write_search(tmp_path, **changes), str(pixels), str(tmp_path / "search"), workers=2)
    assert time.monotonic() - began < 300
    assert [trial["status"] for trial in result.trials] == ["finished", "finished"]
    for trial in result.trials:
        assert trial["updates"] == 10 * trial["settings"]["budget.share"]


@pytest.mark.slow
def test_a_final_distance_is_that_of_the_trials_samples(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    final = {"features": "colours", "samples": 6, "steps": 2}
    space = {"data.images": {"grid": [12, None]}}
    path = write_search(tmp_path, final=final, metric="final_distance", space=space)
    result = tune(path, str(pixels), str(tmp_path / "search"))
    found, data = [], open_dataset(pixels)
    rows = len(data.split("train", 0.2))
    for trial in result.trials:
        run = tmp_path / "search" / "trials" / trial["name"]
        sample(str(run), str(tmp_path / "again" / trial["name"]), "0-5", steps=2, workers=0)
        measured = evaluate(str(tmp_path / "again" / trial["name"]), str(pixels), metrics=("fd",), features="colours")
        assert trial["final_distance"] == pytest.approx(measured["metrics"]["frechet_distance"], rel=1e-6)
        found.append(trial["final_distance"])
        images = trial["settings"]["data.images"]
        train, held_out = data.split("train", 0.2, images), data.split("held_out", 0.2)
        shares = memorised_shares(str(tmp_path / "again" / trial["name"]), str(pixels), train, held_out, "colours")
        assert shares is not None and trial["training_images"] == (images or rows)
        assert (trial["memorised_share"], trial["memorised_by_chance"]) == (shares.samples, shares.held_out)
    assert found == sorted(found)


@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on(pixels: Path, tmp_path: Path) -> None:
    path = write_search(tmp_path, space={"patches.p": {"grid": [0.5]}}, budget={"updates": 400})
    process = start_cli("tune", path, "--data", str(pixels), "--out", str(tmp_path / "search"), cwd=tmp_path)
    run = tmp_path / "search" / "trials" / "000"
    wait_until(lambda: newest_checkpoint(run), process)
    lock = str(run / ".lock")
    victims = [child for child in psutil.Process(process.pid).children(recursive=True) if lock in files_of(child)]
    assert len(victims) == 1
    victims[0].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (row,) = each_json_line(tmp_path / "search" / "trials.jsonl")
    assert row["status"] == "finished" and row["updates"] == 400
    assert lock not in output and "best of 1 settings" in output


def files_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return [file.path for file in process.open_files()]
    return []


@pytest.mark.slow
def test_a_stopped_and_killed_search_ends_as_if_it_had_not_been(pixels: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGKILL of the driver and all of its Ray; finished trials stay, and the table is the same."""
    changes: dict[str, Any] = {"space": {"patches.p": {"grid": [0.25, 0.5, 1.0]}}, "repeats": 2,
                               "budget": {"updates": 200}}  # fmt: skip
    path, places = write_search(tmp_path, **changes), tmp_path / "killed" / "trials"
    command = ["tune", path, "--data", str(pixels)]

    def begun(out: str, finished: int, *options: str) -> subprocess.Popen[str]:
        process = start_cli(*command, "--out", str(tmp_path / out), *options, cwd=tmp_path)
        wait_until(lambda: len(list(places.glob("*/trial.json"))) >= finished, process)
        return process

    stopped = begun("killed", 1)
    stopped.send_signal(signal.SIGINT)
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "patchloom: stopped" in output and "--restore" in output
    assert "Traceback" not in output
    killed = begun("killed", 3, "--restore")
    for process in [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate()
    before = {place: place.stat().st_mtime_ns for place in places.glob("*/trial.json")}
    assert 3 <= len(before) < 6
    for out, options in (("killed", ["--restore"]), ("whole", [])):
        ended = start_cli(*command, "--out", str(tmp_path / out), *options, cwd=tmp_path)
        output, _ = ended.communicate(timeout=600)
        assert ended.returncode == 0, output
    assert before == {place: place.stat().st_mtime_ns for place in before}
    tables = [list(each_json_line(tmp_path / out / "trials.jsonl")) for out in ("killed", "whole")]
    chance = {"seconds", "run_id"}
    table, whole = ([{key: row[key] for key in row.keys() - chance} for row in rows] for rows in tables)
    assert table == whole


@pytest.mark.slow
def test_secrets_of_the_command_are_not_in_the_logs_of_ray(
    pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "planted-secret-of-a-store"
    path = write_search(tmp_path, space={"patches.p": {"grid": [0.5]}})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with tempfile.TemporaryDirectory(dir="/tmp") as sessions:  # a short path, because Ray's sockets are in it
        monkeypatch.setenv("RAY_TMPDIR", sessions)
        process = start_cli("tune", path, "--data", str(pixels), "--out", str(tmp_path / "search"), cwd=tmp_path)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        logs = [log for log in Path(sessions).rglob("*.log") if log.is_file()]
        assert logs and not [log for log in logs if secret in log.read_text(errors="replace")]
