"""Faults of long runs: SIGTERM, a full disk, divergence, and SIGKILL at any moment."""

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
import torch
from helpers import assert_equal_models, start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.models.checkpoints import load_model, read_card, save_model
from patchloom.pipelines.train import train
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.platform.files.storage import each_json_line, read_json
from patchloom.platform.recipe import Recipe, recipe_yaml

pytestmark = pytest.mark.ray


def start_training(recipe: Recipe, pixels: Path, folder: Path, *more: str) -> tuple[list[str], Popen[str]]:
    """Start `patchloom train` in its own process group; returns its arguments and the process."""
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    arguments = ["train", "recipe.yaml", "--data", str(pixels), "--out", "run", *more]
    return arguments, start_cli(*arguments, cwd=folder)


def test_sigterm_writes_a_checkpoint_and_resume_continues_from_it(trained: Path, pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__checkpoint_every_images=10_000)  # so that the only checkpoint is that of SIGTERM
    arguments, process = start_training(recipe, pixels, tmp_path, "--workers", "0")
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


def test_full_disk_skips_checkpoints_and_training_continues(pixels: Path, tmp_path: Path) -> None:
    """The largest file is limited to twice the size of the model; a checkpoint is four times as large."""
    recipe = tiny_recipe(model__width=64, preview__every_images=0, train__images=200)
    most = 2 * 4 * describe_plan(recipe, str(pixels)).parameters
    output, process = train_with_small_files(recipe, pixels, tmp_path, most)
    assert process.returncode == 0, output
    assert "checkpoint of step" in output
    run = tmp_path / "run"
    assert newest_checkpoint(run) is None
    assert not list((run / "checkpoints").iterdir())  # no incomplete files are left
    assert load_model(run / "model")
    assert list(each_json_line(run / "progress.jsonl"))[-1]["step"] == 13


def test_disk_without_space_for_the_model_is_a_user_error(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__width=64, preview__every_images=0, train__images=100)
    most = 2 * describe_plan(recipe, str(pixels)).parameters
    output, process = train_with_small_files(recipe, pixels, tmp_path, most)
    assert process.returncode == 2, output
    assert "run/model" in output.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def train_with_small_files(recipe: Recipe, pixels: Path, folder: Path, most_bytes: int) -> tuple[str, Popen[str]]:
    """Run `patchloom train` in a process that cannot write larger files, as on a full disk."""
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


def test_divergence_ends_the_run(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(optimizer__lr=1e5, optimizer__lr_rampup_images=300)
    with pytest.raises(UserError, match=r"step \d+ .*optimizer\.lr"):
        train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run" / "model").exists()
    lines = list(each_json_line(tmp_path / "run" / "progress.jsonl"))
    assert lines[-1]["step"] < 39
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is None or read_json(newest / "checkpoint.json")["step"] < lines[-1]["step"]


def test_nan_losses_end_the_run(trained: Path, pixels: Path, tmp_path: Path) -> None:
    denoiser, card = load_model(trained / "model"), read_card(trained / "model")
    for parameter in denoiser.parameters():
        parameter.fill_(math.nan)
    (tmp_path / "broken").mkdir()
    save_model(tmp_path / "broken", denoiser, card)
    recipe = tiny_recipe(train__init_from=str(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"step \d+ \(loss not finite\)"):
        train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    (line,) = each_json_line(tmp_path / "run" / "progress.jsonl")
    assert line["loss"] is None and line["bad_crops"] == line["images_seen"] > 0


def test_fp16_whose_loss_scale_keeps_falling_ends_the_run(
    pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(torch.amp.GradScaler):
        """Every step overflows, and the scale is small after many of them."""

        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=2.0**-13, enabled=enabled)

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.fill_(math.inf)
            super().unscale_(optimizer)

    monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    with pytest.raises(UserError, match=r"fp16.*step \d+ \(loss [\d.]+\).*bf16 or fp32"):
        train(tiny_recipe(train__precision="fp16"), str(pixels), str(tmp_path / "run"), workers=0)
    (line,) = each_json_line(tmp_path / "run" / "progress.jsonl")
    assert line["loss_scale"] == 2.0 ** (-13 - line["step"])


def test_keep_rules_choose_the_checkpoints(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        patches__p=1.0, train__images=800, train__checkpoint_every_images=80, preview__every_images=80,
        train__keep={"last": 2, "every_images": 320, "best": 1},
    )  # fmt: skip
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0).folder
    kept = {path.name: read_json(path / "checkpoint.json") for path in (run / "checkpoints").iterdir()}
    steps = {int(name.removeprefix("step-")) for name in kept}
    lines = list(each_json_line(run / "progress.jsonl"))
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert set(losses) == set(range(10, 101, 10))
    best = min(losses, key=losses.__getitem__)  # of ten checkpoints, one every ten steps
    assert steps == {90, 100, 40, 80, best}
    assert all(kept[f"step-{step:08d}"]["held_out_loss"] == losses[step] for step in steps)


def test_microbatches_give_the_same_losses(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__dropout=0.0, train__images=300)
    folders = [tmp_path / "whole", tmp_path / "pieces"]
    for folder, microbatch in zip(folders, (None, 8), strict=True):
        train(recipe, str(pixels), str(folder), workers=0, microbatch=microbatch)
    one, two = (list(each_json_line(folder / "progress.jsonl")) for folder in folders)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)


def test_profile_reports_the_three_largest_costs(
    pixels: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_recipe(), str(pixels), str(tmp_path / "run"), workers=0, profile=True).folder
    (costs,) = (line for line in capsys.readouterr().out.splitlines() if "profile of" in line)
    assert costs.count("%") == 3
    assert read_json(run / "profile.json")["traceEvents"]
    assert_equal_models(run, trained)  # profiling does not change the weights


SLOW = pytest.mark.slow
INTERVAL, LARGEST_STEP = 60, 32  # images between checkpoints, and in a step on the smallest patches
# Checkpoints take long enough to be interrupted, and every step has a line. A large eps keeps Adam from turning the
# rounding of gradients near zero into whole steps.
TO_BE_KILLED = tiny_recipe(
    model__width=32,
    train__images=900,
    train__checkpoint_every_images=INTERVAL,
    train__log_every_images=1,
    optimizer__eps=1e-4,
)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that are not killed, by number of workers."""
    runs = {workers: tmp_path_factory.mktemp("undisturbed") / "run" for workers in (0, 2)}
    for workers, run in runs.items():
        train(TO_BE_KILLED, str(pixels), str(run), workers=workers)
    return runs


@pytest.mark.slow
def test_two_workers_give_the_losses_of_one(undisturbed: dict[int, Path]) -> None:
    one, two = (list(each_json_line(undisturbed[workers] / "progress.jsonl")) for workers in (0, 2))
    assert len(one) == len(two) == 59
    assert [line["images_seen"] for line in one] == [line["images_seen"] for line in two]
    for a, b in zip(one[:50], two[:50], strict=True):  # rounding differences grow with every step
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [((0, 3), (1, 6)), ((0, "a write"), (1, 2))], ids=str)
def test_killed_workers_are_replaced_without_changing_the_result(
    undisturbed: dict[int, Path], pixels: Path, tmp_path: Path, kills: tuple[tuple[int, str | int], ...]
) -> None:
    """Kills one rank after the other in the same run, each once the previous one is replaced."""
    _, process = start_training(TO_BE_KILLED, pixels, tmp_path, "--workers", "2")
    run, outcomes = tmp_path / "run", []
    wait_until(lambda: images_seen(run), process)
    workers = workers_by_rank(process, run)
    for rank, moment in kills:
        assert len(workers) == 2
        lines = (run / "progress.jsonl").stat().st_ino
        outcomes.append(kill([workers[rank]], moment, process, run))
        wait_until(lambda: (run / "progress.jsonl").stat().st_ino != lines, process)  # noqa: B023 called before it changes
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
def test_killed_run_resumes_and_ends_with_the_same_weights(
    undisturbed: dict[int, Path], pixels: Path, tmp_path: Path, workers: int, moment: str | int
) -> None:
    arguments, process = start_training(TO_BE_KILLED, pixels, tmp_path, "--workers", str(workers))
    run = tmp_path / "run"
    wait_until(lambda: images_seen(run), process)
    command = psutil.Process(process.pid)
    killed_at, at_least = kill([command, *command.children(recursive=True)], moment, process, run)
    process.communicate()
    newest = newest_checkpoint(run)
    continues = f"from step {read_json(newest / 'checkpoint.json')['step']} " if newest else "training"
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0 and continues in output, output
    assert_ended_the_same(run, undisturbed[workers], killed_at, at_least)


def workers_by_rank(process: Popen[str], run: Path) -> list[psutil.Process]:
    """The Ray Train workers of a command. Worker 0 comes first; it has the lock of the run open."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            if "RayTrainWorker" in child.cmdline()[0]:
                workers.append(child)
    lock = str(run / ".worker.lock")
    return sorted(workers, key=lambda worker: lock not in [file.path for file in worker.open_files()])


def kill(victims: list[psutil.Process], moment: str | int, process: Popen[str], run: Path) -> tuple[float, int]:
    """Kill during a write or at a random moment; returns the time, and the images that must not be repeated."""
    if moment == "a write":
        wait_until(lambda: newest_checkpoint(run) and half_written(run, "/state.safetensors"), process)
    else:
        images = random.Random(moment).randrange(TO_BE_KILLED.train.images - 2 * INTERVAL)
        wait_until(lambda: images_seen(run) >= images, process)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the previous victim
            victim.kill()
    killed_at, seen, in_flight = time.time(), images_seen(run), len(half_written(run))
    assert in_flight or moment != "a write"
    return killed_at, seen - (1 + in_flight) * INTERVAL - LARGEST_STEP


def images_seen(run: Path) -> int:
    lines = list(each_json_line(run / "progress.jsonl"))
    return lines[-1]["images_seen"] if lines else 0


def half_written(run: Path, file: str = "") -> list[Path]:
    """Incomplete checkpoints, or this file in them."""
    return list((run / "checkpoints").glob(f".step-*.partial{file}"))


def assert_ended_the_same(run: Path, wanted: Path, killed_at: float, at_least: int) -> None:
    """Check that a killed run repeated no step before `at_least` images, and equals a run that was not killed."""
    lines, wanted_lines = (list(each_json_line(folder / "progress.jsonl")) for folder in (run, wanted))
    kept = [line["images_seen"] for line in lines if line["time_unix_s"] < killed_at]
    assert len(kept) < len(lines) and max(kept, default=0) >= at_least
    compared = ("step", "loss", "held_out_loss", "preview")
    assert [[line.get(key) for key in compared] for line in lines] == [
        [line.get(key) for key in compared] for line in wanted_lines
    ]
    assert not half_written(run)
    assert_equal_models(run, wanted)


@SLOW
def test_sigterm_to_the_command_stops_its_workers(undisturbed: dict[int, Path], pixels: Path, tmp_path: Path) -> None:
    arguments, process = start_training(TO_BE_KILLED, pixels, tmp_path, "--workers", "2")
    run = tmp_path / "run"
    wait_until(lambda: images_seen(run), process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0, output
    assert_equal_models(run, undisturbed[2])
