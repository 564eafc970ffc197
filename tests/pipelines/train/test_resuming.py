"""Resuming: a run knows its recipe and dataset, may become longer, and names what differs."""

import re
import shutil
import sys
from pathlib import Path

import mlflow
import pytest
import typer
from helpers import assert_equal_models, tiny_recipe

from patchloom.errors import Stopped, UserError
from patchloom.pipelines.cli.app import app
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.train import train, training
from patchloom.pipelines.train.resuming import differing_keys
from patchloom.platform.files.storage import read_json, write_json
from patchloom.platform.recipe import Recipe, load_recipe, recipe_yaml
from patchloom.platform.records.run import read_progress
from patchloom.platform.tracking.registry import find_version


def command_line(*arguments: str) -> None:
    typer.main.get_command(app)(list(arguments), standalone_mode=False)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(trained, tmp_path / "run")


def started(folder: Path, trained: Path, recipe: Recipe) -> Path:
    """A run folder without a step."""
    folder.mkdir()
    shutil.copy(trained / "run.json", folder)
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    return folder


def test_finished_run_becomes_longer_as_if_it_had_that_length_from_the_start(
    trained: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(tiny_recipe(train__images=300), str(pixels), str(run), workers=0)
    assert read_progress(run)[-1].step == round(300 / (8 * 1.9)) == 20
    assert register(str(run), "longer") == "models:/longer/1"
    run_id = read_json(run / "run.json")["run_id"]

    def stop(*_: object) -> None:
        raise Stopped("before the first step")

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(training, "_launch", stop)
        patched.setattr(sys, "argv", ["patchloom", "train", "--resume", "RUN"])
        command_line("train", "--resume", str(run), "--set", "train.images=600", "--workers", "0")
    assert load_recipe(run / "recipe.yaml") == tiny_recipe()
    assert read_json(run / "run.json")["continued"] == ["patchloom train --resume RUN"]
    assert load_recipe(run / "model" / "recipe.yaml").train.images == 300  # kept until the new one is written
    command_line("train", "--resume", str(run), "--workers", "0")
    assert_equal_models(run, trained)
    assert load_recipe(run / "model" / "recipe.yaml") == tiny_recipe()
    assert read_progress(run)[-1].images_seen == read_progress(trained)[-1].images_seen

    assert register(str(run), "longer") == "models:/longer/2"
    versions = [find_version("longer", version=number) for number in ("1", "2")]
    assert [version.run_id for version in versions] == [run_id, run_id]
    assert int(versions[0].tags["images_seen"]) < int(versions[1].tags["images_seen"])
    recorded = mlflow.MlflowClient().get_run(run_id)
    assert recorded.data.tags["train.images"] == "600" and recorded.info.status == "FINISHED"


def test_finished_run_that_is_resumed_alone_returns_at_once(run: Path) -> None:
    written = (run / "model" / "model.safetensors").stat().st_mtime_ns
    command_line("train", "--resume", str(run), "--workers", "0")
    assert train(None, None, str(run), resume=True, workers=0).last.step == 39
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_refusal_names_each_differing_key_with_both_values(run: Path, pixels: Path) -> None:
    with pytest.raises(UserError) as refused:
        changes = ("patches.p=0.25", "ema.0.halflife_images=100", "train.images=900")
        command_line("train", "--resume", str(run), *(f"--set={change}" for change in changes), "--workers", "0")
    for key, there, here in (
        ("patches.p", 0.5, 0.25),
        ("ema.0.halflife_images", 200.0, 100.0),
        ("train.images", 600, 900),
    ):
        assert re.search(rf"{re.escape(key)} is {there} [^;]*{here}", str(refused.value))
    assert "seed" not in str(refused.value)
    card = read_json(run / "run.json")
    write_json(run / "run.json", {**card, "dataset_fingerprint": "0" * 64})
    with pytest.raises(UserError, match=f"0{{12}} .*{re.escape(str(pixels))}"):
        train(None, str(pixels), str(run), resume=True, workers=0)


@pytest.mark.parametrize("shares_of", ["updates", "images"])
def test_run_whose_schedule_depends_on_the_length_stays_as_long(trained: Path, tmp_path: Path, shares_of: str) -> None:
    recipe = tiny_recipe(patches__schedule="progressive", patches__shares_of=shares_of)
    folder = started(tmp_path / "run", trained, recipe)
    with pytest.raises(UserError, match=f"600 .*700 .*progressive.*shares_of: {shares_of}"):
        command_line("train", "--resume", str(folder), "--set", "train.images=700", "--workers", "0")
    assert load_recipe(folder / "recipe.yaml") == recipe


def test_run_cannot_become_shorter_or_longer_without_a_checkpoint(run: Path) -> None:
    with pytest.raises(UserError, match=r"600 .*500"):
        command_line("train", "--resume", str(run), "--set", "train.images=500", "--workers", "0")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="checkpoint"):
        command_line("train", "--resume", str(run), "--set", "train.images=700", "--workers", "0")
    assert load_recipe(run / "recipe.yaml") == tiny_recipe()


def test_what_no_run_knows_must_be_given(run: Path, pixels: Path, tmp_path: Path) -> None:
    for arguments, missing in (
        (["train"], "RECIPE"),
        (["train", "demo_pixels"], "--data"),
        (["train", "--resume"], "RECIPE"),
        (["train", "--resume", str(tmp_path)], re.escape(str(tmp_path / "run.json"))),
    ):
        with pytest.raises(UserError, match=missing):
            command_line(*arguments)
    with pytest.raises(UserError, match="recipe"):
        train(None, str(pixels), str(tmp_path / "new"), workers=0)
    write_json(run / "run.json", {key: value for key, value in read_json(run / "run.json").items() if key != "dataset"})
    with pytest.raises(UserError, match="--data"):
        command_line("train", "--resume", str(run))
    write_json(run / "run.json", {**read_json(run / "run.json"), "kind": "autoencoder"})
    with pytest.raises(UserError, match="autoencoder train"):
        command_line("train", "--resume", str(run))


def test_differing_keys_reach_into_lists() -> None:
    two = [{"halflife_images": 200}, {"sigma_rel": 0.1}]
    other = tiny_recipe(ema=two, model__attention=[4])
    found = differing_keys(tiny_recipe(), other)
    assert found["model.attention"] == ([8], [4])
    assert found["ema.1.sigma_rel"] == (None, 0.1)
    assert "ema.0.halflife_images" not in found


def test_keys_that_only_warn_do_not_start_a_finished_run_again(run: Path) -> None:
    """Recipes of earlier versions lack them."""
    model, recipe = run / "model" / "model.safetensors", (run / "recipe.yaml").read_bytes()
    before = model.stat().st_mtime_ns
    shutil.rmtree(run / "checkpoints")  # nothing to continue from
    train(tiny_recipe(data__kind="pixels", data__resolution=16), None, str(run), workers=0, resume=True)
    assert (model.stat().st_mtime_ns, (run / "recipe.yaml").read_bytes()) == (before, recipe)
