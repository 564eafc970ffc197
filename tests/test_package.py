"""The package: a wheel has all sub-packages and works outside the repository."""

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import venv
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


def test_wheel_has_every_file_of_the_package() -> None:
    with zipfile.ZipFile(io.BytesIO(wheel_bytes())) as archive:  # the test above compares it with the built one
        names = {name for name in archive.namelist() if name.startswith("patchloom/")}
    folders = [ROOT / folder for folder in ("models", "platform", "pipelines", "tune_configs", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in (ROOT / "patchloom").glob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix().removeprefix("patchloom/") for path in files if is_packaged(path)}
    assert {name.removeprefix("patchloom/") for name in names} == wanted
    assert {Path(name).suffix for name in wanted} >= {".py", ".typed", ".html", ".svg", ".yaml", ".json"}


def is_packaged(path: Path) -> bool:
    """Whether a file belongs into a wheel: not measurements, nor what Python and tools leave behind."""
    name = path.relative_to(ROOT).as_posix()
    return "__pycache__" not in name and "/." not in name and not name.startswith("benchmarks/results/")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with `build` and `uv`."""
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder, with_pip=True)
    done = run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "build", "uv")
    if done.returncode:
        pytest.skip(f"build and uv cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return folder / "bin"


@pytest.fixture(scope="module")
def built(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source archive, which is made from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(tools / "python", "-m", "build", "--outdir", str(folder), str(ROOT))
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("patchloom-*.whl")
    return wheel


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_wheel_runs_the_demo_in_a_new_environment(installer: str, tools: Path, built: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    venv.create(new, with_pip=installer == "pip")
    install = [new / "bin" / "python", "-m", "pip", "install", "--quiet"]
    if installer == "uv":
        install = [tools / "uv", "pip", "install", "--quiet", "--python", str(new / "bin" / "python")]
    done = run(*install, "-c", str(ROOT / "constraints.txt"), str(built))
    assert done.returncode == 0, done.stderr
    place = run(new / "bin" / "python", "-c", "import patchloom; print(patchloom.__file__)", cwd=tmp_path)
    assert Path(place.stdout.strip()).is_relative_to(new)
    done = run(new / "bin" / "patchloom", "demo", "--pixels", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
    assert len(list((tmp_path / "demo" / "samples").glob("*/*.png"))) == 64


def run(program: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program as a user of it does, without the variables that let tests import the checkout."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    if cwd is not None:
        variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{cwd / 'mlflow.db'}"
    return subprocess.run([program, *arguments], capture_output=True, text=True, cwd=cwd, env=variables)


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
