"""Registering: the model of a run, or a model folder, becomes a version of a registered model."""

import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import read_card, verified_card
from patchloom.models.manifest import MANIFEST_FILE, write_manifest
from patchloom.pipelines.registry.pyfunc import input_example, signature
from patchloom.pipelines.registry.version_card import write_card
from patchloom.pipelines.registry.wheel import wheel_bytes, wheel_name
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.inside import check_links
from patchloom.platform.files.storage import file_sha256, make_folder
from patchloom.platform.progress import say
from patchloom.platform.records.reference import REFERENCE_FILE
from patchloom.platform.records.run import PROGRESS_FILE, RunCard, last_progress
from patchloom.platform.tracking.aliases import move_alias
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.names import check_alias, check_name
from patchloom.platform.tracking.references import stored_model
from patchloom.platform.tracking.registry import MODEL_FOLDER, logged_model, register_pyfunc
from patchloom.platform.tracking.runs import (
    begin_run,
    end_run,
    failed_on_error,
    log_artifacts,
    log_dataset,
    log_metrics,
    run_exists,
)
from patchloom.platform.tracking.store import shown_uri
from patchloom.platform.tracking.versions import list_versions
from patchloom.redaction import HIDDEN, redacted

ENTRY = Path(__file__).parent / "pyfunc_entry.py"


@dataclass(frozen=True)
class VersionTags:
    """The facts about a version that MLflow stores as its tags; None is not stored."""

    kind: str
    resolution: int
    p: float | None
    schedule: str | None
    images_seen: int | None
    updates: int | None
    weights_sha256: str
    code_version: str
    files_sha256: str | None = None  # of the file with the checksums of all others
    dataset_fingerprint: str | None = None
    recipe_sha256: str | None = None
    held_out_loss: str | None = None
    address: str | None = None  # of the model, if the version refers to it and has no copy
    preview: str | None = None  # `version_card.PREVIEW`
    condition: str | None = None

    def as_tags(self) -> dict[str, str]:
        """The tags, as text."""
        return {key: str(value) for key, value in asdict(self).items() if value is not None}


def register(run: str, name: str, alias: str | None = None, *, by_reference: bool = False) -> str:
    """Register the model of a finished run as a new version.

    The second call with the same weights returns the version that exists.

    Args:
        run: the folder of a finished run, or a model folder.
        name: the registered model; it is created if it does not exist.
        alias: point this alias at the version, such as "champion" or "candidate".
        by_reference: record the address and the sha256 of every file of a model in an object store, instead of
            uploading a copy. The files must stay there.

    Returns:
        The reference of the version, `models:/NAME/VERSION`.

    Raises:
        UserError: the folder has no finished model, MLflow does not accept the name or the alias, or
            the MLflow store does not answer or does not have the run.
        CheckpointError: the weights of a model folder do not match their checksum.

    Example:
        reference = patchloom.register("run", "my-model", alias="champion")
        assert reference == "models:/my-model/1"
    """
    check_name(name)
    if alias is not None:
        check_alias(alias)
    if by_reference and not is_remote(run):
        raise UserError(
            f"{run} cannot be registered by reference: give an address of an object store, such as s3://..."
        )
    require_reachable()
    if by_reference and HIDDEN in redacted(run):  # other keys are left out, which the address does without
        raise UserError(
            f"{redacted(run)} cannot be registered by reference, because versions have no keys: set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY instead"
        )
    folder, there = local_copy(run, without_tensors), Folder.at(run)
    if (folder / "model.json").is_file():
        version = _register_folder(folder, name, there.address if by_reference else None)
    else:
        version = _register_run(folder, name, there.folder("model").address if by_reference else None)
    if alias:
        move_alias(name, alias, version, "register")
    say(f"  registered models:/{name}/{version}" + (f" as {alias}" if alias else ""), is_result=True)
    return f"models:/{name}/{version}"


def _register_run(folder: Path, name: str, address: str | None) -> str:
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is not a run: give the --out folder of `patchloom train`, or a model folder")
    if not (folder / "model" / "model.json").is_file():
        raise UserError(f"{folder} is not finished and has no model: run `patchloom train ... --resume` first")
    run_card = RunCard.read(folder)
    run_id = run_card.run_id
    if run_id is None:
        raise UserError(f"{folder} is not in MLflow yet: run `patchloom train ... --resume`, which sends it")
    _check_recorded(folder, name, run_card)
    card = verified_card(folder / "model")
    version = _find_version(name, card.weights_sha256, run_id)
    if version is None:
        previews = sorted((folder / "previews").glob("*.png"))[-1:]
        for picture in previews:
            check_links(folder, picture, folder)
        log_artifacts(run_id, *previews, folder / PROGRESS_FILE)
        preview = previews[0].name if previews else None
        version = _create_version(
            folder / "model", name, run_id, _tags_of_run(folder, card, run_card, preview), address
        )
        _link_training(folder, name, version, run_card)
    return version


def _link_training(folder: Path, name: str, version: str, run: RunCard) -> None:
    """Show the last losses of a run and its dataset also with the logged model of a version."""
    model_id, last, run_id = logged_model(name, version), last_progress(folder), str(run.run_id)
    losses = {key: value for key in ("loss", "held_out_loss") if (value := last.get(key)) is not None}
    if model_id and losses:
        dataset = log_dataset(run_id, run.dataset or "", run.dataset_fingerprint)
        # the time of the line, so that MLflow knows that the run has these values
        log_metrics(run_id, losses, last.step, model_id=model_id, dataset=dataset, time_unix_s=last.time_unix_s)


def _check_recorded(folder: Path, name: str, card: RunCard) -> None:
    """Raise UserError unless this MLflow store has the run of a run folder."""
    if not run_exists(str(card.run_id)):
        elsewhere = f" (it was recorded in {card.tracking_uri})" if card.tracking_uri else ""
        raise UserError(
            f"{shown_uri()} does not have the MLflow run {card.run_id} of {folder}{elsewhere}: set MLFLOW_TRACKING_URI "
            "to the store that has it, run `patchloom train ... --resume` to record it here, or register the model "
            f"without its run: `patchloom models register {folder}/model {name}`"
        )


def _register_folder(folder: Path, name: str, address: str | None) -> str:
    """Register a model without a training run (imported, averaged or exported), with an MLflow run of its own."""
    card = verified_card(folder)
    version = _find_version(name, card.weights_sha256)
    if version is None:
        tags = {"patchloom.version": __version__, "patchloom.folder": str(folder)}
        parameters = {
            key: value for key, value in card.to_json().items() if key in ("denoiser", "imported_from", "average")
        }
        run_id = begin_run(
            card.name, "import", parameters, tags, description=f"A model that was registered from `{folder}`."
        )
        with failed_on_error(run_id):
            version = _create_version(folder, name, run_id, _tags_of_model(card), address)
        end_run(run_id)
    return version


def _create_version(model: Path, name: str, run_id: str, tags: VersionTags, address: str | None) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(scratch) / wheel_name()
        wheel.write_bytes(wheel_bytes())
        uploaded = model
        if address:
            uploaded = make_folder(Path(scratch) / MODEL_FOLDER)
            (uploaded / REFERENCE_FILE).write_text(stored_model(address, model).to_json())
        elif not (model / MANIFEST_FILE).is_file():  # an earlier version wrote it
            uploaded = Path(scratch) / MODEL_FOLDER
            shutil.copytree(model, uploaded)
            write_manifest(uploaded)
        files = file_sha256(uploaded / (REFERENCE_FILE if address else MANIFEST_FILE))
        example = input_example(read_card(model))
        version = register_pyfunc(uploaded, name, run_id, ENTRY, wheel, signature(), example)
    write_card(name, version, replace(tags, address=address, files_sha256=files).as_tags())
    return version


def _find_version(name: str, weights_sha256: str, run_id: str | None = None) -> str | None:
    """The newest version with these weights, of this run or of any run; None if not found."""
    where = [f"tags.weights_sha256 = '{weights_sha256}'", *([f"run_id = '{run_id}'"] if run_id else [])]
    return next((found.version for found in list_versions(name, where=where, limit=1)), None)


def _tags_of_model(card: ModelCard) -> VersionTags:
    """What a model card says about its model; the card of an import says less."""
    return VersionTags(
        kind=card.normalisation.kind,
        resolution=card.denoiser.resolution,
        p=card.patches.p if card.patches else None,
        schedule=card.patches.schedule if card.patches else None,
        images_seen=card.images_seen,
        updates=card.updates,
        weights_sha256=card.weights_sha256,
        code_version=card.code_version,
        condition=card.condition.summary if card.condition else None,
    )


def _tags_of_run(folder: Path, card: ModelCard, run: RunCard, preview: str | None) -> VersionTags:
    loss = last_progress(folder).held_out_loss
    return replace(
        _tags_of_model(card),
        dataset_fingerprint=run.dataset_fingerprint,
        recipe_sha256=file_sha256(folder / "recipe.yaml"),
        held_out_loss=None if loss is None else f"{loss:.4f}",
        preview=preview,
    )
