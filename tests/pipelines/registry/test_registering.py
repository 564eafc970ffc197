"""Registering from two processes at once, in a new store: no version is lost or mixed up."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import environment

from patchloom.models.checkpoints import load_model, read_card, save_model
from patchloom.pipelines.registry.registering import register
from patchloom.platform.records.run import RunCard
from patchloom.platform.tracking.aliases import move_alias
from patchloom.platform.tracking.client import connect, experiment_id
from patchloom.platform.tracking.registry import fetch_model
from patchloom.platform.tracking.versions import list_versions

pytestmark = pytest.mark.ray
REGISTER = """
import sys, time
from pathlib import Path
from patchloom.pipelines.registry.registering import register
side, ready, go, *folders = sys.argv[1:]
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.001)
for folder in folders:
    print(register(folder, "raced", alias=side))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a new `mlflow server` with its own database and artifacts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/artifacts",
    ]
    command = [sys.executable, "-m", "mlflow", "server", *stores, "--port", str(port), "--workers", "1"]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def folders(trained: Path, tmp_path: Path) -> dict[str, list[Path]]:
    """Four models with different weights, two for each process."""
    denoiser, card = load_model(trained / "model"), read_card(trained / "model")
    made: dict[str, list[Path]] = {}
    for number, side in enumerate(("left", "right", "left", "right")):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        with torch.no_grad():
            next(denoiser.parameters()).add_(1)
        save_model(folder, denoiser, card)
        made.setdefault(side, []).append(folder)
    return made


def weights_of(folder: Path) -> str:
    return read_card(folder).weights_sha256


def race(folders: dict[str, list[Path]], tmp_path: Path) -> dict[str, list[str]]:
    """Let both processes register their models at the same time; returns the references that each got."""
    processes = {
        side: subprocess.Popen(
            [sys.executable, "-c", REGISTER, side, str(tmp_path / side), str(tmp_path / "go"), *map(str, models)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for side, models in folders.items()
    }  # fmt: skip
    while not all((tmp_path / side).exists() for side in folders):
        assert all(process.poll() is None for process in processes.values())
        time.sleep(0.01)
    (tmp_path / "go").touch()
    given = {}
    for side, process in processes.items():
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        lines = output.splitlines()
        given[side] = [line for line in lines if line.startswith("models:/")]
        assert lines == [
            line for one in given[side] for line in (f"  registered {one} as {side}", one)
        ]  # and no output of MLflow
    return given


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "mlflow server"])
def test_two_processes_register_at_the_same_time(
    store: str, folders: dict[str, list[Path]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = (
        request.getfixturevalue("server") if store == "mlflow server" else f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    )
    (tmp_path / "new").mkdir()
    with environment(MLFLOW_TRACKING_URI=uri):
        given = race(folders, tmp_path)
        assert sorted(given["left"] + given["right"]) == [f"models:/raced/{number}" for number in (1, 2, 3, 4)]
        for side, references in given.items():
            assert [weights_of(fetch_model(one).folder) for one in references] == list(map(weights_of, folders[side]))
            assert fetch_model(f"models:/raced@{side}").reference == references[-1]  # its last promotion
        assert {found.tags["weights_sha256"] for found in list_versions()} == {
            weights_of(folder) for models in folders.values() for folder in models
        }
        first = given["left"][0].rsplit("/", 1)[1]
        move_alias("raced", "right", first, "promote")
        assert fetch_model("models:/raced@right").version == first
        assert fetch_model("models:/raced@left").reference == given["left"][-1]


@pytest.mark.parametrize("name", ["50%20x", "j%2Fx", "q?r#s"])
def test_a_folder_with_characters_of_addresses_is_registered(name: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / name / "model")
    reference = register(str(tmp_path / name / "model"), "quoted")
    assert read_card(fetch_model(reference).folder) == read_card(trained / "model")


def test_registration_leaves_the_status_and_the_end_of_the_training_run(trained: Path, tmp_path: Path) -> None:
    client, run_id = connect(), str(RunCard.read(trained).run_id)
    before = client.get_run(run_id).info
    reference = register(str(trained), "registered-later")
    after, version = client.get_run(run_id).info, list_versions("registered-later")[0]
    assert (after.status, after.end_time) == (before.status, before.end_time) == ("FINISHED", before.end_time)
    assert version.run_id == run_id and fetch_model(reference).run_id == run_id
    damaged = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("patchloom.pipelines.registry.registering.wheel_bytes", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            register(str(damaged), "never-registered")
    runs = client.search_runs([experiment_id(client)], max_results=1)
    assert runs[0].data.tags["patchloom.folder"] == str(damaged) and runs[0].info.status == "FAILED"
