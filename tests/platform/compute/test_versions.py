"""Versions: a worker with other code than the command takes no part, and the message says where it runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import patchloom
from patchloom.errors import UserError
from patchloom.platform.compute.versions import ProcessVersions, check_versions, own_versions


def test_equal_versions_pass_and_different_ones_are_named() -> None:
    here, there = ({"torch": version, "ray": "2.60"} for version in ("2.13", "2.12"))
    check_versions([ProcessVersions("node-a", here), ProcessVersions("node-b", here)])
    with pytest.raises(UserError, match=r"torch is 2\.13 on node-a and 2\.12 on node-b") as caught:
        check_versions([ProcessVersions("node-a", here), ProcessVersions("node-b", there)])
    assert "ray" not in str(caught.value)


def test_own_versions_name_the_host_and_the_code() -> None:
    assert set(own_versions().versions) == {"patchloom", "python", "torch", "ray", "numpy"}


# the workers import the copy of the package that PYTHONPATH names in their environment
SCRIPT = """
import json, os, sys
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
import ray
other, images, pixels, recipe = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=2, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": other}})
import patchloom
from patchloom.platform.recipe import check_recipe
for name, call in {
    "prepare": lambda: patchloom.prepare(images, "data", resolution=16, workers=1),
    "train": lambda: patchloom.train(check_recipe(recipe), pixels, "run", workers=1),
}.items():
    try:
        call()
        print(name, "DONE")
    except Exception as error:
        from patchloom.pipelines.cli.app import _user_error
        print(name, "REFUSED", _user_error(error))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_workers_with_other_code_are_refused(images: Path, pixels: Path, tmp_path: Path) -> None:
    from helpers import tiny_recipe

    package = Path(patchloom.__file__).parent
    shutil.copytree(package, tmp_path / "other" / "patchloom", ignore=shutil.ignore_patterns("__pycache__"))
    step = tmp_path / "other" / "patchloom" / "models" / "step.py"
    step.write_text(step.read_text() + "\n# another learning rate\n")
    arguments = [str(tmp_path / "other"), str(images), str(pixels), tiny_recipe().model_dump(mode="json")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    for command in ("prepare", "train"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(command)]
        assert line.startswith(f"{command} REFUSED") and "patchloom is" in line, done.stdout + done.stderr
    assert not (tmp_path / "run" / "progress.jsonl").exists()
    assert not (tmp_path / "data" / "dataset.json").exists()
