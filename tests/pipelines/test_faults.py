"""What happens to long runs: a stop, a full disk, a loss that runs away, kills at any moment; nothing is lost."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
from helpers import assert_equal_models, start_cli, tiny_recipe, wait_until

from patchloom.models.checkpoints import load_model
from patchloom.pipelines.checkpointer import newest_checkpoint
from patchloom.pipelines.plan import describe_plan
from patchloom.pipelines.train import train
from patchloom.platform.errors import UserError
from patchloom.platform.recipe import Recipe, recipe_yaml
from patchloom.platform.storage import read_json, read_json_lines

pytestmark = pytest.mark.ray


def begin(recipe: Recipe, pixels: Path, folder: Path, *more: str) -> tuple[list[str], Popen[str]]:
    """`patchloom train` in a process group of its own, and its arguments."""
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    arguments = ["train", "recipe.yaml", "--data", str(pixels), "--out", "run", *more]
    return arguments, start_cli(*arguments, cwd=folder)


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_from_it(trained: Path, pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__checkpoint_every_images=10_000)  # so that the only checkpoint is the stop's
    arguments, process = begin(recipe, pixels, tmp_path, "--workers", "0")
    run = tmp_path / "run"
    wait_until(lambda: (run / "progress.jsonl").is_file() and (run / "progress.jsonl").stat().st_size, process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "go on with --resume" in output.splitlines()[-1]
    newest = newest_checkpoint(run)
    assert newest is not None and read_json(newest / "checkpoint.json")["step"] < 39
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=120)
    assert finished.returncode == 0, output
    assert_equal_models(run, trained)


def test_a_full_disk_costs_checkpoints_and_not_the_run(pixels: Path, tmp_path: Path) -> None:
    """The process may not write files above twice the size of its model; a checkpoint has four times that."""
    recipe = tiny_recipe(model__width=64, preview__every_images=0)
    most = 2 * 4 * describe_plan(recipe, str(pixels))["parameters"]
    output, process = train_with_small_files(recipe, pixels, tmp_path, most)
    assert process.returncode == 0, output
    assert "was not written" in output and "training goes on" in output
    run = tmp_path / "run"
    assert newest_checkpoint(run) is None
    assert not list((run / "checkpoints").iterdir())  # nothing half-written stays
    assert load_model(run / "model")
    assert read_json_lines(run / "progress.jsonl")[-1]["step"] == 39


def test_a_disk_without_room_for_the_model_is_said_in_a_line(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__width=64, preview__every_images=0)
    most = 2 * describe_plan(recipe, str(pixels))["parameters"]
    output, process = train_with_small_files(recipe, pixels, tmp_path, most)
    assert process.returncode == 2, output
    assert "model was not written" in output.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def train_with_small_files(recipe: Recipe, pixels: Path, folder: Path, most_bytes: int) -> tuple[str, Popen[str]]:
    """`patchloom train` in a process that may not write larger files: what a full disk is to it."""
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, {most_bytes}))\n"
        "from patchloom.pipelines.cli import main\n"
        "main()\n"
    )
    arguments = ["train", "recipe.yaml", "--data", str(pixels), "--out", "run", "--workers", "0"]
    process = Popen([sys.executable, "-c", code, *arguments], cwd=folder, text=True, stdout=PIPE, stderr=STDOUT)
    return process.communicate(timeout=240)[0], process


def test_a_loss_that_runs_away_ends_the_run_in_words(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(optimizer__lr=1e5, optimizer__lr_rampup_images=300)
    with pytest.raises(UserError, match=r"the loss diverged by step \d+ .* lower optimizer\.lr"):
        train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run" / "model").exists()
    lines = read_json_lines(tmp_path / "run" / "progress.jsonl")
    assert lines[-1]["step"] < 39
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is None or read_json(newest / "checkpoint.json")["step"] < lines[-1]["step"]


def test_checkpoints_stay_by_rule(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        patches__p=1.0, train__images=800, train__checkpoint_every_images=80, preview__every_images=80,
        train__keep={"last": 2, "every_images": 320, "best": 1},
    )  # fmt: skip
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0).folder
    kept = {path.name: read_json(path / "checkpoint.json") for path in (run / "checkpoints").iterdir()}
    steps = {int(name.removeprefix("step-")) for name in kept}
    lines = read_json_lines(run / "progress.jsonl")
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert set(losses) == set(range(10, 101, 10))
    best = min(losses, key=losses.__getitem__)  # of the ten checkpoints, one every ten steps of 8 images
    assert steps == {90, 100, 40, 80, best}
    assert all(kept[f"step-{step:08d}"]["held_out_loss"] == losses[step] for step in steps)


def test_microbatches_train_the_same_model(trained: Path, pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__dropout=0.0)
    folders = [tmp_path / "whole", tmp_path / "pieces"]
    for folder, microbatch in zip(folders, (None, 8), strict=True):
        train(recipe, str(pixels), str(folder), workers=0, microbatch=microbatch)
    one, two = (read_json_lines(folder / "progress.jsonl") for folder in folders)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)


def test_a_profile_names_the_first_costs(
    pixels: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_recipe(), str(pixels), str(tmp_path / "run"), workers=0, profile=True).folder
    (words,) = (line for line in capsys.readouterr().out.splitlines() if "profile of" in line)
    assert words.count("%") == 3
    assert read_json(run / "profile.json")["traceEvents"]
    assert_equal_models(run, trained)  # to be watched changes nothing


@pytest.fixture(scope="module")
def undisturbed(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run whose checkpoints are large enough to be killed in."""
    recipe = tiny_recipe(model__width=64, train__images=900, train__checkpoint_every_images=60)
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe, str(pixels), str(folder), workers=0)
    return recipe, folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a write", 1, 2, 3, 4])
def test_a_run_killed_at_any_moment_ends_the_same(
    undisturbed: tuple[Recipe, Path], pixels: Path, tmp_path: Path, moment: str | int
) -> None:
    recipe, wanted = undisturbed
    arguments, process = begin(recipe, pixels, tmp_path, "--workers", "0")
    run = tmp_path / "run"
    if moment == "a write":
        wait_until(lambda: list((run / "checkpoints").glob(".step-*.partial/state.safetensors")), process)
    else:
        wait_until(lambda: newest_checkpoint(run) is not None, process)
        time.sleep(random.Random(moment).uniform(0, 3))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    newest = newest_checkpoint(run)
    if newest is not None and not (run / "model").exists():
        seen = read_json_lines(run / "progress.jsonl")[-1]["images_seen"]
        lost = seen - read_json(newest / "checkpoint.json")["images_seen"]
        assert lost <= 2 * 60 + 32  # an interval, a write in flight, and a step's rounding
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0, output
    assert_equal_models(run, wanted)


@pytest.mark.slow
def test_sigterm_to_the_command_stops_its_workers_too(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__images=6000)
    arguments, process = begin(recipe, pixels, tmp_path, "--workers", "2")
    run = tmp_path / "run"
    wait_until(lambda: newest_checkpoint(run) is not None, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0, output
    assert read_json_lines(run / "progress.jsonl")[-1]["step"] == round(6000 / (8 * 1.9))
