"""Outputs: no command overwrites or deletes what a user has; it is refused, with the name of what was found."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny_recipe

from patchloom.pipelines.cli import main
from patchloom.platform.files.cache import cache_entries, cached_copy, remove_entry
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.storage import whole_folder
from patchloom.platform.recipe import recipe_yaml

SEARCH = """
name: s
recipe: recipe.yaml
space: {patches.p: {grid: [0.5, 1.0]}}
budget: {images: 600}
"""
COMMANDS = {
    "prepare": ["prepare", "{images}", "{out}", "--resolution", "16", "--workers", "0"],
    "sample": ["sample", "{trained}", "{out}", "--seeds", "0", "--workers", "0"],
    "train": ["train", "{recipe}", "--data", "{pixels}", "--out", "{out}", "--workers", "0"],
    "train --resume": ["train", "{recipe}", "--data", "{pixels}", "--out", "{out}", "--workers", "0", "--resume"],
    "autoencoder": ["autoencoder", "train", "{pixels}", "--out", "{out}", "--workers", "0", "--patch", "8"],
    "tune": ["tune", "{search}", "--data", "{pixels}", "--out", "{out}"],
    "tune --restore": ["tune", "{search}", "--data", "{pixels}", "--out", "{out}", "--restore"],
    "demo": ["demo", "--out", "{out}", "--pixels"],
    "export": ["models", "export", "{trained}", "{out}"],
}
# what a user may have in a folder; none of it may change
THEIRS = [
    "model/mine.txt", "recipe.yaml", "best.yaml", "report.html", "trials.jsonl", "progress.jsonl", ".work/mine.txt",
    ".mine.partial", ".mine.0a1b2c3d.partial", ".ray/mine", ".hidden", "checkpoints/step-00000001/mine", "search.yaml",
]  # fmt: skip

Run = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, images: Path, pixels: Path, trained: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:  # fmt: skip
    """Runs a command, which must be refused in one line with exit code 2; returns the line."""
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe()))
    (tmp_path / "search.yaml").write_text(SEARCH)
    known = {
        "images": images, "pixels": pixels, "trained": trained, "out": tmp_path / "out",
        "recipe": tmp_path / "recipe.yaml", "search": tmp_path / "search.yaml",
    }  # fmt: skip

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["patchloom", *(argument.format(**known) for argument in arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        line = capsys.readouterr().err
        assert (left.value.code, line.count("\n")) == (2, 1), line
        return line

    return run


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_refuses_a_folder_with_files_of_a_user(command: str, refused: Run, tmp_path: Path) -> None:
    for name in THEIRS:
        folder = tmp_path / "out"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        line = refused(*COMMANDS[command])
        assert str(folder) in line and (name in line or command in ("demo", "export"))
        assert contents(folder) == {name: "mine"}
        folder.rename(tmp_path / f"was {name.replace('/', ' ')}")


@pytest.mark.parametrize("command", ["prepare", "sample", "train", "autoencoder", "tune"])
def test_command_refuses_a_file_and_a_link(command: str, refused: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(*COMMANDS[command])
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "model").symlink_to(tmp_path / "elsewhere")
    assert "model" in refused(*COMMANDS[command])


@pytest.mark.parametrize("command", ["train", "autoencoder", "sample", "prepare", "tune"])
def test_command_refuses_a_folder_of_another_kind(command: str, refused: Run, tmp_path: Path) -> None:
    cards = ("run.json", "search.json", "sampling.json", "dataset.json", "model.json")
    for card in cards:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / card).write_text('{"format_version": 1, "kind": "other", "dataset_fingerprint": "0"}')
        before = contents(tmp_path / "out")
        assert str(tmp_path / "out") in refused(*COMMANDS[command])
        left = contents(tmp_path / "out")
        assert {name: text for name, text in left.items() if name != ".lock"} == before
        (tmp_path / "out").rename(tmp_path / f"was {card}")


def test_locks_and_what_systems_leave_count_as_nothing(tmp_path: Path) -> None:
    for name in (".lock", ".DS_Store", ".gitkeep", ".work/.plan.json.0a1b2c3d.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "recipe.yaml").write_text("same")
    check_output_folder(Folder(str(tmp_path)), "dataset", ".work/plan.json", {"recipe.yaml": "same"})


def test_folder_that_is_replaced_keeps_the_files_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "model.json").write_text("new")
    assert contents(tmp_path) == {"model/model.json": "new", "model/notes.txt": "mine"}


FILES = {
    "compare": (["models", "compare", "{trained}", "{trained}", "--picture", "{out}"], "out"),
    "report": (["report", "{trained}", "{out}"], "out"),
    "evaluate": (["evaluate", "{pixels}", "--reference", "{pixels}", "--features", "colours", "--out", "{out}"], "out"),
    "picture of evaluate": (
        ["evaluate", "{pixels}", "--reference", "{pixels}", "--features", "colours", "--out", "{out}.json"],
        "out.nearest.png",
    ),
    "statistics": (
        ["evaluate", "{pixels}", "--reference", "{pixels}", "--features", "colours", "--out", "{out}.json",
         "--save-reference", "{out}"],
        "out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", FILES)
def test_command_refuses_a_file_that_it_did_not_write(command: str, refused: Run, tmp_path: Path) -> None:
    arguments, name = FILES[command]
    (tmp_path / name).write_text("mine")
    assert str(tmp_path / name) in refused(*arguments)
    assert (tmp_path / name).read_text() == "mine"


def test_cache_in_a_folder_of_a_user_removes_only_its_own_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path))
    for name in ("work/thesis", "datasets/faces", "features/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "work" / "thesis.lock").write_text("of another program")
    handle, _ = cached_copy("datasets", "copy", 1, lambda folder: (folder / "x").touch())
    os.close(handle)
    assert [entry.name for entry in cache_entries()] == ["copy"]
    assert all(remove_entry(entry) for entry in cache_entries())
    kept = {name for name, text in contents(tmp_path).items() if text == "mine"}
    assert kept == {"work/thesis/mine", "datasets/faces/mine", "features/mine/mine"}
