"""The MLflow client: which tracking store is used, whether it answers, and the experiment of all runs."""

import contextlib
import logging
import os
import sqlite3
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from patchloom.errors import UserError
from patchloom.platform.compute.session import quiet_environment
from patchloom.platform.files.storage import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "patchloom"
SQLITE = "sqlite:///"
CREATE_TABLES_WAIT_S = 300.0
_complete_stores: set[str] = set()  # stores that have all tables, as far as this process knows


def tracking_uri() -> str:
    """The address of the MLflow store, as an absolute address.

    MLFLOW_TRACKING_URI if it is set, else `sqlite:///mlflow.db` in the working directory.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def connect() -> "MlflowClient":
    """A client of the store at `tracking_uri()`, without log output. Creates the store if it does not exist."""
    quiet_environment()
    logging.getLogger("alembic").setLevel(logging.ERROR)
    import mlflow

    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with _exclusive_creation(uri):
        client = mlflow.MlflowClient()
    _complete_stores.add(uri)
    return client


def _exclusive_creation(uri: str) -> AbstractContextManager[None]:
    """A lock for an SQLite store that may not exist: two processes must not create its tables at the same time."""
    database = Path(uri.removeprefix(SQLITE))
    if uri in _complete_stores or not uri.startswith(SQLITE) or not os.access(database.parent, os.W_OK):
        return nullcontext()
    return locked(database.parent, f".{database.name}.lock", wait_s=CREATE_TABLES_WAIT_S)


def experiment_id(client: "MlflowClient") -> str:
    """The id of the experiment MLFLOW_EXPERIMENT_NAME, by default `patchloom`. Creates it if it does not exist.

    An SQLite store keeps its artifacts in the folder `mlruns` next to the database.
    """
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri, location = tracking_uri(), None
    if uri.startswith(SQLITE):
        location = (Path(uri.removeprefix(SQLITE)).parent / "mlruns" / name).as_uri()
    tags = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then show runs and curves first
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=tags))
    except MlflowException:  # another process created it first
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def is_reachable() -> bool:
    """Whether the tracking store answers. False for a server that does not answer now.

    Raises:
        UserError: the store cannot be opened at all.
    """
    if _is_mlflow_database(tracking_uri()):
        return True
    from requests import RequestException

    try:
        experiment_id(connect())
    except Exception as error:
        if isinstance(error.__context__, RequestException):
            return False
        problem = first_line(error)
        raise UserError(f"MLflow at {tracking_uri()} cannot be opened ({problem}): check MLFLOW_TRACKING_URI") from None
    return True


def require_reachable() -> None:
    """Raise UserError if the tracking store does not answer."""
    if not is_reachable():
        raise UserError(f"MLflow at {tracking_uri()} does not answer: start it, or check MLFLOW_TRACKING_URI")


def _is_mlflow_database(uri: str) -> bool:
    """Whether this is an SQLite file with MLflow's tables. Importing MLflow to find out would take seconds."""
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or not path.is_file() or not os.access(path, os.W_OK):
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
        return bool(database.execute("SELECT count(*) FROM experiments, alembic_version").fetchone()[0])
    return False


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 120 characters."""
    problem = str(error).strip().split("\n")[0]
    return problem if len(problem) <= 120 else f"{problem[:117]}..."
