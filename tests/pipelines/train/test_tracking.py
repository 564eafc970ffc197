"""Tracking with a real MLflow server that is down at the start of a run, or is killed and restarted during it."""

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
from patchloom.pipelines.train.mlflow_run import ensure_mlflow_run
from patchloom.platform.files.cache import cache_folder
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import read_json
from patchloom.platform.recipe import load_recipe, recipe_yaml
from patchloom.platform.records.run import ProgressLine, RunCard, read_progress
from patchloom.platform.tracking.forwarder import MlflowForwarder, line_metrics
from patchloom.platform.tracking.registry import fetch_model

pytestmark = pytest.mark.ray


class Server:
    """`mlflow server` in its own process group, always on the same port."""

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
    """A server that is not started yet; its address is the tracking URI."""
    made = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield made
    if made.process.poll() is None:
        made.kill()


def test_restarted_server_receives_every_line_and_preview_once(
    server: Server, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    made = train(tiny_recipe(), str(pixels), str(run), workers=0)  # the server is not started
    assert made.run_id is None and (run / "model" / "model.json").is_file()
    assert server.address in (said := capsys.readouterr().out)
    assert "--resume" in said
    with pytest.raises(UserError, match=server.address):
        register(str(run), "early")
    server.start()
    with pytest.raises(UserError, match="--resume"):
        register(str(run), "early")
    made = train(tiny_recipe(), str(pixels), str(run), workers=0, resume=True)
    assert made.run_id is not None
    assert_is_mirrored(server.address, made.run_id, run)
    assert mlflow.MlflowClient(server.address).get_run(made.run_id).info.status == "FINISHED"
    forward_while_the_server_restarts(server, run, tmp_path / "again")


def test_version_on_a_server_is_fetched_once_into_the_cache_of_the_node(
    server: Server, trained: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    reference = register(str(trained / "model"), "on-a-server")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder = fetch_model(reference).folder
    assert (folder / "model.safetensors").read_bytes() == (trained / "model" / "model.safetensors").read_bytes()
    assert cache_folder("models") in folder.parents and not any((tmp_path / "temporary").iterdir())
    shutil.rmtree(server.folder / "artifacts")
    assert fetch_model(reference).folder == folder
    code = f"from patchloom.platform.tracking.registry import fetch_model; print(fetch_model({reference!r}).folder)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(folder)


def test_resume_sends_the_run_to_another_store(
    trained: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = Path(shutil.copytree(trained, tmp_path / "run")), f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    made = train(tiny_recipe(), str(pixels), str(run), workers=0, resume=True)
    assert made.run_id is not None and made.run_id != read_json(trained / "run.json")["run_id"]
    assert_is_mirrored(store, made.run_id, run)


def test_run_without_a_line_is_created_too(tmp_path: Path) -> None:
    created = []
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])  # not the address that an earlier test set

    def create() -> str:
        created.append(client.create_run("0").info.run_id)
        return str(created[-1])

    with MlflowForwarder(tmp_path, create, lambda _: None, creates_run=True):
        pass
    assert len(created) == 1 and client.get_run(created[0]).info.status == "RUNNING"
    with MlflowForwarder(tmp_path, create, lambda _: None):
        pass
    assert len(created) == 1  # not requested, and there was nothing to send


def test_run_that_goes_on_is_shown_as_running(trained: Path, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    RunCard.read(run).model_copy(update={"run_id": None}).write(run)
    run_id = ensure_mlflow_run(run, Folder(str(run)))
    for ended, then in (("KILLED", "RUNNING"), ("FAILED", "RUNNING"), ("FINISHED", "FINISHED")):
        client.set_terminated(run_id, ended)
        assert ensure_mlflow_run(run, Folder(str(run))) == run_id
        assert client.get_run(run_id).info.status == then
    longer = load_recipe(run / "recipe.yaml", ["train.images=100000"])
    (run / "recipe.yaml").write_text(recipe_yaml(longer))
    ensure_mlflow_run(run, Folder(str(run)))
    assert client.get_run(run_id).info.status == "RUNNING"


def test_damaged_line_is_skipped_and_the_others_are_sent(tmp_path: Path) -> None:
    client, shown = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"]), list[int]()
    run_id = client.create_run("0").info.run_id
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "lo', '{"step": 3, "loss": 0.25}']
    (tmp_path / "progress.jsonl").write_text("\n".join(lines) + "\n")
    with MlflowForwarder(tmp_path, lambda: run_id, lambda line: shown.append(line.step)):
        pass
    assert shown == [1, 3]
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "loss")] == [(1, 0.5), (3, 0.25)]


LOADED = """
import sys
from patchloom.platform.tracking.client import is_reachable
print(is_reachable(), "mlflow" in sys.modules)
"""


def test_mlflow_database_is_found_without_importing_mlflow(mlflow_store: Path, tmp_path: Path) -> None:
    def run_loaded(uri: str) -> str:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, env=environment)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    mlflow.MlflowClient(f"sqlite:///{mlflow_store / 'mlflow.db'}").search_experiments()  # creates the tables
    assert run_loaded(f"sqlite:///{mlflow_store / 'mlflow.db'}") == "True False"
    assert run_loaded(f"sqlite:///{tmp_path / 'new.db'}") == "True True"  # the client creates the tables
    (tmp_path / "text.db").write_text("not a database, but long enough for one " * 100)
    assert "text.db" in run_loaded(f"sqlite:///{tmp_path / 'text.db'}")


def forward_while_the_server_restarts(server: Server, run: Path, again: Path) -> None:
    """Write the same lines again while the server is killed and restarted."""
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
    """Check that MLflow has every number of every line once, at its step, and every preview once."""
    lines = read_progress(run)
    client = mlflow.MlflowClient(store)
    for name in set().union(*map(line_metrics, lines)):
        history = [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        assert history == [(line.step, line_metrics(line)[name]) for line in lines if name in line_metrics(line)]
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    steps = sorted(int(re.split("[+%]", path)[2]) for path in pictures)  # images/preview+step+39+timestamp+...
    assert steps == [line.step for line in lines if line.preview]
