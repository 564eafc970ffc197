"""What happens to long runs: a stop, a full disk, a loss that runs away, kills at any moment; nothing is lost."""

import contextlib
import math
import random
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import psutil
import pytest
from helpers import assert_equal_models, start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.models.checkpoints import load_model, read_card, save_model
from patchloom.pipelines.train import train
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.platform.files.storage import read_json, read_json_lines
from patchloom.platform.recipe import Recipe, recipe_yaml

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
    assert "--resume" in output.splitlines()[-1]
    newest = newest_checkpoint(run)
    assert newest is not None and read_json(newest / "checkpoint.json")["step"] < 39
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=120)
    assert finished.returncode == 0, output
    assert_equal_models(run, trained)


def test_a_full_disk_costs_checkpoints_and_not_the_run(pixels: Path, tmp_path: Path) -> None:
    """The process may not write files above twice the size of its model; a checkpoint has four times that."""
    recipe = tiny_recipe(model__width=64, preview__every_images=0, train__images=200)
    most = 2 * 4 * describe_plan(recipe, str(pixels)).parameters
    output, process = train_with_small_files(recipe, pixels, tmp_path, most)
    assert process.returncode == 0, output
    assert "checkpoint of step" in output
    run = tmp_path / "run"
    assert newest_checkpoint(run) is None
    assert not list((run / "checkpoints").iterdir())  # nothing half-written stays
    assert load_model(run / "model")
    assert read_json_lines(run / "progress.jsonl")[-1]["step"] == 13


def test_a_disk_without_room_for_the_model_is_said_in_a_line(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__width=64, preview__every_images=0, train__images=100)
    most = 2 * describe_plan(recipe, str(pixels)).parameters
    output, process = train_with_small_files(recipe, pixels, tmp_path, most)
    assert process.returncode == 2, output
    assert "run/model" in output.splitlines()[-1]
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
    with pytest.raises(UserError, match=r"step \d+ .*optimizer\.lr"):
        train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run" / "model").exists()
    lines = read_json_lines(tmp_path / "run" / "progress.jsonl")
    assert lines[-1]["step"] < 39
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is None or read_json(newest / "checkpoint.json")["step"] < lines[-1]["step"]


def test_a_run_whose_losses_are_no_numbers_ends_in_words(trained: Path, pixels: Path, tmp_path: Path) -> None:
    denoiser, card = load_model(trained / "model"), read_card(trained / "model")
    for parameter in denoiser.parameters():
        parameter.fill_(math.nan)
    (tmp_path / "broken").mkdir()
    save_model(tmp_path / "broken", denoiser, card)
    recipe = tiny_recipe(train__init_from=str(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"step \d+ \(loss not finite\)"):
        train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    (line,) = read_json_lines(tmp_path / "run" / "progress.jsonl")
    assert line["loss"] is None and line["bad_crops"] == line["images_seen"] > 0


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


def test_microbatches_train_the_same_model(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__dropout=0.0, train__images=300)
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


SLOW = pytest.mark.slow
INTERVAL, LARGEST_STEP = 60, 32  # images from one checkpoint to the next, and of a step on the smallest patches
TO_BE_KILLED = tiny_recipe(  # checkpoints that take long enough to be killed in, and a line for every step
    model__width=32, train__images=900, train__checkpoint_every_images=INTERVAL, train__log_every_images=1
)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nobody kills, by their number of workers."""
    runs = {workers: tmp_path_factory.mktemp("undisturbed") / "run" for workers in (0, 2)}
    for workers, run in runs.items():
        train(TO_BE_KILLED, str(pixels), str(run), workers=workers)
    return runs


def test_two_workers_train_what_one_does(undisturbed: dict[int, Path]) -> None:
    one, two = (read_json_lines(undisturbed[workers] / "progress.jsonl") for workers in (0, 2))
    assert len(one) == len(two) == 59
    assert [line["images_seen"] for line in one] == [line["images_seen"] for line in two]
    for a, b in zip(one[:50], two[:50], strict=True):  # what is promised; rounding grows with every step
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("kills", [((0, 3), (1, 6)), pytest.param(((0, "a write"), (1, 2)), marks=SLOW)], ids=str)
def test_workers_killed_at_any_moments_are_replaced_and_change_nothing(
    undisturbed: dict[int, Path], pixels: Path, tmp_path: Path, kills: tuple[tuple[int, str | int], ...]
) -> None:
    """One rank after the other in the same run, each at its moment or as soon as the one before is replaced."""
    _, process = begin(TO_BE_KILLED, pixels, tmp_path, "--workers", "2")
    run, outcomes = tmp_path / "run", []
    wait_until(lambda: images_seen(run), process)
    workers = workers_by_rank(process, run)
    for rank, moment in kills:
        assert len(workers) == 2
        lines = (run / "progress.jsonl").stat().st_ino
        outcomes.append(kill([workers[rank]], moment, process, run))
        wait_until(lambda: (run / "progress.jsonl").stat().st_ino != lines, process)  # noqa: B023 it is taken over
        workers, killed = workers_by_rank(process, run), workers
        assert not set(workers) & set(killed)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    for killed_at, at_least in outcomes:
        assert_ended_the_same(run, undisturbed[2], killed_at, at_least)


@pytest.mark.parametrize(
    ("workers", "moment"),
    [
        (0, "a write"),
        pytest.param(2, 7, marks=SLOW),
        pytest.param(0, 4, marks=SLOW),
        pytest.param(0, 5, marks=SLOW),
        pytest.param(2, 1, marks=SLOW),
        pytest.param(2, "a write", marks=SLOW),
    ],
)
def test_a_run_killed_with_all_its_processes_at_any_moment_ends_the_same(
    undisturbed: dict[int, Path], pixels: Path, tmp_path: Path, workers: int, moment: str | int
) -> None:
    arguments, process = begin(TO_BE_KILLED, pixels, tmp_path, "--workers", str(workers))
    run = tmp_path / "run"
    wait_until(lambda: images_seen(run), process)
    command = psutil.Process(process.pid)
    killed_at, at_least = kill([command, *command.children(recursive=True)], moment, process, run)
    process.communicate()
    newest = newest_checkpoint(run)
    going_on = f"from step {read_json(newest / 'checkpoint.json')['step']} " if newest else "training"
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0 and going_on in output, output
    assert_ended_the_same(run, undisturbed[workers], killed_at, at_least)


def workers_by_rank(process: Popen[str], run: Path) -> list[psutil.Process]:
    """The Ray Train workers of a command; worker 0 is the one that holds the run's lock."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended just now
            if "RayTrainWorker" in child.cmdline()[0]:
                workers.append(child)
    lock = str(run / ".worker.lock")
    return sorted(workers, key=lambda worker: lock not in [file.path for file in worker.open_files()])


def kill(victims: list[psutil.Process], moment: str | int, process: Popen[str], run: Path) -> tuple[float, int]:
    """SIGKILL in a write or at a random moment; returns the time, and the images that may not be repeated."""
    if moment == "a write":
        wait_until(lambda: newest_checkpoint(run) and half_written(run, "/state.safetensors"), process)
    else:
        images = random.Random(moment).randrange(TO_BE_KILLED.train.images - 2 * INTERVAL)
        wait_until(lambda: images_seen(run) >= images, process)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # it went with the one before
            victim.kill()
    killed_at, seen, in_flight = time.time(), images_seen(run), len(half_written(run))
    assert in_flight or moment != "a write"
    return killed_at, seen - (1 + in_flight) * INTERVAL - LARGEST_STEP


def images_seen(run: Path) -> int:
    lines = read_json_lines(run / "progress.jsonl")
    return lines[-1]["images_seen"] if lines else 0


def half_written(run: Path, file: str = "") -> list[Path]:
    """The checkpoints that are being written, or a file of theirs."""
    return list((run / "checkpoints").glob(f".step-*.partial{file}"))


def assert_ended_the_same(run: Path, wanted: Path, killed_at: float, at_least: int) -> None:
    """A killed run kept what was done before, but for `at_least`, and became the run that nobody killed."""
    lines, wanted_lines = (read_json_lines(folder / "progress.jsonl") for folder in (run, wanted))
    kept = [line["images_seen"] for line in lines if line["time_unix_s"] < killed_at]
    assert len(kept) < len(lines) and max(kept, default=0) >= at_least
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in wanted_lines]
    assert not half_written(run)
    assert_equal_models(run, wanted)


@SLOW
def test_sigterm_to_the_command_stops_its_workers_too(
    undisturbed: dict[int, Path], pixels: Path, tmp_path: Path
) -> None:
    arguments, process = begin(TO_BE_KILLED, pixels, tmp_path, "--workers", "2")
    run = tmp_path / "run"
    wait_until(lambda: images_seen(run), process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0, output
    assert_equal_models(run, undisturbed[2])
