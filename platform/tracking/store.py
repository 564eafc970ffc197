"""The MLflow store: its address, the file of an SQLite store, and whether it answers."""

import contextlib
import importlib
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from patchloom.errors import UserError
from patchloom.platform.compute.answering import accepts, answers_http
from patchloom.platform.files.storage import locked
from patchloom.redaction import redacted

EXPERIMENT = "patchloom"
SQLITE = "sqlite:///"
ARTIFACTS = "mlruns"  # the folder of artifacts, next to the database
# by the scheme of an artifact location: the module that MLflow imports for it, and the extra that installs it
ARTIFACT_PACKAGES = {
    "s3": ("boto3", "s3"),
    "gs": ("google.cloud.storage", "gcs"),
    "wasbs": ("azure.storage.blob", "azure"),
}
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# columns that hold addresses of artifacts, by table
ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
WAIT_FOR_DATABASE_S = 60.0


def tracking_uri() -> str:
    """The address of the MLflow store, as an absolute address.

    MLFLOW_TRACKING_URI if it is set, else `mlflow.db` in the working directory.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return _absolute(uri) if uri else sqlite_uri(Path("mlflow.db").absolute())


def registry_uri() -> str:
    """The address of the store of registered models, as an absolute address.

    MLFLOW_REGISTRY_URI if it is set, else the address of the runs.
    """
    uri = os.environ.get("MLFLOW_REGISTRY_URI")
    return _absolute(uri) if uri else tracking_uri()


def store_environment() -> dict[str, str]:
    """The environment variables with which another process finds the same stores."""
    return {"MLFLOW_TRACKING_URI": tracking_uri(), "MLFLOW_REGISTRY_URI": registry_uri()}


def use_stores(stores: Mapping[str, str]) -> None:
    """Use the stores of another process, by what `store_environment` gave there, possibly without passwords.

    A password that this process has for the same address is kept.
    """
    own = {redacted(uri): uri for uri in (tracking_uri(), registry_uri())}
    os.environ.update({name: own.get(address, address) for name, address in stores.items()})


def _absolute(uri: str) -> str:
    if uri.startswith(SQLITE) and not uri.startswith((SQLITE + "/", SQLITE + "file:")):
        name, mark, options = uri.removeprefix(SQLITE).partition("?")
        return sqlite_uri(Path(unquote(name)).absolute()) + mark + options
    return uri


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite file, with the characters quoted that have a meaning in an address."""
    return SQLITE + quote(str(path), safe="/ :@!$&'()*+,;=~")


def shown_uri() -> str:
    """The address of the store for messages and files, without a password."""
    return redacted(tracking_uri())


def shown_registry_uri() -> str:
    """The address of the store of registered models for messages, without a password."""
    return redacted(registry_uri())


def database_path() -> Path | None:
    """The file of an SQLite store; None for other stores."""
    return sqlite_path(tracking_uri())


def sqlite_path(uri: str) -> Path | None:
    """The file at the address of an SQLite store; None for other stores."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE + "/") else None


def experiment_name() -> str:
    """MLFLOW_EXPERIMENT_NAME, by default `patchloom`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def artifact_folder(database: Path, experiment: str) -> Path:
    """Where an experiment of an SQLite store keeps its artifacts. A name is never more than one folder."""
    return database.parent / ARTIFACTS / re.sub(r"^\.+|[^\w. -]", "_", experiment)


def answers(uri: str | None = None) -> bool:
    """Whether a store answers now, by default the one of the runs. A file always does.

    The store is asked with a short timeout and without MLflow's client.
    """
    parts = urlsplit(uri or tracking_uri())
    if parts.scheme in ("http", "https"):
        return answers_http(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health")
    port = DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    return port is None or not parts.hostname or accepts(parts.hostname, parts.port or port)


def check_answers() -> None:
    """Raise UserError if the store of the runs does not answer now."""
    if not answers():
        raise UserError(f"MLflow at {shown_uri()} does not answer: start it, or check MLFLOW_TRACKING_URI")


def check_registry_answers() -> None:
    """Raise UserError if the store of registered models does not answer now."""
    if not answers(registry_uri()):
        variable = "MLFLOW_REGISTRY_URI" if registry_uri() != tracking_uri() else "MLFLOW_TRACKING_URI"
        raise UserError(f"MLflow at {shown_registry_uri()} does not answer: start it, or check {variable}")


def check_experiment(lifecycle_stage: str, identity: str, location: str) -> None:
    """Raise UserError if runs cannot be written to an experiment: it is deleted, or its artifacts are elsewhere.

    Args:
        lifecycle_stage: of the experiment: "active" or "deleted".
        identity: its id.
        location: the address of its artifacts.
    """
    name = experiment_name()
    if lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {name} in MLflow at {shown_uri()} is deleted: restore it (MLFLOW_TRACKING_URI="
            f"'{shown_uri()}' mlflow experiments restore --experiment-id {identity}), or set MLFLOW_EXPERIMENT_NAME"
        )
    old = _moved_from(location)
    if old is not None:
        raise UserError(
            f"{database_path()} was copied or moved: it keeps artifacts in {old}, not in the folder {ARTIFACTS} next "
            "to it: run `patchloom models relocate`, which corrects the addresses"
        )
    _check_artifact_package(location)


def _check_artifact_package(location: str) -> None:
    """Raise UserError if MLflow lacks the package that writes artifacts to such an address."""
    module, extra = ARTIFACT_PACKAGES.get(location.partition("://")[0], ("", ""))
    try:
        if module:
            importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"MLflow at {shown_uri()} keeps artifacts at "
            f"{redacted(location)}, and the package {module} "
            f"is not installed: run `pip install 'patchloom[{extra}]'`"
        ) from None


def open_database(path: Path) -> contextlib.closing[sqlite3.Connection]:
    """An SQLite file, closed after the block."""
    return contextlib.closing(sqlite3.connect(path, timeout=WAIT_FOR_DATABASE_S))


def is_complete_database() -> bool:
    """Whether the store is an SQLite file with MLflow's tables. Importing MLflow to find out would take seconds.

    Raises:
        UserError: runs cannot be written to its experiment.
    """
    path = database_path()
    if path is None or not path.is_file() or not os.access(path, os.W_OK):
        return False
    with contextlib.suppress(sqlite3.Error), open_database(path) as database:
        if not database.execute("SELECT count(*) FROM experiments, alembic_version").fetchone()[0]:
            return False
        columns = "SELECT lifecycle_stage, experiment_id, artifact_location FROM experiments WHERE name = ?"
        for stage, identity, location in database.execute(columns, (experiment_name(),)):
            check_experiment(stage, str(identity), str(location))
        return True
    return False


def relocate() -> str:
    """Point the addresses of artifacts in a copied or moved `mlflow.db` at the folder `mlruns` next to it.

    Returns:
        What was done, in words.

    Raises:
        UserError: the store is not an SQLite file of MLflow.
    """
    path = database_path()
    if path is None or not path.is_file():
        raise UserError(f"{shown_uri()} is not an SQLite file that exists: only such a store can be moved as files")
    with locked(path.parent, f".{path.name}.lock"):
        try:
            with open_database(path) as database, database:
                counts = dict(_corrected(database))
        except sqlite3.Error as error:
            raise UserError(f"{path} is not a database of MLflow ({error}): check MLFLOW_TRACKING_URI") from None
    if not counts:
        return f"{path}: every address is right already"
    return "\n".join(f"{path}: {count} addresses changed from {old}" for old, count in counts.items())


def _corrected(database: sqlite3.Connection) -> Iterator[tuple[Path, int]]:
    """Correct the addresses; yields each old folder and the number of its addresses."""
    path = database_path()
    assert path is not None
    new = (path.parent / ARTIFACTS).as_uri()
    locations = [row[0] for row in database.execute("SELECT artifact_location FROM experiments")]
    for old in {_moved_from(str(location)) for location in locations} - {None}:
        assert old is not None
        prefix, count = old.as_uri(), 0
        for table, columns in ADDRESSES.items():
            known = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            for column in known.intersection(columns):
                count += database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(prefix) + 1, len(prefix) + 1, f"{prefix}/"),
                ).rowcount
        yield old, count


def _moved_from(location: str) -> Path | None:
    """The folder `mlruns` of an artifact location if it is next to another database; None if it is right.

    Only locations as `artifact_folder` makes them are judged; others were chosen by the user.
    """
    database = database_path()
    if database is None or not location.startswith("file:///"):
        return None
    folder = Path(unquote(location.removeprefix("file://")))
    if folder.parent.name != ARTIFACTS or folder.name.isdigit():  # MLflow's own folders have numbers
        return None
    home = folder.parent.parent
    return folder.parent if home != database.parent and home.resolve() != database.parent.resolve() else None
