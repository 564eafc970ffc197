"""Messages: what workers say is shown by the command, once, also by the workers of trials and pools."""

import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from helpers import start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.platform.compute.actors import map_on_actors
from patchloom.platform.compute.messages import connected_ray, is_in_worker
from patchloom.platform.progress import say
from patchloom.platform.recipe import recipe_yaml


class SayingActor:
    """Says the same text in each process, and one text per item."""

    def __init__(self, _: None) -> None:
        say("  every process says this")

    def __call__(self, item: int, report: object) -> int:
        say(f"  item {item} has a problem")
        return item


def test_a_process_that_still_imports_ray_has_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))  # as other threads see it meanwhile
    assert connected_ray() is None and not is_in_worker()


@pytest.mark.ray
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_messages_of_a_pool_are_shown_once(ray_cluster: None, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    assert len(list(map_on_actors(SayingActor, None, list(range(6)), workers))) == 6
    time.sleep(3 if workers else 0)  # the session of the tests takes messages once per second
    lines = capsys.readouterr().out.splitlines()
    for item in range(6):
        assert lines.count(f"  item {item} has a problem") == 1
    assert lines.count("  every process says this") == 1


class MistakenActor:
    """Finds a mistake of the user, in its constructor or at an item."""

    def __init__(self, starts: bool) -> None:
        if not starts:
            raise UserError("the argument is wrong")

    def __call__(self, item: int, report: object) -> int:
        raise UserError(f"item {item} is wrong")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("starts", [True, False])
def test_mistake_in_a_pool_keeps_its_message(ray_cluster: None, starts: bool) -> None:
    with pytest.raises(UserError, match=r"^item 7 is wrong$" if starts else r"^the argument is wrong$"):
        list(map_on_actors(MistakenActor, starts, [7], 1))


@pytest.mark.ray
@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_checkpoints_that_cannot_be_written_are_reported(pixels: Path, tmp_path: Path, workers: str) -> None:
    recipe = tiny_recipe(train__images=200, train__checkpoint_every_images=50, preview__every_images=0)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    arguments = ("train", "recipe.yaml", "--data", str(pixels), "--out", "run", "--workers", workers, "--profile")
    process = start_cli(*arguments, cwd=tmp_path)
    wait_until((tmp_path / "run" / "run.json").is_file, process)  # the first step is later
    (tmp_path / "run" / "checkpoints").write_text("a file is in the way of the folder")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert newest_checkpoint(tmp_path / "run") is None
    lines = output.splitlines()
    assert sum("checkpoint of step" in line for line in lines) >= 3
    assert any("profile of" in line for line in lines)
    assert any("warning" in line and "no checkpoint" in line for line in lines[-4:])
