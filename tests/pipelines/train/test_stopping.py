"""Stopping: SIGTERM at start-up, in the middle and while workers hang, and deaths of workers between checkpoints."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import psutil
import pytest
from helpers import read_output_until, start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError, WorkersFailed
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.platform.compute.stopping import RunControl
from patchloom.platform.compute.workers import Worker, run_workers
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import each_json_line, read_json
from patchloom.platform.recipe import recipe_yaml

TERMINATED = 128 + signal.SIGTERM
ENDLESS = tiny_recipe(train__images=1_000_000, train__log_every_images=8)


def start_endless(pixels: Path, folder: Path, *more: str) -> Popen[str]:
    (folder / "recipe.yaml").write_text(recipe_yaml(ENDLESS))
    return start_cli("train", "recipe.yaml", "--data", str(pixels), "--out", "run", *more, cwd=folder)


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_before_workers_exist_ends_within_seconds(pixels: Path, tmp_path: Path) -> None:
    process = start_endless(pixels, tmp_path, "--workers", "2")
    read_output_until(process, "waiting for 2 workers")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == TERMINATED, output
    assert "--resume" in output.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
def test_second_sigterm_ends_a_run_whose_workers_hang(pixels: Path, tmp_path: Path) -> None:
    process = start_endless(pixels, tmp_path, "--workers", "2")
    wait_until(lambda: newest_checkpoint(tmp_path / "run"), process)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_train_worker(child)]
    workers[1].suspend()  # the other one waits for it in the all-reduce
    try:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutExpired):
            process.communicate(timeout=5)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers[1].kill()
    assert process.returncode == TERMINATED, output
    assert "step" in output.splitlines()[-1] and "--resume" in output.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_to_the_process_group_leaves_a_checkpoint(pixels: Path, tmp_path: Path) -> None:
    process = start_endless(pixels, tmp_path, "--workers", "2")
    wait_until(lambda: newest_checkpoint(tmp_path / "run"), process)
    before = newest_checkpoint(tmp_path / "run")
    time.sleep(1)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as batch schedulers do
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TERMINATED, output
    assert time.monotonic() - began < 60
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and before is not None and newest >= before
    assert f"step {read_json(newest / 'checkpoint.json')['step']:,}" in output.splitlines()[-1], output
    assert "Traceback" not in output


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_after_the_workers_were_killed_ends_in_one_line(pixels: Path, tmp_path: Path) -> None:
    process = start_endless(pixels, tmp_path, "--workers", "2")
    wait_until(lambda: newest_checkpoint(tmp_path / "run"), process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if is_train_worker(child):
            child.kill()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TERMINATED, output
    assert "--resume" in output.splitlines()[-1] and "Traceback" not in output


def is_train_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in process.cmdline()[0]
    except (psutil.Error, IndexError):  # it has just ended
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signal_before_the_first_step_ends_training_in_this_process(
    pixels: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_endless(pixels, tmp_path, "--workers", "0")
    wait_until((tmp_path / "run" / "recipe.yaml").is_file, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    assert "--resume" in output.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("moment", ["starting Ray", "tiny:"], ids=["start", "middle"])
def test_signal_ends_prepare_on_ray(images: Path, tmp_path: Path, moment: str, number: signal.Signals) -> None:
    process = start_cli("prepare", str(images), "data", "--resolution", "16", "--workers", "2", cwd=tmp_path)
    if moment == "starting Ray":
        read_output_until(process, moment)
    else:
        wait_until(lambda: (tmp_path / "data" / ".work").is_dir(), process)
        time.sleep(3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (128 + number, 0), output
    assert process.returncode == 0 or "again" in output.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_autoencoder_stops_at_sigterm_and_continues(pixels: Path, tmp_path: Path, workers: int) -> None:
    arguments = ("autoencoder", "train", str(pixels), "--out", "run", "--widths", "8,8", "--patch", "8")
    arguments = (*arguments, "--images", "800", "--workers", str(workers))
    process = start_cli(*arguments, cwd=tmp_path)
    wait_until(lambda: (tmp_path / "run" / "progress.jsonl").is_file() and len(lines(tmp_path / "run")) > 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == TERMINATED, output
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    step = read_json(newest / "checkpoint.json")["step"]
    again = start_cli(*arguments, cwd=tmp_path)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and f"from step {step}" in output, output


def lines(run: Path) -> list[Any]:
    return list(each_json_line(run / "progress.jsonl"))


def control_of(folder: Path) -> RunControl:
    """The progress of a loop is a number in a file."""
    step = folder / "step"
    step.write_text("0")
    return RunControl(
        ask=lambda: None,
        save=lambda: None,
        has_begun=lambda: False,
        reset=lambda: None,
        newest_step=lambda: int(step.read_text()),
        run=Folder.at(folder),
    )


@dataclass(frozen=True)
class Deaths:
    """What a loop does each time it starts, until it has died so many times."""

    folder: Path
    count: int
    makes_progress: bool


def dying_loop(worker: Worker, deaths: Deaths) -> str:
    died = len(list(deaths.folder.glob("died-*")))
    if died == deaths.count:
        return "finished"
    (deaths.folder / f"died-{died}").touch()
    print(f"the loop starts {died}")
    if deaths.makes_progress:
        (deaths.folder / "step").write_text(str(died + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"broken at start {died}")


@pytest.mark.ray
@pytest.mark.slow
def test_deaths_with_progress_between_them_do_not_end_a_run(ray_cluster: None, tmp_path: Path) -> None:
    control = control_of(tmp_path)
    result = run_workers(dying_loop, Deaths(tmp_path, 5, True), 1, tmp_path / "ray", "deaths", control)
    assert result == "finished"


@pytest.mark.ray
@pytest.mark.slow
def test_fourth_failure_without_progress_ends_a_run(ray_cluster: None, tmp_path: Path) -> None:
    control = control_of(tmp_path)
    with pytest.raises(WorkersFailed, match=r"worker 0 on \S+ failed.*broken at start 3") as caught:
        run_workers(dying_loop, Deaths(tmp_path, 9, False), 1, tmp_path / "ray", "failures", control)
    logs = sorted((tmp_path / "logs").iterdir())
    assert [log.name for log in logs] == [f"worker-000-000{number}.log" for number in range(1, 5)]
    assert str(logs[-1]) in str(caught.value) and "in dying_loop" in str(caught.value)
    for number, log in enumerate(logs):
        assert log.read_text().count(f"the loop starts {number}") == 1 and "Traceback" in log.read_text()
    assert len(list(tmp_path.glob("died-*"))) == 4


def mistaken_loop(worker: Worker, folder: Path) -> None:
    (folder / f"call-{os.getpid()}").touch()
    raise UserError("the recipe is wrong")


@pytest.mark.ray
@pytest.mark.slow
def test_mistake_of_the_user_in_a_worker_is_not_tried_again(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the recipe is wrong"):
        run_workers(mistaken_loop, tmp_path, 1, tmp_path / "ray", "mistake", control_of(tmp_path))
    assert len(list(tmp_path.glob("call-*"))) == 1


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=[pytest.mark.ray, pytest.mark.slow])])
def test_max_hours_ends_with_a_checkpoint_in_time(pixels: Path, tmp_path: Path, workers: str) -> None:
    hours = 0.006 if workers == "0" else 0.03
    began = time.time()
    process = start_endless(pixels, tmp_path, "--workers", workers, "--max-hours", str(hours))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == TERMINATED, output
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.stat().st_mtime < began + 3600 * hours + 5  # on a busy machine
    assert f"step {read_json(newest / 'checkpoint.json')['step']:,}" in output.splitlines()[-1]
