"""Reproductions: the commands of a table run, continue where they stopped, and end in a page with the paper's numbers."""

from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.pipelines.reproduce import reproduce, reproduction_plan
from patchloom.pipelines.reproduce.paper import TABLES, PaperResult, PaperTable
from patchloom.pipelines.reproduce.stages import Place, changed_keys, table_stages
from patchloom.pipelines.reproduce.subjects import SUBJECTS, Subject, table_subject
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import read_json
from patchloom.platform.recipe import load_recipe
from patchloom.platform.records.reproduction import REPRODUCTION_FILE, Reproduction
from patchloom.platform.records.search import read_trials

TINY_SEARCH = """
name: tiny
recipe: demo_pixels
set:
  model.width: 8
  model.width_multipliers: [1]
  model.attention: []
  data.resolution: 16
  data.held_out_fraction: 0.25
  train.batch_size: 8
  preview.every_images: 0
  optimizer.lr_rampup_images: 1
space: {patches.p: {grid: [0.5]}}
also: [{patches.p: 1, model.coordinates: none}]
repeats: 2
equal_costs: [images]
budget: {flops: 1.0e+9}
final: {features: colours, samples: 4, steps: 2}
"""


def tiny_table(folder: Path) -> PaperTable:
    """Table 4 with a search of seconds."""
    search = folder / "tiny.yaml"
    search.write_text(TINY_SEARCH)
    table = TABLES["table4"]
    return PaperTable(table.title, table.subject, table.results, str(search))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperTable:
    table = tiny_table(tmp_path)
    monkeypatch.setitem(SUBJECTS, "table4", table_subject(table))
    return table


@pytest.mark.ray
def test_small_table_runs_and_continues(
    tiny: PaperTable, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    page = reproduce("table4", str(out), small=True, data={"cat": str(pixels)}, workers=0)
    text = page.read_text()
    for number in ("4.6", "3.11", "about 18 h"):
        assert number in text
    trials = read_trials(Folder.at(out / "cat" / "search"))
    assert len(trials) == 6 and all(trial.status == "finished" and trial.final_distance for trial in trials)
    before = {path: path.stat().st_mtime_ns for path in (out / "cat").rglob("*.json")}
    capsys.readouterr()
    assert reproduce("table4", str(out), small=True, data={"cat": str(pixels)}, workers=0) == page
    assert before == {path: path.stat().st_mtime_ns for path in (out / "cat").rglob("*.json")}
    with pytest.raises(UserError):
        reproduce("table4", str(out), small=True, data={"dog": str(pixels)}, workers=0)
