"""What commands print: results as JSON, quietly or with times; on narrow terminals; and completion in a shell."""

import json
import os
import platform
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import tiny_recipe
from PIL import Image

from patchloom.errors import UserError, did_you_mean
from patchloom.pipelines.cli.options import check_order, exists_here
from patchloom.platform.recipe import recipe_yaml

CLI = [sys.executable, "-m", "patchloom.pipelines.cli"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 20, 30)).save(folder / f"{number}.png")
    for number in range(7):
        (folder / f"text{number}.png").write_text("not an image")
    return folder


def test_json_is_one_document_on_stdout_and_progress_on_stderr(photos: Path, tmp_path: Path) -> None:
    done = run("prepare", "photos", "out", "--resolution", "8", "--workers", "0", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert (done.returncode, result["rows"], result["inputs"], result["skipped"]["count"]) == (0, 4, 11, 7)
    assert "11 images" in done.stderr
    card = json.loads(run("inspect", "out", "--json", cwd=tmp_path).stdout)
    assert card["rows"] == 4 and Path(card["contact_sheet"]).is_file()


def test_the_doctor_names_the_versions_for_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    done = run("doctor", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and "secret" not in done.stdout + done.stderr
    assert found["versions"] == {
        name: platform.python_version() if name == "python" else version(name)
        for name in ("patchloom", "python", "torch", "ray", "mlflow")
    }
    assert {name: service["works"] for name, service in found["services"].items()} == {"MLflow": False, "Ray": False}


def test_the_first_five_skipped_files_are_named(photos: Path, tmp_path: Path) -> None:
    done = run("prepare", "photos", "out", "--resolution", "8", "--workers", "0", cwd=tmp_path)
    named = [line for line in done.stdout.splitlines() if re.search(r"text\d\.png: \w", line)]
    assert len(named) == 5 and "2 more" in done.stdout and "skipped.jsonl" in done.stdout


def test_quiet_prints_only_the_result_and_errors(photos: Path, tmp_path: Path) -> None:
    command = ("prepare", "photos", "out", "--resolution", "8", "--workers", "0", "--quiet")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(r"4 rows \+ 7 skipped = 11 inputs in \S+\n", done.stdout)
    assert run("inspect", "missing", "--quiet", cwd=tmp_path).stderr.count("\n") == 1


def test_verbose_prints_times_and_the_traceback_of_an_error(photos: Path, tmp_path: Path) -> None:
    done = run("prepare", "photos", "out", "--resolution", "8", "--workers", "0", "--verbose", cwd=tmp_path)
    assert re.search(r"^\d\d:\d\d:\d\d   preparing: 11 images", done.stdout, re.MULTILINE)
    failed = run("inspect", "missing", "-v", cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" in failed.stderr
    assert run("inspect", "out", "--verbose", "--quiet", cwd=tmp_path).returncode == 2


def test_swapped_arguments_are_noticed(photos: Path, tmp_path: Path) -> None:
    done = run("prepare", "new", "photos", "--resolution", "8", cwd=tmp_path)
    assert done.returncode == 2 and "photos new" in done.stderr
    done = run("sample", "new", "models:/a/1", cwd=tmp_path)
    assert done.returncode == 2 and "models:/a/1 new" in done.stderr
    assert not (tmp_path / "new").exists()


def test_addresses_are_not_swapped(photos: Path) -> None:
    """A model can have the name of a folder here: `models export` wrote it, for example."""
    for address in ("s3://bucket/run", "models:/name/1", "runs:/1a2b/model"):
        check_order("RUN NAME", address, str(photos), exists_here)
    with pytest.raises(UserError):
        check_order("RUN NAME", "nothing", str(photos), exists_here)


@pytest.mark.parametrize(
    ("value", "known", "found"),
    [("heunn", ["heun", "euler"], "heun"), ("Cats", ["cats", "dogs"], "cats"), ("champoin", ["champion"], "champion"),
     ("x", ["heun"], None), (7, ["one"], None)],
)  # fmt: skip
def test_a_similar_value_is_suggested(value: object, known: list[str], found: str | None) -> None:
    assert (f" {found}?" in did_you_mean(value, known)) if found else did_you_mean(value, known) == ""


def terminal_output(arguments: list[str], cwd: Path, columns: int) -> str:
    """What a command prints in a terminal of so many columns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen(arguments, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    output, last = b"", time.monotonic() + 300
    while time.monotonic() < last:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                output += os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
        elif process.poll() is not None:
            break
    os.close(ours)
    assert process.wait(timeout=30) == 0, output
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())


def test_progress_fits_a_terminal_of_80_columns(pixels: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(name="a-recipe-with-a-long-name")))
    command = [*CLI, "train", "recipe.yaml", "--data", str(pixels), "--out", "run", "--workers", "0"]
    output = terminal_output(command, tmp_path, 80)
    shown = [line for line in re.split(r"[\r\n]+", output) if "training a-recipe" in line]
    assert shown and max(map(len, shown)) <= 80
    assert any("loss " in line and "ETA " in line for line in shown), shown


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ins"], {"inspect"}),
        (["models", "pro"], {"promote"}),
        (["train", "demo_pi"], {"demo_pixels"}),
        (["train", "/no/such/pa"], set()),
        (["tune", "demo_pi"], {"demo_pixels_search"}),
        (["sample", "--sampler", "dp"], {"dpmpp-2m", "dpmpp-2m-sde"}),
        (["evaluate", "--save"], {"--save-reference"}),
    ],
)
def test_bash_completes_commands_options_and_names(words: list[str], wanted: set[str], tmp_path: Path) -> None:
    """Bash itself calls the completion, with a program of the name on its PATH."""
    program = tmp_path / "patchloom"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m patchloom.pipelines.cli "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(patchloom completion bash)"\n'
        f"COMP_WORDS=(patchloom {' '.join(words)}); COMP_CWORD={len(words)}\n"
        "_patchloom_completion patchloom\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
    )
    assert set(done.stdout.split()) == wanted and "Traceback" not in done.stderr, done.stderr
