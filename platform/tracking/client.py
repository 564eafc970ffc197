"""The MLflow client: connects to the tracking store, and finds the experiment of all runs."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from patchloom.errors import UserError
from patchloom.platform.compute.session import quiet_environment
from patchloom.platform.files.storage import locked
from patchloom.platform.tracking.server_errors import first_line, is_of_connection, problem_of_server
from patchloom.platform.tracking.store import (
    answers,
    artifact_folder,
    check_answers,
    check_experiment,
    database_path,
    experiment_name,
    is_complete_database,
    shown_uri,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

CREATE_TABLES_WAIT_S = 300.0
_complete_stores: set[str] = set()  # stores that have all tables, as far as this process knows


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
    database = database_path()
    if uri in _complete_stores or database is None or not os.access(database.parent, os.W_OK):
        return nullcontext()
    return locked(database.parent, f".{database.name}.lock", wait_s=CREATE_TABLES_WAIT_S)


@contextlib.contextmanager
def open_store() -> Iterator["MlflowClient"]:
    """A client of a store that answers.

    Raises:
        UserError: the store does not answer, also during the block, or cannot be opened.
    """
    check_answers()
    try:
        client = connect()
    except UserError:
        raise
    except Exception as error:
        raise _not_opened(error) from None
    try:
        yield client
    except Exception as error:
        problem = problem_of_server(error)
        if problem:
            raise UserError(problem) from None
        raise


def experiment_id(client: "MlflowClient") -> str:
    """The id of the experiment MLFLOW_EXPERIMENT_NAME, by default `patchloom`. Creates it if it does not exist.

    An SQLite store keeps its artifacts in the folder `mlruns` next to the database.

    Raises:
        UserError: the experiment is deleted, or its artifacts are in another folder because the store was moved.
    """
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_path()
        location = artifact_folder(database, name).as_uri() if database else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then show runs and curves first
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:  # another process created it first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    check_experiment(found.lifecycle_stage, str(found.experiment_id), found.artifact_location)
    return str(found.experiment_id)


def is_reachable() -> bool:
    """Whether the tracking store answers. False for a server that does not answer now.

    Raises:
        UserError: the store cannot be opened at all, or runs cannot be written to its experiment.
    """
    if is_complete_database():
        return True
    if not answers():
        return False
    try:
        experiment_id(connect())
    except UserError:
        raise
    except Exception as error:
        if is_of_connection(error):
            return False
        raise _not_opened(error) from None
    return True


def require_reachable() -> None:
    """Raise UserError if the tracking store does not answer, or if runs cannot be written to its experiment."""
    if not is_reachable():
        check_answers()
        raise UserError(f"MLflow at {shown_uri()} does not answer requests: start it, or check MLFLOW_TRACKING_URI")


def _not_opened(error: Exception) -> UserError:
    found = f"MLflow at {shown_uri()} cannot be opened ({first_line(error)}): check MLFLOW_TRACKING_URI"
    return UserError(problem_of_server(error) or found)
