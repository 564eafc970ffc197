"""Registry: models as versions of a registered name in MLflow, fetched as folders and never unpickled."""

import io
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import is_remote
from patchloom.platform.files.storage import write_atomic
from patchloom.platform.tracking.client import connect, tracking_uri

MODEL_FOLDER = "model"  # where a version keeps its model folder, below its artifacts


@dataclass(frozen=True)
class FetchedModel:
    """A model folder on this machine and where it came from."""

    folder: Path
    reference: str  # what a worker elsewhere can fetch again: models:/NAME/VERSION or the folder
    run_id: str | None = None
    name: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model, as MLflow stores it."""

    name: str
    version: str
    aliases: list[str]
    run_id: str | None
    created_unix_s: float
    description: str
    tags: dict[str, str]


def fetch_model(reference: str) -> FetchedModel:
    """Fetch `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/path` or a folder to this machine."""
    if reference.startswith("models:/"):
        return _fetch_version(reference)
    if reference.startswith("runs:/"):
        folder = _download(reference)
        return FetchedModel(_model_folder(folder), reference, run_id=reference.split("/")[1])
    folder = local_copy(reference, lambda name: not name.startswith(("checkpoints/", "ema/")))
    if (folder / "model" / "model.json").is_file():  # a run folder holds its model folder
        folder = folder / "model"
    if not (folder / "model.json").is_file():
        raise UserError(
            f"{reference} is no model: give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model or a model folder"
        )
    return FetchedModel(folder, reference if is_remote(reference) else str(folder))


def _fetch_version(reference: str) -> FetchedModel:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if not match:
        raise UserError(f"{reference} is not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    version = find_version(name, alias=alias, version=number)
    folder = _download(f"models:/{name}/{version.version}")
    return FetchedModel(
        _model_folder(folder), f"models:/{name}/{version.version}", version.run_id, name, str(version.version)
    )


def find_version(name: str, alias: str | None = None, version: str | None = None) -> Any:
    """The registered version behind an alias or number; raises UserError where there is none."""
    from mlflow.exceptions import MlflowException

    client = connect()
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version)
    except MlflowException:
        wanted = f"{name}@{alias}" if alias else f"{name}/{version}"
        raise UserError(
            f"models:/{wanted} is not in the registry at {tracking_uri()}: `patchloom models list` shows what is"
        ) from None


def _download(uri: str) -> Path:
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        problem = str(error).strip().split("\n")[0]
        raise UserError(f"{uri} cannot be fetched from {tracking_uri()} ({problem})") from None


def _model_folder(folder: Path) -> Path:
    # MLflow keeps an artifact by the name that its folder had
    for candidate in (folder, folder / MODEL_FOLDER, *sorted((folder / "artifacts").glob("*/"))):
        if (candidate / "model.json").is_file():
            return candidate
    raise UserError(f"{folder} holds no model.json: it was not registered by patchloom")


def register_pyfunc(
    folder: Path, name: str, run_id: str, entry: Path, wheel: Path, signature: Any, input_example: Any
) -> str:
    """Register a model folder as a version that MLflow's own users can load; returns the version's number.

    entry: the one Python file of the version (models from code: nothing is pickled). wheel: the code that it
    imports, which lies in the version and is its one requirement beside MLflow.
    """
    import mlflow

    connect()
    chatter = io.StringIO()  # MLflow prints what it registered; so do we
    with redirect_stdout(chatter), redirect_stderr(chatter), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(entry),
            artifacts={MODEL_FOLDER: str(folder), "wheel": str(wheel)},
            # MLflow installs a version's requirements with the version's folder as the working directory
            pip_requirements=[f"mlflow=={mlflow.__version__}", f"artifacts/{wheel.name}"],
            signature=signature,
            input_example=input_example,
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def register_folder(folder: Path, name: str, run_id: str) -> str:
    """Register a plain folder (an autoencoder) as a version; returns its number."""
    from mlflow.exceptions import MlflowException

    client = connect()
    client.log_artifacts(run_id, str(folder), MODEL_FOLDER)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
    return str(client.create_model_version(name, source, run_id).version)


def logged_model(name: str, version: str) -> str | None:
    """The id of the logged model behind a version, which MLflow shows its metrics by; a plain folder has none."""
    found = find_version(name, version=version)
    source = str(found.source)  # `model_id` is not filled in by every store
    return found.model_id or (source.removeprefix("models:/") if source.startswith("models:/m-") else None)


def describe_version(name: str, version: str, description: str, tags: dict[str, Any]) -> None:
    """Write a version's card: its description and tags."""
    connect().update_model_version(name, version, description)
    tag_version(name, version, tags)


def tag_version(name: str, version: str, tags: dict[str, Any]) -> None:
    """Add tags to a version."""
    client = connect()
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, str(value))


def promote(name: str, version: str, alias: str) -> None:
    """Point an alias at a version."""
    find_version(name, version=version)
    connect().set_registered_model_alias(name, alias, version)


def delete_version(name: str, version: str) -> None:
    """Take a version out of the registry, and the name with its last one; its run stays."""
    client = connect()
    client.delete_model_version(name, version)
    if not client.search_model_versions(f"name = '{name}'"):
        client.delete_registered_model(name)


def fetch_preview(fetched: FetchedModel, place: Path) -> Path | None:
    """Bring the preview grid that a version's run kept to a file; None where it kept none."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    if not fetched.run_id:
        return None
    try:
        found = [file.path for file in connect().list_artifacts(fetched.run_id) if file.path.endswith(".png")]
        if not found:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            picture = mlflow.artifacts.download_artifacts(
                run_id=fetched.run_id, artifact_path=sorted(found)[-1], dst_path=scratch
            )
            write_atomic(place, Path(picture).read_bytes())
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the preview of {fetched.reference} cannot be fetched ({str(error).splitlines()[0]})"
        ) from None
    return place


def list_versions(name: str | None = None) -> list[RegisteredVersion]:
    """Every version of every registered model, newest first for each name.

    Args:
        name: list only the versions of this model.

    Example:
        for version in patchloom.list_versions("my-model"):
            print(version.name, version.version, version.aliases, version.tags.get("quality"))
    """
    client = connect()
    found = []
    for model in _all_of(client.search_registered_models):
        if name not in (None, model.name):
            continue
        versions = _all_of(client.search_model_versions, f"name = '{model.name}'")
        for version in sorted(versions, key=lambda version: -int(version.version)):
            number = str(version.version)
            found.append(
                RegisteredVersion(
                    name=model.name,
                    version=number,
                    aliases=sorted(alias for alias, aliased in model.aliases.items() if str(aliased) == number),
                    run_id=version.run_id,
                    created_unix_s=version.creation_timestamp / 1000,
                    description=version.description or "",
                    tags=dict(version.tags),
                )
            )
    return found


def _all_of(search: Callable[..., Any], *query: str) -> Iterator[Any]:
    """Every answer of one of MLflow's searches, page by page."""
    token = None
    while True:
        page = search(*query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
