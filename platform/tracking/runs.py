"""Tracking: runs in MLflow, fed from the lines that a run writes on disk first."""

import contextlib
import json
import logging
import os
import re
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.compute.cluster import quiet_environment
from patchloom.platform.files.storage import locked
from patchloom.platform.progress import say
from patchloom.platform.records.run import PROGRESS_FILE, ProgressLine

EXPERIMENT = "patchloom"
RETRY_S = 10.0
BEGIN_AFTER_S = 15.0  # in MLflow, where a run has no line to send yet
FIRST_TIME_S = 300.0
_met: set[str] = set()  # stores that this process has seen whole


def tracking_uri() -> str:
    """Where MLflow keeps runs and models: MLFLOW_TRACKING_URI, else `mlflow.db` here; always absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        uri = f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}"
    return uri


def connect() -> Any:
    """A quiet MLflow client on `tracking_uri()`, which is made if it does not exist."""
    quiet_environment()
    logging.getLogger("alembic").setLevel(logging.ERROR)
    import mlflow

    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with _first_time(uri):
        client = mlflow.MlflowClient()
    _met.add(uri)
    return client


def _first_time(uri: str) -> AbstractContextManager[None]:
    """A turn of this process's own with a database that may not exist yet: two that make its tables spoil them."""
    prefix = "sqlite:///"
    database = Path(uri.removeprefix(prefix))
    if uri in _met or not uri.startswith(prefix) or not os.access(database.parent, os.W_OK):
        return nullcontext()
    return locked(database.parent, f".{database.name}.lock", wait_s=FIRST_TIME_S)


def experiment_id(client: Any) -> str:
    """The experiment of MLFLOW_EXPERIMENT_NAME, else `patchloom`; artifacts of a local store lie beside it."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri, location = tracking_uri(), None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlruns" / name).as_uri()
    tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on runs and their curves
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=tags))
    except MlflowException:  # another process was quicker
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def begin_run(name: str, kind: str, params: dict[str, Any], tags: dict[str, str], parent: str | None = None) -> str:
    """A new run, perhaps the child of another; returns its id."""
    client = connect()
    tags = {"mlflow.runName": name, "patchloom.kind": kind, **tags}
    if parent:
        tags["mlflow.parentRunId"] = parent
    run_id = str(client.create_run(experiment_id(client), tags=tags).info.run_id)
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in params.items()])
    return run_id


def end_run(run_id: str, status: str = "FINISHED") -> None:
    """Close a run as FINISHED, FAILED or KILLED; one that was closed so keeps its time."""
    client = connect()
    if client.get_run(run_id).info.status != status:
        client.set_terminated(run_id, status)


def log_artifacts(run_id: str, *files: Path, under: str | None = None) -> None:
    """Keep files or folders with a run."""
    client = connect()
    for file in files:
        if file.is_dir():
            client.log_artifacts(run_id, str(file), f"{under}/{file.name}" if under else file.name)
        else:
            client.log_artifact(run_id, str(file), under)


def log_metrics(run_id: str, metrics: dict[str, float], step: int = 0, model_id: str | None = None) -> None:
    """Record numbers of a finished step, also with the logged model (of a registered version) that they are of."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    rows = [Metric(key, float(value), now, step, model_id=model_id) for key, value in metrics.items()]
    connect().log_batch(run_id, metrics=rows)


def flat_parameters(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as `patches.p`-like keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_parameters(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def line_metrics(line: ProgressLine) -> dict[str, float]:
    """The numbers of a progress line, nested ones as `loss_by_patch_size/16`."""
    flat: dict[str, float] = {}
    for key, value in line.model_dump(exclude_unset=True).items():
        if key in ("step", "time_unix_s"):
            continue
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": float(number) for inner, number in value.items()}
        elif isinstance(value, (int, float)):
            flat[key] = float(value)
    return flat


class JsonLinesTail:
    """Reads what is new in a JSON-lines file; one that was replaced is read from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._offset = 0, 0  # which file (inode) was read, and how far

    def new_lines(self) -> list[ProgressLine]:
        """Whole lines since the last call; what follows the last newline is still being written."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != self._file:
                    self._file, self._offset = os.fstat(file.fileno()).st_ino, 0
                file.seek(self._offset)
                content = file.read()
        except OSError:  # not there yet, or not readable just now: the next call looks again
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [ProgressLine.parse(line, self.path) for line in whole.splitlines()]


class MlflowForwarder:
    """Follows a run's `progress.jsonl` while the block runs: shows each line, and sends it to MLflow.

    The file is the truth. A store that does not answer costs nothing but time: lines wait and are sent
    again, and a line whose step is already in MLflow is never sent twice. find_run: the id of the run that
    they go to; asked when there is a line to send, and again where it raises. begins: ask for it without a
    line too, so that a run is seen in MLflow from its beginning, but not at once: the client takes seconds to
    import, which the first steps need not wait for.
    """

    def __init__(
        self, folder: Path, find_run: Callable[[], str], show: Callable[[ProgressLine], None], begins: bool = False
    ) -> None:
        self.folder, self.find_run, self.show, self.begins = folder, find_run, show, begins
        self._begin_at = time.monotonic() + BEGIN_AFTER_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._tail = JsonLinesTail(folder / PROGRESS_FILE)
        self._waiting: list[ProgressLine] = []  # read and not yet in MLflow
        self._run_id = ""  # until a store has said what it has of the run
        self._sent_step = -1
        self._retry_at, self._problem = 0.0, ""

    def __enter__(self) -> "MlflowForwarder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._retry_at = self._begin_at = 0.0
        self._look()
        if self._waiting:
            count, place = len(self._waiting), self.folder / PROGRESS_FILE
            say(
                f"  MLflow at {tracking_uri()} did not take all ({self._problem}): {count} lines wait in {place}, "
                "and --resume sends them"
            )

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            self._look()

    def _look(self) -> None:
        for line in self._tail.new_lines():
            self.show(line)
            self._waiting.append(line)
        begins = self.begins and not self._run_id and time.monotonic() >= self._begin_at
        if (self._waiting or begins) and time.monotonic() >= self._retry_at:
            try:
                self._find()
                while self._waiting:
                    self._send(self._waiting[0])
                    self._waiting.pop(0)
            except Exception as error:  # whatever a store's client raises, training goes on
                if self.begins and not self._problem:  # it did answer, or seemed to
                    say(f"  MLflow at {tracking_uri()} takes nothing ({_short(error)}): lines wait, training goes on")
                self._problem = f"{type(error).__name__}: {_short(error)}"
                self._retry_at = time.monotonic() + RETRY_S

    def _find(self) -> None:
        """Find the run and what a store has of it, once."""
        if not self._run_id:
            client, run_id = connect(), self.find_run()
            history = client.get_metric_history(run_id, "images_seen")
            self._run_id, self._sent_step = run_id, max((point.step for point in history), default=-1)

    def _send(self, line: ProgressLine) -> None:
        from mlflow.entities import Metric

        client = connect()
        if line.step <= self._sent_step:
            return
        if line.preview is not None:
            self._send_picture(client, line.preview, line.step)
        stamp = int(line.time_unix_s * 1000)
        metrics = [Metric(key, value, stamp, line.step) for key, value in line_metrics(line).items()]
        client.log_batch(self._run_id, metrics=metrics)
        self._sent_step = line.step

    def _send_picture(self, client: Any, preview: str, step: int) -> None:
        """A preview, where it did not arrive before the store went away with its line."""
        from PIL import Image

        name = re.compile(rf"/preview[+%]step[+%]{step}[+%].*webp$")  # the small copy, which MLflow writes last
        if any(name.search(item.path) for item in client.list_artifacts(self._run_id, "images")):
            return
        with Image.open(self.folder / preview) as picture:
            client.log_image(self._run_id, picture.convert("RGB"), key="preview", step=step)


def is_reachable() -> bool:
    """Whether the tracking store answers; raises UserError for one that cannot be opened at all."""
    if _is_database_of_mlflow(tracking_uri()):
        return True
    from requests import RequestException

    try:
        experiment_id(connect())
    except Exception as error:
        if isinstance(error.__context__, RequestException):  # of a server that is away, perhaps for a while
            return False
        problem = _short(error)
        raise UserError(f"MLflow at {tracking_uri()} cannot be opened ({problem}): check MLFLOW_TRACKING_URI") from None
    return True


def _is_database_of_mlflow(uri: str) -> bool:
    """Whether this is an sqlite file that MLflow has made its tables in; the client itself takes seconds to import."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.is_file() or not os.access(path, os.W_OK):
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
        return bool(database.execute("SELECT count(*) FROM experiments, alembic_version").fetchone()[0])
    return False


def _short(error: Exception) -> str:
    problem = str(error).strip().split("\n")[0]
    return problem if len(problem) <= 120 else f"{problem[:117]}..."


def require_reachable() -> None:
    """Raise UserError where the tracking store does not answer."""
    if not is_reachable():
        raise UserError(f"MLflow at {tracking_uri()} does not answer: start it, or check MLFLOW_TRACKING_URI")


def log_dataset(run_id: str, address: str, fingerprint: str) -> None:
    """Tie a prepared dataset to a run, by its place and fingerprint."""
    from mlflow.entities import Dataset, DatasetInput

    source = json.dumps({"uri": address if "://" in address else Path(address).as_uri()})
    name = address.rstrip("/").rsplit("/", 1)[-1]
    entity = Dataset(name=name, digest=fingerprint[:32], source_type="local", source=source)
    connect().log_inputs(run_id, [DatasetInput(entity, [])])


def run_exists(run_id: str) -> bool:
    """Whether this store knows a run; raises MlflowException while the store is away."""
    from mlflow.exceptions import MlflowException

    try:
        connect().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True
