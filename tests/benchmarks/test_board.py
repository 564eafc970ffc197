"""The board: rows of runs whose times and losses are known, and the table in the documentation."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patchloom.benchmarks import board
from patchloom.errors import UserError
from patchloom.platform.files.storage import make_folder
from patchloom.platform.recipe import load_recipe, recipe_yaml
from patchloom.platform.records.evaluation import EvaluationIdentity, EvaluationResult
from patchloom.platform.records.run import ProgressLine, RunCard, write_progress

RECIPE = Path(__file__).parents[2] / "examples" / "emoji" / "recipe.yaml"
TRACK = board.TRACKS["emoji"]
MakeRun = Callable[..., board.Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run with these held-out losses, one after every 1,200 counted images at 10 per second: two minutes each."""

    def make(
        seed: int, losses: list[float], *settings: str, dataset: str = TRACK.dataset, fid: float = 50
    ) -> board.Run:
        folder, samples = make_folder(tmp_path / f"run{seed}"), make_folder(tmp_path / f"samples{seed}")
        (folder / "recipe.yaml").write_text(recipe_yaml(load_recipe(RECIPE, [f"seed={seed}", *settings])))
        RunCard(dataset_fingerprint=dataset, code_version="0.2.0", code_commit="a" * 40).write(folder)
        write_progress(
            folder,
            [
                ProgressLine(
                    step=number,
                    images_seen=1200 * number,
                    images_per_second=10,
                    held_out_loss=loss,
                    flops=number * 10**12,
                )
                for number, loss in enumerate(losses, 1)
            ],
        )
        (make_folder(folder / "model") / "model.json").write_text(json.dumps({"weights_sha256": f"{seed}"}))
        identity = EvaluationIdentity(features="inception", n_samples=TRACK.samples, reference=TRACK.dataset)
        result = EvaluationResult(metrics={"fid": fid}, identity=identity, digest="b" * 8)
        (samples / "metrics.json").write_text(result.to_json())
        (samples / "sampling.json").write_text(json.dumps(sampling_card(f"{seed}")))
        return board.Run.read(folder, samples)

    return make


def sampling_card(weights_sha256: str) -> dict[str, Any]:
    return {
        "format_version": 1, "kind": "samples", "model": {"reference": "run", "weights_sha256": weights_sha256},
        "network_evaluations": 23, "labels": "balanced", "label": None, "outpaint": None, "format": "png",
        "shard_size": None, "batch": 8, "threads": 1, "lineage": {"run_id": None, "name": None, "version": None},
    }  # fmt: skip


def test_minutes_are_those_until_the_loss_is_reached(make_run: MakeRun) -> None:
    below, above = TRACK.loss / 1.1, TRACK.loss * 1.1  # the target is in the middle of their logarithms
    runs = [make_run(0, [above, below, below]), make_run(1, [above, above, below])]
    row = board.board_row("emoji", runs, "two cores")
    assert row.minutes_to_loss == pytest.approx([3, 5]) and row.minutes == pytest.approx([6, 6])
    assert (row.seeds, row.images, row.flops, row.fid) == ([0, 1], 3600, 3e12, [50, 50])
    assert row.reaches(TRACK) == (pytest.approx([3, 5]), pytest.approx([6, 6]))


def test_a_row_reaches_only_what_every_seed_reaches(make_run: MakeRun) -> None:
    runs = [make_run(0, [TRACK.loss, TRACK.loss]), make_run(1, [0.9, 0.8], fid=TRACK.fid + 1)]
    row = board.board_row("emoji", runs, "two cores")
    assert row.minutes_to_loss == [pytest.approx(2), None] and row.reaches(TRACK) == (None, None)


@pytest.mark.parametrize(
    "fault", ["other images", "held out", "differs", "longer", "same seed", "other code", "unfinished", "made longer"]
)
def test_runs_that_cannot_be_compared_are_refused(make_run: MakeRun, fault: str) -> None:
    first, second = make_run(0, [0.3]), make_run(1, [0.3])
    other: Callable[[], board.Run] = {
        "other images": lambda: make_run(1, [0.3], dataset="c" * 64),
        "held out": lambda: make_run(1, [0.3], "data.held_out_fraction=0.2"),
        "differs": lambda: make_run(1, [0.3], "patches.p=0.25"),
        "longer": lambda: make_run(1, [0.3], "train.images=9999"),
        "same seed": lambda: first,
        "other code": lambda: replace(second, card=second.card.model_copy(update={"code_commit": "b" * 40})),
        "unfinished": lambda: make_run(2, []),
        "made longer": lambda: made_longer(second),
    }[fault]
    with pytest.raises(UserError):
        board.board_row("emoji", [first, other()], "two cores")


def made_longer(run: board.Run) -> board.Run:
    """A run with a model, which now has a longer recipe."""
    shutil.copy(run.folder / "recipe.yaml", run.folder / "model")
    (run.folder / "recipe.yaml").write_text(recipe_yaml(load_recipe(RECIPE, ["seed=1", "train.images=700000"])))
    return board.Run.read(run.folder, None)


def test_samples_of_another_run_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(0, [0.3])
    make_run(1, [0.3])
    with pytest.raises(UserError):
        board.Run.read(tmp_path / "run0", tmp_path / "samples1")


def test_a_row_names_what_differs_from_the_recipe_of_the_track(make_run: MakeRun) -> None:
    run = make_run(0, [0.3], "model.width=64", "preview.count=9", "patches.p=0.25")
    row = board.board_row("emoji", [run], "a | b", "<b>bold</b>\nnext")
    assert row.changes == ["model.width=64"] and row.p == 0.25
    line = board.table("emoji", [row]).splitlines()[-1]
    assert line.count("|") == 9 and "<b>" not in line and "model.width=64" in line


def test_a_row_is_added_to_the_file_and_to_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    docs = make_folder(tmp_path / "docs")
    (docs / board.PAGE_FILE).write_text("before\n<!-- rows of emoji -->\nold\n<!-- end of rows -->\nafter\n")
    slow = board.board_row("emoji", [make_run(0, [0.9, TRACK.loss])], "a slow machine")
    fast = board.board_row("emoji", [make_run(1, [TRACK.loss])], "a fast machine")
    board.add(slow, docs)
    board.add(fast, docs)
    assert board.read_rows(docs) == [slow, fast]
    lines = (docs / board.PAGE_FILE).read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert ["fast" in line for line in lines if "machine |" in line and "machine | v" not in line] == [True, False]


@pytest.mark.parametrize("damage", ["rows", "begin", "end"])
def test_nothing_is_lost_where_a_file_is_damaged(make_run: MakeRun, tmp_path: Path, damage: str) -> None:
    docs = make_folder(tmp_path / "docs")
    row = board.board_row("emoji", [make_run(0, [0.3])], "two cores")
    page = "before\n<!-- rows of emoji -->\n<!-- end of rows -->\nafter\n"
    rows = f"{row.to_json()}\n{row.to_json()}" + "\n" * (damage != "rows")
    pages = {"begin": page.replace("rows of", ""), "end": page.replace("end of rows", "")}
    (docs / board.PAGE_FILE).write_text(pages.get(damage, page))
    (docs / board.ROWS_FILE).write_text(rows)
    with pytest.raises(UserError):
        board.add(row, docs)
    assert (docs / board.PAGE_FILE).read_text() == pages.get(damage, page)
    assert (docs / board.ROWS_FILE).read_text() == rows


def test_without_the_page_nothing_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    docs = make_folder(tmp_path / "docs")
    with pytest.raises(UserError):
        board.add(board.board_row("emoji", [make_run(0, [0.3])], "two cores"), docs)
    assert list(docs.iterdir()) == []


def test_the_page_has_the_rows_of_the_file() -> None:
    page = (board.DOCS / board.PAGE_FILE).read_text()
    assert board.page_with_rows(page, board.read_rows()) == page
