"""Requests to a running training: a checkpoint without an end."""

from pathlib import Path

import pytest
from helpers import tiny_recipe

from patchloom.pipelines.train import train
from patchloom.pipelines.train.control import STOP_FILE, ask_for_checkpoint, ask_to_stop
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.run import ProgressLine


def train_and_ask(pixels: Path, out: str, images: int) -> list[str]:
    """Train, ask for a checkpoint after the first progress line; the names of the checkpoints."""
    asked = []

    def show(line: ProgressLine) -> None:
        if not asked:
            ask_for_checkpoint(out)
            asked.append(line.step)

    recipe = tiny_recipe(train__checkpoint_every_images=100_000, train__images=images, train__log_every_images=16)
    train(recipe, str(pixels), out, workers=0, show=show)
    names = {name.split("/")[1] for name in Folder.at(out).files() if name.startswith("checkpoints/step-")}
    return sorted(names)


def test_checkpoint_on_request_does_not_end_the_run(pixels: Path, tmp_path: Path) -> None:
    checkpoints = train_and_ask(pixels, str(tmp_path / "run"), 640)
    assert len(checkpoints) == 2  # the requested one, and that of the end
    assert (tmp_path / "run" / "model" / "model.json").is_file()
    assert not (tmp_path / "run" / STOP_FILE).exists()


@pytest.mark.slow
def test_checkpoint_on_request_of_a_remote_run(pixels: Path, s3: str) -> None:
    checkpoints = train_and_ask(pixels, f"{s3}/requests/run", 4000)
    assert len(checkpoints) == 2
    assert not Folder.at(f"{s3}/requests/run").has(STOP_FILE)


def test_request_for_a_checkpoint_does_not_hide_a_request_to_stop(tmp_path: Path) -> None:
    ask_to_stop(Folder.at(tmp_path))
    ask_for_checkpoint(str(tmp_path))
    assert (tmp_path / STOP_FILE).read_text() == ""
