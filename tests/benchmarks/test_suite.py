"""The suite: selection, result files, errors, and the counts of the training benchmarks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from patchloom.benchmarks.overlap import hidden_limit
from patchloom.benchmarks.result_file import SuiteResults, read_plot_data
from patchloom.benchmarks.suite import BENCHMARKS, keep_results, run_benchmarks, select_benchmarks
from patchloom.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def test_a_group_selects_its_parts_and_no_name_selects_all() -> None:
    assert select_benchmarks(["read", "train"]) == ["read", *(name for name in BENCHMARKS if name.startswith("train."))]
    assert select_benchmarks(["train.sizes", "train.sizes"]) == ["train.sizes"]
    assert select_benchmarks([]) == list(BENCHMARKS)
    with pytest.raises(UserError, match=r"trane.*train"):
        select_benchmarks(["trane"])
    for name, entry in BENCHMARKS.items():
        assert callable(entry.load()), name


def test_results_of_one_day_are_merged(tmp_path: Path) -> None:
    run_benchmarks(["train.memory"], out=str(tmp_path), tiny=True)
    results = run_benchmarks(["scaling"], out=str(tmp_path), tiny=True)
    (path,) = tmp_path.glob("benchmark-*.json")
    kept = json.loads(path.read_text())
    assert set(kept["subjects"]) == {"train.memory", "scaling"} and set(results.subjects) == {"scaling"}
    assert kept["subjects"]["scaling"] == json.loads(results.to_json())["subjects"]["scaling"]
    assert SuiteResults.from_json(path.read_text()).subjects["scaling"] == results.subjects["scaling"]
    assert kept["machine"]["versions"]["torch"] and kept["machine"]["cpus"] >= 1
    names = os.uname().nodename, str(Path.home()), str(ROOT)
    assert not any(name in path.read_text() for name in names if len(name) > 1)  # nothing that names the host


def test_results_of_another_machine_on_that_day_are_kept(tmp_path: Path) -> None:
    results = run_benchmarks(["scaling"], out=str(tmp_path), tiny=True)
    other = replace(results, machine=replace(results.machine, cpus=10**6))
    for _ in range(2):
        keep_results(other, tmp_path)
    paths = sorted(tmp_path.glob("benchmark-*.json"), reverse=True)
    kept = [SuiteResults.from_json(path.read_text()) for path in paths]
    assert [each.machine for each in kept] == [results.machine, other.machine]


def test_a_folder_that_cannot_be_created_is_an_error_before_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run_benchmarks(["scaling"], out=str(tmp_path / "file" / "results"), tiny=True)


def test_a_smaller_crop_keeps_less_memory_for_the_backward_pass() -> None:
    findings = run_benchmarks(["train.memory"], tiny=True).subjects["train.memory"].findings
    crops = {found.what: found.measured.median for found in findings if "per crop of" in found.what}
    full, half, quarter = crops.values()
    assert full / half == pytest.approx(4, rel=0.05) and half / quarter == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("ready", "sizes", "hidden"),
    [
        ([0.0, 0.0], [1.0, 3.0], 1.0),
        ([1.0], [5.0], 0.0),
        ([0.5, 1.0], [2.0, 2.0], 0.5),
        ([0.25, 1.0], [3.0, 1.0], 0.75),
    ],
)
def test_what_can_be_hidden_of_sums_that_take_as_long_as_the_backward_pass(
    ready: list[float], sizes: list[int], hidden: float
) -> None:
    assert hidden_limit(ready, [float(size) for size in sizes]) == pytest.approx(hidden)


def test_training_benchmarks_run_and_count_images_and_updates() -> None:
    results = run_benchmarks(["train.plain", "train.sizes", "train.parts"], tiny=True).subjects
    for result in results.values():
        rates = [found.measured.median for found in result.findings if "images/s" in found.unit]
        assert all(rate > 0 for rate in rates)
        assert all(found.is_met is None for found in result.findings)  # the smallest sizes have no targets
    gains = [found for found in results["train.sizes"].findings if found.what == "p = 0.5 over p = 1, one worker"]
    assert [found.limit for found in gains] == pytest.approx([1.9 / 0.7, 1 / 0.7])
    assert gains[0].measured.median / gains[1].measured.median == pytest.approx(1.9)


def test_the_command_prints_one_json_object_and_an_error_is_one_line() -> None:
    command = [sys.executable, "-m", "patchloom.pipelines.cli", "benchmark"]
    done = subprocess.run([*command, "scaling", "--tiny", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["subjects"]) == ["scaling"]
    done = subprocess.run([*command, "trane"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_result_files_of_this_repository_can_be_read_and_merged() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("benchmark-*.json"):
        text = path.read_text()
        results = SuiteResults.from_json(text)
        assert json.loads(results.to_json()) == json.loads(text)
        assert results.to_json(indent=2) + "\n" == text
        assert list(read_plot_data(path).findings) == list(results.subjects)
