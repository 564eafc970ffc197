"""The board: rows of runs whose times and losses are known, and the table in the documentation."""

from collections.abc import Callable
from pathlib import Path

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
        (make_folder(folder / "model") / "model.json").write_text("{}")
        identity = EvaluationIdentity(features="inception", n_samples=TRACK.samples, reference=TRACK.dataset)
        result = EvaluationResult(metrics={"fid": fid}, identity=identity, digest="b" * 8)
        (samples / "metrics.json").write_text(result.to_json())
        return board.Run.read(folder, samples)

    return make


def test_minutes_are_those_until_the_loss_is_reached(make_run: MakeRun) -> None:
    below, above = TRACK.loss - 0.01, TRACK.loss + 0.01
    runs = [make_run(0, [above, below, below]), make_run(1, [above, above, below])]
    row = board.board_row("emoji", runs, "two cores")
    assert row.minutes_to_loss == pytest.approx([4, 6]) and row.minutes == pytest.approx([6, 6])
    assert (row.seeds, row.images, row.flops, row.fid) == ([0, 1], 3600, 3e12, [50, 50])
    assert row.reaches(TRACK) == (pytest.approx([4, 6]), pytest.approx([6, 6]))


def test_a_row_reaches_only_what_every_seed_reaches(make_run: MakeRun) -> None:
    runs = [make_run(0, [TRACK.loss, TRACK.loss]), make_run(1, [0.9, 0.8], fid=TRACK.fid + 1)]
    row = board.board_row("emoji", runs, "two cores")
    assert row.minutes_to_loss == [pytest.approx(2), None] and row.reaches(TRACK) == (None, None)


@pytest.mark.parametrize("fault", ["other images", "held out", "differs", "unfinished"])
def test_runs_that_cannot_be_compared_are_refused(make_run: MakeRun, fault: str) -> None:
    first = make_run(0, [0.3])
    other = {
        "other images": lambda: make_run(1, [0.3], dataset="c" * 64),
        "held out": lambda: make_run(1, [0.3], "data.held_out_fraction=0.2"),
        "differs": lambda: make_run(1, [0.3], "patches.p=0.25"),
        "unfinished": lambda: make_run(1, []),
    }[fault]()
    with pytest.raises(UserError):
        board.board_row("emoji", [first, other], "two cores")


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


def test_without_the_page_nothing_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    docs = make_folder(tmp_path / "docs")
    with pytest.raises(UserError):
        board.add(board.board_row("emoji", [make_run(0, [0.3])], "two cores"), docs)
    assert list(docs.iterdir()) == []


def test_the_page_has_the_rows_of_the_file() -> None:
    page = (board.DOCS / board.PAGE_FILE).read_text()
    assert board.page_with_rows(page, board.read_rows()) == page
