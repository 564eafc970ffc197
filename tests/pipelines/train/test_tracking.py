"""Tracking: a real MLflow server that is away when a run begins, is killed under it and comes back, misses nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from helpers import tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.train import train
from patchloom.platform.files.storage import read_json
from patchloom.platform.records.run import ProgressLine, read_progress
from patchloom.platform.tracking.forwarder import MlflowForwarder, line_metrics

pytestmark = pytest.mark.ray


class Server:
    """`mlflow server` in a process group of its own, on a port that stays the same."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.address = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=self.folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
        wait_until(self._answers, self.process)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is not started yet, and the address of the tests' MLflow."""
    made = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield made
    if made.process.poll() is None:
        made.kill()


def test_a_server_that_goes_and_comes_back_has_every_line_and_picture_once(
    server: Server, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    made = train(tiny_recipe(), str(pixels), str(run), workers=0)  # nobody answers yet
    assert made.run_id is None and (run / "model" / "model.json").is_file()
    assert server.address in (said := capsys.readouterr().out)
    assert "--resume" in said
    with pytest.raises(UserError, match="--resume"):
        register(str(run), "early")
    server.start()
    made = train(tiny_recipe(), str(pixels), str(run), workers=0, resume=True)
    assert made.run_id is not None
    assert_is_mirrored(server.address, made.run_id, run)
    assert mlflow.MlflowClient(server.address).get_run(made.run_id).info.status == "FINISHED"
    goes_and_comes_back(server, run, tmp_path / "again")


def test_a_run_is_sent_to_another_store_by_resume(
    trained: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = Path(shutil.copytree(trained, tmp_path / "run")), f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    made = train(tiny_recipe(), str(pixels), str(run), workers=0, resume=True)
    assert made.run_id is not None and made.run_id != read_json(trained / "run.json")["run_id"]
    assert_is_mirrored(store, made.run_id, run)


def test_a_run_without_a_line_is_begun_too(tmp_path: Path) -> None:
    asked = []
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])  # not what an earlier test set

    def begun() -> str:
        asked.append(client.create_run("0").info.run_id)
        return str(asked[-1])

    with MlflowForwarder(tmp_path, begun, lambda _: None, begins=True):
        pass
    assert len(asked) == 1 and client.get_run(asked[0]).info.status == "RUNNING"
    with MlflowForwarder(tmp_path, begun, lambda _: None):
        pass
    assert len(asked) == 1  # nobody asked for it, and there was nothing to send


LOADED = """
import sys
from patchloom.platform.tracking.client import is_reachable
print(is_reachable(), "mlflow" in sys.modules)
"""


def test_a_database_of_mlflow_is_known_without_its_client(mlflow_store: Path, tmp_path: Path) -> None:
    def asked(uri: str) -> str:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, env=environment)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    mlflow.MlflowClient().search_experiments()  # makes the tables
    assert asked(f"sqlite:///{mlflow_store / 'mlflow.db'}") == "True False"
    assert asked(f"sqlite:///{tmp_path / 'new.db'}") == "True True"  # the client makes them
    (tmp_path / "text.db").write_text("no database, but long enough to be looked at as one" * 100)
    assert "cannot be opened" in asked(f"sqlite:///{tmp_path / 'text.db'}")


def goes_and_comes_back(server: Server, run: Path, again: Path) -> None:
    """The same lines, written again one by one, while the server is killed and started anew."""
    shutil.copytree(run / "previews", again / "previews")
    lines, seen = read_progress(run), list[ProgressLine]()
    client = mlflow.MlflowClient(server.address)
    run_id = client.create_run("0").info.run_id
    with MlflowForwarder(again, lambda: run_id, seen.append):
        write_lines(again, lines[:4])
        wait_until(lambda: len(client.get_metric_history(run_id, "loss")) == 4, server.process)
        server.kill()
        write_lines(again, lines[4:8])
        wait_for(lambda: len(seen) == 8)
        server.start()
        write_lines(again, lines[8:])
    assert seen == lines
    assert_is_mirrored(server.address, run_id, again)


def write_lines(run: Path, lines: list[ProgressLine]) -> None:
    for line in lines:
        line.append_to(run)


def wait_for(condition: Callable[[], bool]) -> None:
    with subprocess.Popen(["sleep", "60"], text=True) as patience:
        wait_until(condition, patience)
        patience.kill()


def assert_is_mirrored(store: str, run_id: str, run: Path) -> None:
    """MLflow holds every number of every line once, at its step, and every preview once."""
    lines = read_progress(run)
    client = mlflow.MlflowClient(store)
    for name in set().union(*map(line_metrics, lines)):
        history = [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        assert history == [(line.step, line_metrics(line)[name]) for line in lines if name in line_metrics(line)]
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    steps = sorted(int(re.split("[+%]", path)[2]) for path in pictures)  # images/preview+step+39+timestamp+...
    assert steps == [line.step for line in lines if line.preview]
