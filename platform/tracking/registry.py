"""The registry: models as versions of a registered name in MLflow, fetched as folders without unpickling."""

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from patchloom.errors import UserError, did_you_mean
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.outputs import check_new_file
from patchloom.platform.files.storage import file_sha256, read_json, write_atomic
from patchloom.platform.records.reference import FILES_FILE, FILES_TAG, REFERENCE_FILE, StoredModel
from patchloom.platform.tracking.client import connect, open_registry, open_store
from patchloom.platform.tracking.references import fetch_stored, kept_copy
from patchloom.platform.tracking.server_errors import first_line
from patchloom.platform.tracking.store import shown_registry_uri
from patchloom.platform.tracking.versions import RegisteredVersion, list_versions, registered_version
from patchloom.redaction import redacted

MODEL_FOLDER = "model"  # the model folder among the artifacts of a version
OTHER_FOLDERS = {  # what a folder without a model is, by the card in it, and what to do
    "dataset.json": "a prepared dataset: train a model on it with `patchloom train`",
    "sampling.json": "a folder of samples: give the model that made them, or measure them with `patchloom evaluate`",
    "search.json": "a search: give one of its runs in the folder trials",
    "run.json": "a run that is not finished: run `patchloom train --resume` first",
}
_of_runs: dict[str, tempfile.TemporaryDirectory[str]] = {}
SIMILAR_NAMES = 1000  # registered models among which a similar name is searched
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for a missing version and alias


@dataclass(frozen=True)
class FetchedModel:
    """A model folder on this machine and where it came from. `run_id`, `name` and `version` are of MLflow."""

    folder: Path
    reference: str  # fetches the same model on another node: models:/NAME/VERSION, or the folder
    run_id: str | None = None
    name: str | None = None
    version: str | None = None


def fetch_model(reference: str) -> FetchedModel:
    """Fetch a model to this machine.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/path`, a model folder or a run folder.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    if reference.startswith("models:/"):
        return _fetch_version(reference)
    if reference.startswith("runs:/"):
        folder = _fetched_of_run(reference)
        return FetchedModel(_model_folder(folder), reference, run_id=reference.split("/")[1])
    folder = local_copy(reference, lambda name: not name.startswith(("checkpoints/", "ema/")))
    if (folder / "model" / "model.json").is_file():  # the model folder of a run folder
        folder = folder / "model"
    if (folder / REFERENCE_FILE).is_file():  # what MLflow's pyfunc gives for a version by reference
        folder = fetch_stored(StoredModel.from_file(folder / REFERENCE_FILE))
    if not (folder / "model.json").is_file():
        for card, advice in OTHER_FOLDERS.items():
            if (folder / card).is_file():
                raise UserError(f"{reference} is not a model but {advice}")
        raise UserError(
            f"{reference} is not a model: give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model or a folder"
        )
    return FetchedModel(folder, reference if is_remote(reference) else str(folder))


def _fetch_version(reference: str) -> FetchedModel:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if not match:
        raise UserError(f"{reference} does not have the form models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    version = find_version(name, alias=alias, version=number)
    numbered = f"models:/{name}/{version.version}"
    folder = _model_folder(_fetched_version(numbered, version), numbered, version.tags)
    return FetchedModel(folder, numbered, version.run_id, name, str(version.version))


def resolved_reference(reference: str) -> str:
    """A reference with the number of the version instead of an alias; others unchanged."""
    name, at, alias = reference.removeprefix("models:/").partition("@")
    if not reference.startswith("models:/") or not at:
        return reference
    return f"models:/{name}/{find_version(name, alias=alias).version}"


def find_version(name: str, alias: str | None = None, version: str | None = None) -> Any:
    """The registered version with an alias or a number; raises UserError if it does not exist."""
    from mlflow.exceptions import MlflowException

    wanted = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    with open_registry() as client:
        try:
            if alias:
                return client.get_model_version_by_alias(name, alias)
            return client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code in MISSING:
                where = f"the registry at {shown_registry_uri()}{_similar(client, name, alias)}"
                raise UserError(f"{wanted} is not in {where}: list its models with `patchloom models list`") from None
            raise


def _similar(client: Any, name: str, alias: str | None) -> str:
    """A hint at a name or an alias that exists and that a user may have meant; empty if there is none."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        models = {model.name: model.aliases for model in client.search_registered_models(max_results=SIMILAR_NAMES)}
        if name not in models:
            return did_you_mean(name, models)
        return did_you_mean(alias, models[name]) if alias else ""
    return ""


def has_version(name: str, version: str) -> bool:
    """Whether a version exists."""
    return bool(list_versions(name, where=[f"version = {version}"], limit=1))


def described_version(name: str, version: str) -> RegisteredVersion:
    """A version with its aliases and tags; raises UserError if it does not exist."""
    found = find_version(name, version=version)
    return registered_version(found, connect().get_registered_model(name).aliases)


def _fetched_version(numbered: str, version: Any) -> Path:
    """The artifacts of a version: its folder in a local store, else a copy that all processes of this node share."""
    with _fetching(numbered) as client:
        if _is_local(client.get_model_version_download_uri(version.name, version.version)):
            return _download(numbered)
        size_bytes = sum(_file_sizes(numbered))
        created = f"{version.creation_timestamp} {version.tags.get(FILES_TAG)}"  # a deleted name begins again with 1
        return kept_copy(f"{shown_registry_uri()} {numbered} {created}", size_bytes, partial(_download, numbered))


def _fetched_of_run(reference: str) -> Path:
    """Artifacts of a run: their folder in a local store, else a copy that is removed when this process ends."""
    with _fetching(reference) as client:
        if _is_local(client.get_run(reference.split("/")[1]).info.artifact_uri):
            return _download(reference)
        if reference not in _of_runs:  # they may change, so other processes fetch them again
            folder = tempfile.TemporaryDirectory(prefix="patchloom-")
            _download(reference, Path(folder.name))
            _of_runs[reference] = folder
        return Path(_of_runs[reference].name)


@contextlib.contextmanager
def _fetching(uri: str) -> Iterator[Any]:
    """A client of the store of a reference; its errors become a UserError."""
    from mlflow.exceptions import MlflowException

    with open_registry() if uri.startswith("models:") else open_store() as client:
        try:
            yield client
        except (MlflowException, OSError) as error:
            raise UserError(f"{uri} cannot be fetched from {shown_registry_uri()} ({first_line(error)})") from None


def _is_local(address: str) -> bool:
    return urlsplit(address).scheme in ("", "file")


def _file_sizes(address: str) -> Iterator[int]:
    """The sizes of all files below an address of MLflow, in bytes."""
    import mlflow.artifacts

    for item in mlflow.artifacts.list_artifacts(artifact_uri=address):
        if item.is_dir:
            yield from _file_sizes(f"{address}/{PurePosixPath(item.path).name}")
        else:
            yield item.file_size or 0


def _download(uri: str, to: Path | None = None) -> Path:
    """Fetch artifacts into a folder; without one, a local store gives its own folder."""
    import mlflow.artifacts

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=None if to is None else str(to)))


def _model_folder(folder: Path, version: str | None = None, tags: Mapping[str, str] | None = None) -> Path:
    """The model folder among downloaded artifacts.

    Args:
        folder: the artifacts.
        version: the reference of the registered version that they belong to.
        tags: of the version, with which the files are compared.
    """
    # MLflow names an artifact after its folder
    for candidate in (folder, folder / MODEL_FOLDER, *sorted((folder / "artifacts").glob("*/"))):
        if (candidate / "model.json").is_file():
            _check_tags(candidate, FILES_FILE, version, tags or {})
            return candidate
        if (candidate / REFERENCE_FILE).is_file():
            _check_tags(candidate, REFERENCE_FILE, version, tags or {})
            return fetch_stored(StoredModel.from_file(candidate / REFERENCE_FILE))
    raise UserError(f"{folder} has no model.json: the version was not registered by patchloom")


def _check_tags(folder: Path, listing: str, version: str | None, tags: Mapping[str, str]) -> None:
    """Raise UserError if the files of a version are not those that its tags name.

    Args:
        folder: the fetched files.
        listing: the file in it that has the checksums of all others, which are compared when they are read.
        version: the reference of the version.
        tags: its tags. Versions of earlier releases have the checksum of the weights only.
    """
    advice = "restore the files in the artifact store, or register the model again"
    if wanted := tags.get(FILES_TAG):
        found = file_sha256(folder / listing) if (folder / listing).is_file() else ""
        if found != wanted:
            problem = f"has sha256 {found[:12]}" if found else "is missing"
            raise UserError(
                f"{version}: {listing} {problem}, and the version was registered with {wanted[:12]}: {advice}"
            )
    elif (wanted := tags.get("weights_sha256")) and listing == FILES_FILE:
        card = read_json(folder / "model.json")
        if not isinstance(card, dict) or card.get("weights_sha256") != wanted:
            raise UserError(
                f"{version}: model.json names other weights than those that the version was registered with "
                f"({wanted[:12]}): {advice}"
            )


def register_pyfunc(
    folder: Path, name: str, run_id: str, entry: Path, wheel: Path, signature: Any, input_example: Any
) -> str:
    """Register a model folder as a version that MLflow itself can load.

    Args:
        folder: the model folder.
        name: the registered name.
        run_id: the run that the version belongs to.
        entry: the Python file of the version (MLflow's models from code, without pickle).
        wheel: Patchloom's wheel, which is stored in the version and is its only requirement next to MLflow.
        signature: MLflow's signature of the model.
        input_example: MLflow's example input.

    Returns:
        The number of the version.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    client = connect()
    run, output = client.get_run(run_id), io.StringIO()  # MLflow prints what it registered, and so does Patchloom
    with redirect_stdout(output), redirect_stderr(output):
        # mlflow.pyfunc.log_model needs an active run, and would change its status and the time of its end
        logged = client.create_logged_model(
            run.info.experiment_id, name=MODEL_FOLDER, source_run_id=run_id, params=dict(run.data.params)
        )
        info = Model.log(
            artifact_path=None,
            model_id=logged.model_id,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(entry),
            artifacts={MODEL_FOLDER: folder.as_uri(), "wheel": wheel.as_uri()},  # MLflow would unquote plain paths
            # MLflow installs the requirements with the folder of the version as the working directory
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
    """The id of the logged model of a version, with which MLflow shows its metrics; None for a plain folder."""
    found = find_version(name, version=version)
    source = str(found.source)  # not every store fills in `model_id`
    return found.model_id or (source.removeprefix("models:/") if source.startswith("models:/m-") else None)


def describe_version(name: str, version: str, description: str, tags: Mapping[str, object]) -> None:
    """Set the description and tags of a version."""
    connect().update_model_version(name, version, redacted(description))
    tag_version(name, version, tags)


def tag_version(name: str, version: str, tags: Mapping[str, object]) -> None:
    """Add tags to a version."""
    client = connect()
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, redacted(str(value)))


def delete_version(name: str, version: str) -> None:
    """Delete a version, and the registered name with its last version. The run is kept."""
    client = connect()
    client.delete_model_version(name, version)
    if not list_versions(name, limit=1):
        client.delete_registered_model(name)


def fetch_preview(fetched: FetchedModel, place: Path) -> Path | None:
    """Write the preview grid of a version's run to a file. Returns None if the run has none."""
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
            content = Path(picture).read_bytes()
            folder = Folder(str(place.parent))
            check_new_file(folder, place.name, f"preview of {fetched.reference}", lambda there: there == content)
            write_atomic(place, content)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the preview of {fetched.reference} cannot be fetched ({str(error).splitlines()[0]})"
        ) from None
    return place
