"""The nightly pipeline of the docs: it promotes a better version, and does nothing the second time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from patchloom.pipelines.registry.promoting import promote_model
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.versions import list_versions

SCRIPT = Path(__file__).parents[1] / "docs" / "nightly.py"


@pytest.mark.slow
def test_better_version_is_promoted_and_worse_version_is_not(
    trained: Path, changed_copy: Callable[[Path, float], Path], pixels: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), "nightly", "--reference", str(pixels), "--out", str(tmp_path / "out"),
               "--seeds", "0-15", "--steps", "2", "--features", "colours", "--metric", "frechet_distance"]  # fmt: skip

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))

    def champion() -> str:
        return next(found.version for found in list_versions("nightly") if "champion" in found.aliases)

    missing = run()
    assert missing.returncode == 2 and missing.stderr.strip().splitlines()[-1].startswith("nightly: ")
    register(str(changed_copy(trained, 3.0)), "nightly")  # weights far off
    promote_model("nightly", "1")
    register(str(trained), "nightly")
    better = run()
    assert better.returncode == 0, better.stdout + better.stderr
    assert champion() == "2" and "models:/nightly@champion is version 2 (" in better.stdout
    again = run()
    assert again.returncode == 0 and "version 2" in again.stdout
    register(str(changed_copy(trained, 2.0)), "nightly")
    worse = run()
    assert worse.returncode == 2 and all(f"version {number}" in worse.stderr for number in (2, 3))
    assert len(worse.stderr.strip().splitlines()) == 1 and champion() == "2"
