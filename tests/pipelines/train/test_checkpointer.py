"""The checkpointer: writing in the background, incomplete checkpoints, and which checkpoints are kept."""

import shutil
from pathlib import Path

import pytest
import torch

from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import load_checkpoint
from patchloom.models.denoiser import build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.patches import patch_schedule
from patchloom.models.step import TrainingState, new_state
from patchloom.models.step_plan import StepSettings
from patchloom.pipelines.train.checkpointer import Checkpointer, newest_checkpoint
from patchloom.platform.files.storage import sweep_partial
from patchloom.platform.recipe.run_recipe import KeepSection

METHOD = StepSettings(0, patch_schedule(16, 0.5), 100, 8, 8, lr=1e-3, lr_rampup_images=0)


def make_state(width: int) -> TrainingState:
    options = {"width": width, "width_multipliers": [1, 2], "blocks": 1, "attention": [], "dropout": 0.0}
    config = DenoiserConfig(network="song", network_options=options, resolution=16, channels=3, classes=0,
                            coordinates="linear", sigma_data=0.5)  # fmt: skip
    denoiser = build_denoiser(config)
    return new_state(denoiser, [HalfLifeEMA(denoiser, 10)], METHOD, (0.9, 0.999), 1e-8)


def test_checkpoint_has_the_weights_of_its_step_while_training_continues(tmp_path: Path) -> None:
    state = make_state(width=64)  # 30 MB, so that writing takes longer than the call
    checkpointer = Checkpointer(tmp_path, KeepSection())
    before = [parameter.detach().clone() for parameter in state.denoiser.parameters()]
    checkpointer.save(state, "tiny", None)
    assert newest_checkpoint(tmp_path) is None  # the call has returned before the checkpoint is written
    for parameter in (*state.denoiser.parameters(), *state.emas[0].module.parameters()):
        torch.nn.init.zeros_(parameter)
    checkpointer.wait()
    newest, resumed = newest_checkpoint(tmp_path), make_state(width=64)
    assert newest is not None
    load_checkpoint(newest, resumed)
    for module in (resumed.denoiser, resumed.emas[0].module):
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_incomplete_checkpoint_is_never_the_newest(tmp_path: Path) -> None:
    state = make_state(width=8)
    checkpointer = Checkpointer(tmp_path, KeepSection())
    checkpointer.save(state, "tiny", None)
    checkpointer.wait()
    whole = newest_checkpoint(tmp_path)
    assert whole is not None and whole.name == "step-00000000"
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder / ".step-00000009.0a1b2c3d.partial")  # the process was killed before the rename
    shutil.copytree(
        whole, folder / "step-00000008", ignore=lambda *_: ["checkpoint.json"]
    )  # an incomplete copy of a remote store
    assert newest_checkpoint(tmp_path) == whole
    sweep_partial(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000000", "step-00000008"]


def test_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("last", [1, 2])
def test_last_checkpoints_are_kept(tmp_path: Path, last: int) -> None:
    state, checkpointer = make_state(width=8), Checkpointer(tmp_path, KeepSection(last=last))
    for step in range(1, 5):
        state.step = step
        checkpointer.save(state, "tiny", None)
    checkpointer.wait()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in range(5 - last, 5)]


def test_a_checkpoint_whose_card_is_damaged_is_left_alone_and_training_goes_on(tmp_path: Path) -> None:
    state, checkpointer = make_state(width=8), Checkpointer(tmp_path, KeepSection(last=1))
    for step in range(1, 5):
        state.step = step
        checkpointer.save(state, "tiny", None)
        checkpointer.wait()
        if step == 2:
            (tmp_path / "checkpoints" / "step-00000002" / "checkpoint.json").write_text("{")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"] and checkpointer.failed == 0
