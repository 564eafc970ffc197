"""Platform cost: a process steps only in its turn, with all that it started, and none of them outlives it."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from patchloom.benchmarks.platform_cost import Paused

STEPS = """
import itertools, json, subprocess, sys, time
if sys.argv[2:] == ["parent"]:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], "child"])
for step in itertools.count(2, 2):
    with open("lines.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    time.sleep(0.02)
"""


def test_a_process_and_its_children_step_only_in_their_turn(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STEPS, STEPS, "parent"], cwd=tmp_path) as process:
        lines = tmp_path / "lines.jsonl"
        paused = Paused(psutil.Process(process.pid), lines)
        try:
            for asked in (3, 5):
                before = lines.read_text().count("\n") if lines.exists() else 0
                paused.seconds_of_a_step(asked)
                written = lines.read_text().count("\n")
                assert written >= before + asked
                time.sleep(0.3)  # fifteen lines of one that went on
                assert lines.read_text().count("\n") == written
            children = paused.root.children(recursive=True)
            assert len(children) == 1
        finally:
            paused.end()
        assert not any(child.is_running() for child in children)
