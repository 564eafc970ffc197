"""Reproductions: the commands of a table run and continue where they stopped, and its page has the paper's numbers."""

import contextlib
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.generate import Sampling
from patchloom.models.sampling_options import SAMPLER_NAMES
from patchloom.pipelines.recipes import PAPER, counted
from patchloom.pipelines.report import report
from patchloom.pipelines.reproduce import (
    ReproductionOptions,
    describe_reproduction,
    extrapolation,
    reproduce,
    samplers,
    stages,
)
from patchloom.pipelines.reproduce.extrapolation import border_ratio, window_ratio
from patchloom.pipelines.reproduce.outcome import Outcome, SearchPart, table_outcome
from patchloom.pipelines.reproduce.paper import TABLES, PaperResult, PaperTable
from patchloom.pipelines.reproduce.samplers import EVALUATIONS, steps_for
from patchloom.pipelines.reproduce.speed import trials_of_whole_time
from patchloom.pipelines.reproduce.stages import (
    FULL_SAMPLES,
    ReproductionFolder,
    Stage,
    changed_keys,
    samples_flops,
    table_stages,
)
from patchloom.pipelines.reproduce.subjects import SUBJECTS, Subject, table_subject
from patchloom.pipelines.tune.ranking import ranked
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import read_json
from patchloom.platform.progress import Verbosity, set_verbosity
from patchloom.platform.recipe import load_recipe
from patchloom.platform.recipe.search import load_search
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.reproduction import Reproduction
from patchloom.platform.records.run import last_progress
from patchloom.platform.records.search import TrialRow, read_trials

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
# FIDs of Wang et al. (2023): Tables 1, 2 and 4, baseline and patches
PAIRS = {
    "table1": {"celeba": (1.66, 1.77), "ffhq": (2.60, 3.11)},
    "table2": {"bedroom": (4.32, 2.75), "church": (4.66, 2.66)},
    "table4": {"cat": (4.60, 3.11), "dog": (4.94, 4.80), "wild": (2.59, 1.93)},
}


def tiny_table(folder: Path) -> PaperTable:
    """Table 4 with a search of seconds."""
    search = folder / "tiny.yaml"
    search.write_text(TINY_SEARCH)
    table = TABLES["table4"]
    return PaperTable(table.title, table.subject, table.results, str(search))


def asked(table: str, small: bool = False) -> Reproduction:
    data = {} if small else dict.fromkeys(TABLES[table].data, "images")
    return Reproduction(table=table, small=small, data=data, features="inception")


@pytest.mark.parametrize("name", PAIRS)
def test_tables_have_the_fids_of_the_paper(name: str) -> None:
    found: dict[str, list[float]] = {}
    for result in TABLES[name].results:
        found.setdefault(result.data, []).append(result.metrics["fid"])
    assert {data: tuple(fids) for data, fids in found.items()} == PAIRS[name]


@pytest.mark.parametrize("name", TABLES)
def test_each_system_is_trained_with_its_settings(name: str) -> None:
    for result in TABLES[name].results:
        recipe = load_recipe(result.recipe, changed_keys(result))
        found = {"patches.p": recipe.patches.p, "patches.schedule": recipe.patches.schedule}
        assert {key: found[key] for key in result.settings} == dict(result.settings)


@pytest.mark.parametrize("name", ["table1", "table2", "table4"])
def test_full_plan_costs_what_its_trainings_and_samples_cost(name: str, tmp_path: Path) -> None:
    found = table_stages(TABLES[name], ReproductionFolder(Folder.at(tmp_path), asked(name)))
    systems = [system for system in PAPER if system.recipe in {result.recipe for result in TABLES[name].results}]
    expected = sum(counted(load_recipe(system.recipe), system.shape).flops for system in systems)
    each = [counted(load_recipe(system.recipe), system.shape).evaluation_flops for system in systems]
    expected += FULL_SAMPLES * 99 * sum(each)  # 50 Heun steps
    assert sum(stage.flops for stage in found) == pytest.approx(expected, rel=1e-9)
    assert len({stage.words for stage in found}) == len(found)


def test_guidance_costs_a_second_evaluation() -> None:
    recipe = load_recipe("imagenet256")
    assert samples_flops(recipe, 10, 256, 1.3) == 2 * samples_flops(recipe, 10, 256) > 0


def test_table_3_trains_once_for_both_guidances(tmp_path: Path) -> None:
    found = table_stages(TABLES["table3"], ReproductionFolder(Folder.at(tmp_path), asked("table3")))
    assert [stage.words[0] for stage in found] == ["prepare"] * 2 + ["train"] + ["sample", "evaluate"] * 2


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_samplers_evaluate_the_network_equally_often(sampler: str) -> None:
    steps = [steps_for(sampler, evaluations) for evaluations in EVALUATIONS]
    assert tuple(Sampling(sampler=sampler, steps=one).network_evaluations for one in steps) == EVALUATIONS


def test_border_is_the_step_across_it_over_the_other_steps() -> None:
    region = np.zeros((12, 12), bool)
    region[4:8, 4:8] = True
    steps = np.add.outer(np.arange(12), np.arange(12)).astype(np.uint8)[None, None]  # every step is 1
    assert border_ratio(steps, region) == pytest.approx(1)
    raised = steps.copy()
    raised[:, :, region] += 100  # two sides step by 101, two by -99
    assert border_ratio(raised, region) == pytest.approx(np.sqrt((101**2 + 99**2) / 2))
    assert window_ratio(np.arange(32, dtype=np.uint8)[None, None, None].repeat(8, axis=2)) == pytest.approx(1)


def row(p: float, repeat: int, loss: float, images: int, flops: float, equal: str | None = None) -> TrialRow:
    return TrialRow.model_validate({
        "name": f"{p}-{repeat}-{equal}", "settings": {"patches.p": p}, "repeat": repeat, "status": "finished",
        "images_seen": images, "flops": flops, "seconds": flops, "held_out_loss": loss, "equal": equal,
        "held_out_loss_by_sigma": {"1": loss},
    })  # fmt: skip


def test_small_table_compares_at_both_costs() -> None:
    """Full images are ahead at equal counted images, patches at equal FLOPs; each has the means of its own trials."""
    trials = []
    for repeat, noise in enumerate((-0.001, 0.001, 0)):
        trials += [
            row(0.5, repeat, 0.2 + noise, 2000, 1e12),
            row(1, repeat, 0.3 + noise, 1000, 1e12),
            row(0.5, repeat, 0.4 - noise, 1000, 0.5e12, "images"),
        ]
    results = [result for result in TABLES["table4"].results if result.data == "cat"]
    part = SearchPart("cat", "cats", results, trials)
    found = [{cells[0]: cells[1:] for cells in one.table.rows} for one in part.findings()]
    assert found[0]["EDM-DDPM++"] == ["4.6", "0.3000 ± 0.0010", "", "1.00", "about 18 h"]
    assert found[0]["PDM-DDPM++"] == ["3.11", "0.4000 ± 0.0010", "", "0.50", "about 9 h"]
    assert found[1]["EDM-DDPM++"] == ["4.6", "0.3000 ± 0.0010", "", "1,000", "about 18 h"]
    assert found[1]["PDM-DDPM++"] == ["3.11", "0.2000 ± 0.0010", "", "2,000", "about 9 h"]
    orders = [comparison.order for comparison in part.comparisons.values() if comparison]
    assert [order[0].settings["patches.p"] for order in orders] == [1, 0.5]
    assert [part.agrees(order) for order in orders] == [False, True]
    assert part.cost()[0].count("2.00") == 2  # FLOPs and time of full images over those of patches


def test_fids_of_the_paper_that_hardly_differ_are_a_tie() -> None:
    """Figure 2 has 1.65 at p = .75 and 1.66 at p = 1: either is its direction, and p = .5 (1.77) is not."""
    results = [one for one in TABLES["figure2"].results if one.settings["patches.p"] in (0.5, 0.75, 1.0)]
    for best, wanted in ((0.5, False), (0.75, True), (1, True)):
        trials = [
            row(p, repeat, (0.1 if p == best else 0.9 + p) + repeat * (1 + p) / 1e4, 1000, 1e12)
            for p in (0.5, 0.75, 1)
            for repeat in (0, 1)
        ]
        assert SearchPart("celeba", "faces", results, trials).agrees(ranked(trials)) is wanted


def test_the_longest_trials_of_a_speed_search_are_those_of_its_plan() -> None:
    definition, _ = load_search("speed_search_cpu")
    planned = [setting for setting in definition.settings() for _ in range(definition.repeats)]
    whole = [f"{number:03d}" for number, setting in enumerate(planned) if setting["budget.share"] == 1]
    assert trials_of_whole_time(small=True) == whole and len(whole) == 12


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "controlnet" else []) for name in SUBJECTS]
)
def test_every_subject_can_be_planned(name: str) -> None:
    for small in (False, True):
        lines = describe_reproduction(name, options=ReproductionOptions(small=small)).text.splitlines()
        commands = [line for line in lines if line.startswith("  $ patchloom ")]
        cost = re.match(r"  ([0-9,.e+]+) (TFLOP|FLOPs),", lines[1])
        assert len(commands) >= 2 and cost and float(cost[1].replace(",", "")) > 0


def test_help_lists_every_subject() -> None:
    import typer

    from patchloom.pipelines.cli.app import app

    command = typer.main.get_command(app).commands["reproduce"]  # type: ignore[attr-defined]
    help_text = next(one.help for one in command.params if one.name == "table")
    assert re.findall(r"[a-z]+[0-9]?(?=,| or|$)", help_text) == list(SUBJECTS)


def test_command_of_a_stage_is_a_line_for_a_shell() -> None:
    stage = Stage("Sample", ("sample", "my runs/one", "it's", "--seeds", "0-3"), environment=(("NAME", "a b"),))
    assert shlex.split(stage.command) == ["NAME=a b", "patchloom", "sample", "my runs/one", "it's", "--seeds", "0-3"]
    plain = Stage("Prepare", ("prepare", "s3://images/a_b", "data/celeba=x", "--resolution", "32"))
    assert plain.command == "patchloom prepare s3://images/a_b data/celeba=x --resolution 32"


def test_commands_print_where_messages_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --json, stdout is for the result, which the command line prints; with --quiet, commands are silent."""
    listing = Stage("List the recipes", ("recipes",))
    outcome = Outcome(lead="", numbers=[], findings=[], texts=[], differences=[])
    subject = Subject("Recipes", "a list", [], lambda place: [listing], lambda place, here: outcome)
    monkeypatch.setitem(SUBJECTS, "recipes", subject)
    with contextlib.redirect_stdout(sys.stderr):
        reproduce("recipes", str(tmp_path / "json"), ReproductionOptions(small=True))
    output = capfd.readouterr()
    assert output.out == "" and "celeba64" in output.err
    reproduce("recipes", str(tmp_path / "normal"), ReproductionOptions(small=True))
    assert "celeba64" in capfd.readouterr().out
    set_verbosity(Verbosity.QUIET)
    try:
        reproduce("recipes", str(tmp_path / "quiet"), ReproductionOptions(small=True))
    finally:
        set_verbosity(Verbosity.NORMAL)
    assert "celeba64" not in "".join(capfd.readouterr())


def test_what_needs_a_failed_training_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Stage("List the recipes", ("recipes",))
    refused = Stage("Measure a trial", ("evaluate", "missing", "--reference", "missing"), needs="trials/003/model")
    outcome = Outcome(lead="", numbers=[], findings=[], texts=[], differences=[])
    subject = Subject("Recipes", "a list", [], lambda place: [refused, listing], lambda place, here: outcome)
    monkeypatch.setitem(SUBJECTS, "recipes", subject)
    out = tmp_path / "out"
    reproduce("recipes", str(out), ReproductionOptions(small=True))
    record = Reproduction.read(Folder.at(str(out)))
    assert record.finished and [stage.command for stage in record.stages] == ["patchloom recipes"]


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for table, data in (("table9", {}), ("table4", {}), ("table4", {"cow": "x"}), ("table4", {"cat": "missing"})):
        with pytest.raises(UserError):
            reproduce(table, str(tmp_path / "out"), ReproductionOptions(data=data))
    for option in ("model", "autoencoder", "features"):  # they would have no effect
        with pytest.raises(UserError):
            reproduce("table4", str(tmp_path / "out"), ReproductionOptions(small=True, **{option: "x"}))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    with pytest.raises(UserError):
        reproduce("table4", str(tmp_path / "own"), ReproductionOptions(small=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["own", "thesis.tex"]


def test_record_has_no_keys_and_matches_the_same_call(tmp_path: Path) -> None:
    with_keys = asked("table4").model_copy(update={"data": {"cat": "s3://AKIAKEY:hiddensecret@bucket/cats"}})
    done = with_keys.with_stage("patchloom prepare", 2.5)
    done.write(Folder.at(tmp_path))
    assert "hiddensecret" not in (tmp_path / "reproduction.json").read_text()
    found = Reproduction.read(Folder.at(tmp_path))
    assert found.same_work(with_keys) and found.seconds("patchloom prepare") == 2.5
    assert not found.same_work(asked("table4"))


RUN = """
import sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from test_reproduce import tiny_table
from patchloom.pipelines.reproduce import ReproductionOptions, reproduce
from patchloom.pipelines.reproduce.subjects import SUBJECTS, Subject, table_subject
from patchloom.platform.compute.stopping import exit_on_sigterm
exit_on_sigterm()
SUBJECTS["table4"] = table_subject(tiny_table(Path(sys.argv[1])))
reproduce("table4", sys.argv[2], ReproductionOptions(small=True, data={"cat": sys.argv[3]}, workers=0))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_small_table_is_killed_and_continues(images: Path, tmp_path: Path) -> None:
    """SIGTERM while the search runs ends it with its command; the next call finishes, and keeps finished trials."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(tmp_path), str(out), str(images), str(Path(__file__).parent)]
    with subprocess.Popen(command) as process:
        finished = out / "cat" / "search" / "trials"
        while process.poll() is None and not list(finished.glob("*/trial.json")):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    kept = {path: path.read_bytes() for path in finished.glob("*/trial.json")}
    assert 1 <= len(kept) < 6
    with pytest.raises(UserError):
        report(str(out), str(tmp_path / "page.html"))
    assert subprocess.run(command, check=False).returncode == 0
    trials = read_trials(Folder.at(out / "cat" / "search"))
    assert len(trials) == 6 and all(trial.final_distance for trial in trials)
    text = (out / "report.html").read_text()
    assert all(number in text for number in ("4.6", "3.11", "about 18 h"))
    assert report(str(out), str(tmp_path / "page.html")).read_text() == text
    record = Reproduction.read(Folder.at(out))
    assert record.finished and [stage.command.split()[1] for stage in record.stages] == ["prepare", "tune"]
    assert subprocess.run(command, check=False).returncode == 0  # everything is finished
    assert Reproduction.read(Folder.at(out)) == record


TINY_RECIPE = """
base: demo_pixels
name: tiny
data: {resolution: 16, held_out_fraction: 0.25}
model: {width: 8, width_multipliers: [1], attention: []}
train: {images: 64, batch_size: 8, checkpoint_every_images: 64, log_every_images: 32}
preview: {every_images: 0}
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("in_store", [False, True])
def test_systems_are_trained_and_measured_one_by_one(
    in_store: bool, pixels: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model is sampled without and with guidance, and its table has the numbers of the files of its commands."""
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    numbers = ({"fid": 7.64, "precision": 0.73}, {"fid": 2.72, "precision": 0.84})
    results = tuple(
        PaperResult("cat", name, str(tmp_path / "tiny.yaml"), {"patches.p": 0.25}, metrics, guidance=guidance)
        for name, metrics, guidance in zip(("LPDM", "LPDM, guidance 2"), numbers, (1.0, 2.0), strict=True)
    )
    table = PaperTable("Table 3", "guidance", results, steps=2)
    monkeypatch.setitem(SUBJECTS, "table3", table_subject(table))
    monkeypatch.setattr(stages, "FULL_SAMPLES", 12)
    out = f"{s3}/reproduced" if in_store else str(tmp_path / "out")
    options = ReproductionOptions(data={"cat": str(pixels)}, features="colours", workers=0)
    page = reproduce("table3", out, options)
    here, record = page.parent, Reproduction.read(Folder.at(out))
    assert [one.command.split()[1] for one in record.stages] == ["train"] + ["sample", "evaluate"] * 2
    assert load_recipe(here / "cat" / "lpdm" / "run" / "recipe.yaml").patches.p == 0.25
    place, progress = ReproductionFolder(Folder.at(out), record), last_progress(here / "cat" / "lpdm" / "run")
    finding = table_outcome(table, place, here).findings[0].table
    for cells, result in zip(finding.rows, results, strict=True):
        measured = EvaluationResult.read(here / "cat" / result.slug / "samples" / "metrics.json")
        shown = dict(zip(finding.header, cells, strict=True))
        assert float(shown["paper: FID"]) == result.metrics["fid"]
        assert float(shown["Fréchet distance"]) == pytest.approx(measured.metrics["frechet_distance"], rel=1e-3)
        assert shown["samples"] == "12" and shown["counted images"] == f"{progress.images_seen:,}"
    assert (here / "cat.png").is_file()
    assert Folder.at(out).read("report.html") == page.read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_samplers_are_measured_on_a_model(
    pixels: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EVALUATIONS": (3, 5), "SMALL_COUNT": 8, "SAMPLER_NAMES": ("heun", "ddim")}.items():
        monkeypatch.setattr(samplers, name, value)
    out = tmp_path / "out"
    page = reproduce("samplers", str(out), ReproductionOptions(small=True, data={"": str(pixels)}, model=str(trained)))
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["ddim-3", "ddim-5", "heun-3", "heun-5"]
    cards = [read_json(path / "sampling.json") for path in sorted((out / "samples").iterdir())]
    assert [card["network_evaluations"] for card in cards] == [3, 5, 3, 5]
    for folder in (out / "samples").iterdir():
        measured = EvaluationResult.read(folder / "metrics.json").metrics["frechet_distance"]
        assert f"<td>{measured:.3g}" in page.read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_canvases_are_sampled_around_held_out_images(
    pixels: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"GIVEN_IMAGES": 1, "SAMPLES_AROUND": 2, "CANVAS_STEPS": 2, "CANVAS_FACTORS": (2.0,), "WIDE_FACTOR": 2}
    for name, value in changed.items():
        monkeypatch.setattr(extrapolation, name, value)
    monkeypatch.setattr(extrapolation, "SMALL_SIDE", 16)
    out = tmp_path / "my out"
    page = reproduce(
        "extrapolation", str(out), ReproductionOptions(small=True, data={"": str(pixels)}, model=str(trained))
    )
    given = np.asarray(Image.open(out / "references" / "0.png"))
    rows = open_dataset(pixels).rows(range(len(open_dataset(pixels))))["image"].transpose(0, 2, 3, 1)
    assert any((given == row).all() for row in rows)
    for method in ("replace", "resample", "reconstruct"):
        sampled = np.asarray(Image.open(out / "around" / f"32-{method}-0" / "000000" / "000000.png"))
        assert sampled.shape == (32, 32, 3) and np.abs(sampled[8:24, 8:24].astype(int) - given).max() <= 1
    assert "<td>0s</td>" not in page.read_text()  # of each method
    assert {path.name for path in (out / "wide").iterdir()} == {"rescale", "extrapolate", "windows"}
