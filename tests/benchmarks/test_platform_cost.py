"""Platform benchmark: a process and its children run only while they are measured, and all of them end."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from patchloom.benchmarks.findings import TINY
from patchloom.benchmarks.platform_cost import PausedProcess, _dataset, _network, _recipe, against_bare_steps
from patchloom.models.denoiser import skeleton
from patchloom.models.flops import parameter_count, training_flops
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.platform.dataset import open_dataset

STEPS = """
import itertools, json, subprocess, sys, time
if sys.argv[2:] == ["parent"]:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], "child"])
for step in itertools.count(2, 2):
    with open("lines.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    time.sleep(0.02)
"""


def test_a_process_and_its_children_run_only_while_measured(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STEPS, STEPS, "parent"], cwd=tmp_path) as process:
        lines = tmp_path / "lines.jsonl"
        paused = PausedProcess(psutil.Process(process.pid), lines)
        try:
            for lines_wanted in (3, 5):
                before = lines.read_text().count("\n") if lines.exists() else 0
                paused.measure_step(lines_wanted)
                written = lines.read_text().count("\n")
                assert written > before + lines_wanted  # one line before the first that counts
                time.sleep(0.3)  # a running process would write 15 lines
                assert lines.read_text().count("\n") == written
            children = paused.root.children(recursive=True)
            assert len(children) == 1
        finally:
            paused.end()
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_process_that_has_ended_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("no such dataset\n")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        paused = PausedProcess(psutil.Process(process.pid), tmp_path / "lines.jsonl", log)
        with pytest.raises(RuntimeError, match="no such dataset"):
            paused.measure_step()


def test_bare_steps_have_the_network_of_the_command(tmp_path: Path) -> None:
    recipe = _recipe(TINY)
    denoiser = new_model_card(recipe, open_dataset(str(_dataset(tmp_path / "data", TINY)))).denoiser
    config = _network(TINY)
    assert training_flops(denoiser, TINY.side) == training_flops(config, TINY.side)
    assert parameter_count(skeleton(denoiser)) == parameter_count(skeleton(config))


@pytest.mark.slow
@pytest.mark.ray
def test_all_alternatives_are_measured_and_end() -> None:
    this = psutil.Process()
    before = set(this.children(recursive=True))
    found = {finding.what: finding for finding in against_bare_steps(TINY, lambda text: None)}
    assert {finding.unit for finding in found.values()} == {"s", "%"} and len(found) == 5
    remaining = [each for each in set(this.children(recursive=True)) - before if each.status() != psutil.STATUS_ZOMBIE]
    # Python's resource tracker lives as long as this process
    assert not [process for process in remaining if not any("resource_tracker" in word for word in process.cmdline())]
