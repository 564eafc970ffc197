"""Services that do not answer are named within seconds: a closed port, a silent one, and one of another kind."""

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import environment, start_cli

from patchloom.errors import UserError
from patchloom.platform.compute.answering import ANSWER_WAIT_S, answers_http, check_ray_address
from patchloom.platform.compute.job_server import job_server_address

START_S = 60.0  # of a command on a busy machine, far below the minutes that Ray and MLflow wait


@pytest.fixture
def closed() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """A web server, which answers every request with 404 or 501."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_cli(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, float]:
    """The exit code, the error lines and the seconds of a command."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "patchloom.pipelines.cli", *arguments],
        cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


@pytest.mark.parametrize("kind", ["closed", "silent", "web"])
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_ray_address_that_is_no_cluster_is_refused(
    kind: str, scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = scheme + request.getfixturevalue(kind)
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        check_ray_address()
    assert address in str(refused.value) and time.monotonic() - began < 2 * ANSWER_WAIT_S


@pytest.mark.parametrize("address", ["no-port", "127.0.0.1:x", "ray://", "127.0.0.1:99999"])
def test_malformed_ray_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as refused:
        check_ray_address()
    assert address in str(refused.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:x", "http://127.0.0.1:99999", "http://:8265"])
def test_malformed_address_of_a_job_server_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=re.escape(address)):
        job_server_address(address)


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_ray_address_without_a_place_is_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_ray_address()


def test_running_cluster_answers(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    check_ray_address()


def test_every_status_of_a_web_server_is_an_answer(web: str, closed: str, silent: str) -> None:
    assert answers_http(f"http://{web}/health")
    assert not answers_http(f"http://{closed}/health") and not answers_http(f"http://{silent}/health")


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_doctor_names_both_services(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    address = request.getfixturevalue(kind)
    code, said, seconds = run_cli(tmp_path, "doctor", RAY_ADDRESS=address, MLFLOW_TRACKING_URI=f"http://{address}")
    assert code == 1 and seconds < START_S
    failed = [line for line in said.splitlines() if "FAILED" in line]
    assert [line.split(":")[0] for line in failed] == ["MLflow", "Ray"] and all(address in line for line in failed)


NEED_MLFLOW = (
    "models list",
    "models show models:/a/1",
    "models register RUN a",
    "models promote a 1",
    "sample models:/a@champion samples --workers 0",
    "tune demo_pixels_search --data DATA --out search",
)


def test_commands_that_need_mlflow_name_it(silent: str, trained: Path, pixels: Path, tmp_path: Path) -> None:
    given = {"RUN": str(trained), "DATA": str(pixels)}
    folders = [tmp_path / str(number) for number, _ in enumerate(NEED_MLFLOW)]
    began, processes = time.monotonic(), []
    with environment(MLFLOW_TRACKING_URI=f"http://{silent}"):  # all at once, as each of them waits for an answer
        for command, folder in zip(NEED_MLFLOW, folders, strict=True):
            folder.mkdir()
            processes.append(start_cli(*(given.get(word, word) for word in command.split()), cwd=folder))
    for command, folder, process in zip(NEED_MLFLOW, folders, processes, strict=True):
        said, _ = process.communicate(timeout=2 * START_S)
        assert process.returncode == 2 and len(said.splitlines()) == 1 and silent in said, (command, said)
        assert not list(folder.iterdir()), command
    assert time.monotonic() - began < 2 * START_S


def test_training_goes_on_without_mlflow(silent: str, pixels: Path, tmp_path: Path) -> None:
    arguments = [
        "autoencoder",
        "train",
        str(pixels),
        "--out",
        "ae",
        "--widths",
        "8,8",
        "--images",
        "16",
        "--patch",
        "8",
    ]
    code, said, seconds = run_cli(tmp_path, *arguments, "--workers", "0", MLFLOW_TRACKING_URI=f"http://{silent}")
    assert code == 0 and silent in said and seconds < 2 * START_S
    assert (tmp_path / "ae" / "model" / "config.json").is_file()
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code, said, _ = run_cli(tmp_path, *arguments, "--workers", "0", MLFLOW_TRACKING_URI=store)
    assert code == 0, said
    import mlflow

    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("patchloom").experiment_id])
    assert run.info.status == "FINISHED" and {"loss", "psnr_db", "ssim"} <= run.data.metrics.keys()


def test_train_names_the_ray_address_before_it_writes(closed: str, pixels: Path, tmp_path: Path) -> None:
    code, said, seconds = run_cli(
        tmp_path, "train", "demo_pixels", "--data", str(pixels), "--out", "run", RAY_ADDRESS=closed
    )
    assert code == 2 and closed in said and seconds < START_S and not (tmp_path / "run").exists()
