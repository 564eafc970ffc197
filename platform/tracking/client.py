"""The MLflow client: connects to the tracking store, and finds the experiment of all runs."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
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
    check_registry_answers,
    database_path,
    experiment_name,
    is_complete_database,
    registry_uri,
    shown_uri,
    sqlite_path,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

CREATE_TABLES_WAIT_S = 300.0
_complete_stores: set[str] = set()  # stores that have all tables, as far as this process knows


def connect() -> "MlflowClient":
    """A client of the stores of runs and of registered models, without log output. Creates what does not exist."""
    quiet_environment()
    logging.getLogger("alembic").setLevel(logging.ERROR)
    import mlflow

    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    uris = tracking_uri(), registry_uri()
    mlflow.set_tracking_uri(uris[0])
    # MLflow sets MLFLOW_REGISTRY_URI for an address, which would outlast a later change of the other one
    mlflow.set_registry_uri(uris[1] if uris[1] != uris[0] else "")
    with contextlib.ExitStack() as locks:
        for uri in dict.fromkeys(uris):
            locks.enter_context(_exclusive_creation(uri))
        client = mlflow.MlflowClient()
    _complete_stores.update(uris)
    return client


def _exclusive_creation(uri: str) -> AbstractContextManager[None]:
    """A lock for an SQLite store that may not exist: two processes must not create its tables at the same time."""
    database = sqlite_path(uri)
    if uri in _complete_stores or database is None or not os.access(database.parent, os.W_OK):
        return nullcontext()
    return locked(database.parent, f".{database.name}.lock", wait_s=CREATE_TABLES_WAIT_S)


def open_store() -> AbstractContextManager["MlflowClient"]:
    """A client of a store of runs that answers.

    Raises:
        UserError: the store does not answer, also during the block, or cannot be opened.
    """
    return _opened(check_answers, tracking_uri())


def open_registry() -> AbstractContextManager["MlflowClient"]:
    """A client of a store of registered models that answers.

    Raises:
        UserError: the store does not answer, also during the block, or cannot be opened.
    """
    return _opened(check_registry_answers, registry_uri())


@contextlib.contextmanager
def _opened(check: Callable[[], None], uri: str) -> Iterator["MlflowClient"]:
    check()
    try:
        client = connect()
    except UserError:
        raise
    except Exception as error:
        raise _not_opened(error) from None
    try:
        yield client
    except Exception as error:
        problem = problem_of_server(error, uri)
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
    """Raise UserError if one of the stores does not answer, or if runs cannot be written to the experiment."""
    check_registry_answers()
    if not is_reachable():
        check_answers()
        raise UserError(f"MLflow at {shown_uri()} does not answer requests: start it, or check MLFLOW_TRACKING_URI")


def _not_opened(error: Exception) -> UserError:
    found = f"MLflow at {shown_uri()} cannot be opened ({first_line(error)}): check MLFLOW_TRACKING_URI"
    return UserError(problem_of_server(error) or found)
