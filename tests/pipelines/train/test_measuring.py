"""Measurements of a run with several workers: made from a copy of the weights, in order, while training goes on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe

from patchloom.models.checkpoints import read_checkpoint_card
from patchloom.models.step_plan import plan_step
from patchloom.pipelines.train import monitor
from patchloom.pipelines.train.checkpointer import Checkpointer, newest_checkpoint
from patchloom.pipelines.train.hooks.checkpoints import CheckpointHook
from patchloom.pipelines.train.hooks.counts import CountHook
from patchloom.pipelines.train.hooks.held_out import HeldOutHook
from patchloom.pipelines.train.hooks.hook import Due, Hook
from patchloom.pipelines.train.hooks.previews import PreviewHook
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.pipelines.train.progress_log import LineWriter, ProgressLog
from patchloom.pipelines.train.run import TrainingRun, TrainJob, open_run
from patchloom.pipelines.train.snapshot import Snapshot
from patchloom.platform.compute.workers import Worker
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.recipe import Recipe
from patchloom.platform.records.run import LineFields, ProgressLine, read_progress

WAIT_S = 30.0  # only if a test fails


class SlowHook(Hook):
    """Measures the first weight of the average, when it is released."""

    released = threading.Event()
    started = threading.Event()

    def measure(self, due: Due, snapshot: Snapshot) -> LineFields:
        self.started.set()
        assert self.released.wait(WAIT_S)
        return {"held_out_loss": first_weight(snapshot.denoiser)}


def first_weight(module: torch.nn.Module) -> float:
    return float(next(module.parameters()).flatten()[0])


@pytest.fixture(autouse=True)
def held_back() -> None:
    SlowHook.released.clear()
    SlowHook.started.clear()


Watched = tuple[TrainingRun, monitor.Monitor]


@pytest.fixture
def watch(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Opens a run as a worker would, with these hooks. Nothing connects to other workers."""

    def opened(worker: Worker, *hooks: type[Hook], recipe: Recipe) -> Watched:
        monkeypatch.setattr(monitor, "HOOKS", (CountHook, *hooks))
        (tmp_path / "run").mkdir(exist_ok=True)
        job = TrainJob(recipe, new_model_card(recipe, open_dataset(str(pixels))), str(pixels), str(tmp_path / "run"))
        run = replace(open_run(Worker(), job), worker=worker)
        return run, monitor.Monitor(run)

    return opened


def take_steps(run: TrainingRun, watcher: monitor.Monitor, steps: int) -> list[float]:
    """Move the average by 1 in each step; the first weight after each."""
    weights = []
    for _ in range(steps):
        plan = plan_step(run.settings, run.state.step, run.state.images_seen)
        for parameter in run.state.emas[0].module.parameters():
            parameter.data += 1
        run.state.step += 1
        run.state.crops_by_size[0] += plan.crops
        watcher.after_step(plan)
        weights.append(first_weight(run.state.emas[0].module))
    return weights


def test_steps_go_on_while_worker_0_measures_the_weights_of_an_earlier_step(watch: Callable[..., Watched]) -> None:
    run, watcher = watch(Worker(0, 2), SlowHook, recipe=measured_once())
    with watcher:
        weights = take_steps(run, watcher, 5)  # returns, although the measurement is held back
        assert SlowHook.started.wait(WAIT_S)
        assert [line.step for line in read_progress(run.folder)] == [1, 2]
        SlowHook.released.set()
    lines = read_progress(run.folder)
    assert [line.step for line in lines] == [1, 2, 3, 4, 5]
    assert [line.held_out_loss for line in lines] == [None, None, weights[2], None, None]
    assert watcher.last_line == lines[-1]
    assert [line.time_unix_s for line in lines] == sorted(line.time_unix_s for line in lines)


def measured_once() -> Recipe:
    """Steps of 8 crops, with a line after each one and a measurement after the third one."""
    changes = {"patches__p": 1.0, "train__log_every_images": 1, "train__checkpoint_every_images": 32}
    return tiny_recipe(train__held_out_every_images=24, preview__every_images=0, **changes)


def test_worker_alone_measures_before_its_next_step(watch: Callable[..., Watched]) -> None:
    run, watcher = watch(Worker(0, 1), SlowHook, recipe=measured_once())
    SlowHook.released.set()
    with watcher:
        weights = take_steps(run, watcher, 3)
        assert [line.held_out_loss for line in read_progress(run.folder)] == [None, None, weights[2]]
        assert not any(thread.name.startswith("lines") for thread in threading.enumerate())


def test_other_workers_neither_measure_nor_write(watch: Callable[..., Watched]) -> None:
    run, watcher = watch(Worker(1, 2), SlowHook, recipe=measured_once())
    with watcher:
        take_steps(run, watcher, 5)
    assert not SlowHook.started.is_set() and not (run.folder / "progress.jsonl").exists()
    assert watcher.last_line is None


def test_checkpoint_is_complete_only_after_the_lines_before_it(watch: Callable[..., Watched]) -> None:
    """A run that is killed during a measurement continues from an earlier checkpoint and measures again."""
    run, watcher = watch(Worker(0, 2), SlowHook, CheckpointHook, recipe=measured_once())
    with watcher:
        take_steps(run, watcher, 5)  # a measurement after step 3, a checkpoint after step 4
        assert SlowHook.started.wait(WAIT_S)
        assert newest_checkpoint(run.folder) is None
        SlowHook.released.set()
    newest = newest_checkpoint(run.folder)
    assert newest is not None and newest.name == "step-00000004"


def test_measurements_do_not_pile_up(watch: Callable[..., Watched]) -> None:
    recipe = tiny_recipe(patches__p=1.0, train__log_every_images=1, train__held_out_every_images=8,
                         preview__every_images=0)  # fmt: skip
    run, watcher = watch(Worker(0, 2), SlowHook, recipe=recipe)
    with watcher:
        weights = take_steps(run, watcher, 1)
        threading.Timer(0.2, SlowHook.released.set).start()
        weights += take_steps(run, watcher, 1)  # waits for the first measurement
        assert SlowHook.released.is_set() and read_progress(run.folder)[0].held_out_loss == weights[0]
    assert [line.held_out_loss for line in read_progress(run.folder)] == weights


def test_previews_and_held_out_losses_are_the_same_in_the_background(watch: Callable[..., Watched]) -> None:
    recipe, found = tiny_recipe(patches__p=1.0, preview__every_images=8, preview__frechet_samples=12), []
    for worker in (Worker(0, 1), Worker(0, 2)):
        run, watcher = watch(worker, PreviewHook, HeldOutHook, recipe=recipe)
        with watcher:
            take_steps(run, watcher, 2)
        lines = read_progress(run.folder)
        pictures = [(run.folder / str(line.preview)).read_bytes() for line in lines]
        found.append([(line.preview_frechet_distance, line.held_out_loss_by_sigma) for line in lines] + pictures)
        (run.folder / "progress.jsonl").unlink()
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_failed_measurement_is_reported_and_its_line_is_written(
    watch: Callable[..., Watched], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Hook, due: Due, snapshot: Snapshot) -> LineFields:
        raise ZeroDivisionError("no samples")

    monkeypatch.setattr(SlowHook, "measure", fail)
    run, watcher = watch(Worker(0, 2), SlowHook, recipe=measured_once())
    with watcher:
        take_steps(run, watcher, 4)
    assert [line.step for line in read_progress(run.folder)] == [1, 2, 3, 4]
    assert "no samples" in capsys.readouterr().out


def test_a_line_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    lines = LineWriter(ProgressLog(tmp_path, 0), in_background=True)
    (tmp_path / "progress.jsonl").unlink()
    (tmp_path / "progress.jsonl").mkdir()
    lines.write(lambda: {"step": 1})
    with pytest.raises(OSError):
        lines.wait()
    with pytest.raises(OSError):
        lines.write(lambda: {"step": 2})


def test_hooks_are_closed_after_a_line_that_cannot_be_written(watch: Callable[..., Watched]) -> None:
    class ClosedHook(Hook):
        closed = False

        def close(self) -> None:
            ClosedHook.closed = True

    run, watcher = watch(Worker(0, 2), ClosedHook, recipe=measured_once())
    (run.folder / "progress.jsonl").unlink()
    (run.folder / "progress.jsonl").mkdir()
    with pytest.raises(OSError), watcher:
        take_steps(run, watcher, 1)
    assert ClosedHook.closed


def test_checkpoint_has_the_held_out_loss_of_its_line(watch: Callable[..., Watched], tmp_path: Path) -> None:
    run, _ = watch(Worker(0, 1), recipe=measured_once())
    line: Future[ProgressLine | None] = Future()
    checkpointer = Checkpointer(tmp_path, run.recipe.train.keep)
    checkpointer.save(run.state, "tiny", line)
    line.set_result(ProgressLine(step=0, held_out_loss=0.25))
    checkpointer.wait()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and read_checkpoint_card(newest).held_out_loss == 0.25
