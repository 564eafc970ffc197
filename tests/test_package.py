"""The package: a wheel holds all four rooms and works away from the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_holds_every_room_and_runs_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("patchloom-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for room in ("models", "platform", "pipelines", "tune_configs"):
        here = {path.name for path in (ROOT / room).iterdir() if path.suffix in (".py", ".yaml", ".json")}
        assert here <= {name.rsplit("/", 1)[1] for name in names if name.startswith(f"patchloom/{room}/")}
    assert "patchloom/platform/__init__.py" not in names
    code = (
        "import patchloom.platform.recipe as recipe, patchloom.pipelines.train_loop\n"
        "print(recipe.__file__, recipe.load_recipe('demo_latents').name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split() == [str(tmp_path / "installed/patchloom/platform/recipe.py"), "demo-latents"], (
        done.stderr
    )
