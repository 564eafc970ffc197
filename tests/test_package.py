"""The package: a wheel has all sub-packages and works outside the repository."""

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from patchloom.pipelines.registry.wheel import wheel_bytes

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_built_wheel_has_every_folder_and_runs_outside_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("patchloom-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for folder in ("models", "platform", "pipelines", "tune_configs", "benchmarks"):
        files = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("*.yaml"), *(ROOT / folder).glob("*.json")]
        assert {f"patchloom/{path.relative_to(ROOT).as_posix()}" for path in files} <= names
    assert "patchloom/platform/__init__.py" not in names and "patchloom/py.typed" in names
    with zipfile.ZipFile(io.BytesIO(wheel_bytes())) as ours:  # the wheel of a registered version is the built one
        assert set(ours.namelist()) == {name for name in names if not name.endswith("top_level.txt")}
        for name in ours.namelist():
            if not name.endswith(("/RECORD", "/WHEEL", "/METADATA")):  # the README can be newer than the installation
                assert ours.read(name) == (tmp_path / "installed" / name).read_bytes(), name
    code = (
        "import patchloom.platform.recipe as recipe, patchloom.pipelines.train.loop\n"
        "print(recipe.__file__, recipe.load_recipe('demo_latents').name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split() == [
        str(tmp_path / "installed/patchloom/platform/recipe/__init__.py"),
        "demo-latents",
    ], done.stderr


def test_wheel_of_a_registered_version_is_the_code_with_right_checksums() -> None:
    content = wheel_bytes()
    assert content == wheel_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = set(archive.namelist())
        rows = list(csv.reader(archive.read("patchloom-0.1.0.dist-info/RECORD").decode().splitlines()))
        assert {row[0] for row in rows} == names
        assert "patchloom/py.typed" in names
        for name, recorded, size in rows[:-1]:
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).decode().rstrip("=")
            assert (recorded, int(size)) == (f"sha256={digest}", len(archive.read(name)))
        for folder in ("models", "platform", "pipelines", "benchmarks"):
            for path in (ROOT / folder).rglob("*.py"):
                assert archive.read(f"patchloom/{path.relative_to(ROOT).as_posix()}") == path.read_bytes()
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert b"\nRequires-Dist: torch" in archive.read("patchloom-0.1.0.dist-info/METADATA")
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]
