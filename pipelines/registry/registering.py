"""Register: a run's model, or one from elsewhere, becomes a version of a registered name, with its lineage."""

import tempfile
from pathlib import Path
from typing import Any

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.checkpoints import read_card, verified_card
from patchloom.pipelines.registry.pyfunc import input_example, signature
from patchloom.pipelines.registry.version_card import PREVIEW, write_card
from patchloom.pipelines.registry.wheel import wheel_bytes, wheel_name
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.progress import say
from patchloom.platform.records.run import PROGRESS_FILE, RunCard, read_progress
from patchloom.platform.tracking.registry import list_versions, promote, register_pyfunc
from patchloom.platform.tracking.runs import (
    begin_run,
    end_run,
    flat_parameters,
    log_artifacts,
    require_reachable,
)

ENTRY = Path(__file__).parent / "pyfunc_entry.py"


def register(run: str, name: str, alias: str | None = None) -> str:
    """Register the model of a finished run folder, or a model folder; returns `models:/NAME/VERSION`.

    A second call with the same weights finds the version that is there. alias: point it at the version
    (`champion`, `candidate`). Raises UserError for a folder without a model.
    """
    folder = local_copy(run, without_tensors)
    if (folder / "model.json").is_file():
        return _register_folder(folder, name, alias)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is no run: give the --out folder of `patchloom train`, or a model folder")
    if not (folder / "model" / "model.json").is_file():
        raise UserError(f"{folder} is not finished and has no model: run `patchloom train ... --resume` first")
    run_card = RunCard.read(folder)
    if run_card.run_id is None:
        raise UserError(f"{folder} was trained while MLflow was away: `patchloom train ... --resume` sends it first")
    card = read_card(folder / "model", "denoiser")
    version = _registered(name, card["weights_sha256"], run_card.run_id)
    if version is None:
        previews = sorted((folder / "previews").glob("*.png"))[-1:]
        log_artifacts(run_card.run_id, *previews, folder / PROGRESS_FILE)
        shown = {PREVIEW: previews[0].name} if previews else {}
        version = _log(folder / "model", name, run_card.run_id, _tags(folder, card, run_card) | shown)
    return _named(name, version, alias)


def _register_folder(folder: Path, name: str, alias: str | None) -> str:
    """A model without a run of its own (imported, averaged, exported) gets one that says so."""
    card = verified_card(folder)
    version = _registered(name, card["weights_sha256"])
    if version is None:
        require_reachable()
        tags = {"patchloom.version": __version__, "patchloom.folder": str(folder)}
        parameters = flat_parameters(
            {key: card[key] for key in ("denoiser", "imported_from", "average") if key in card}
        )
        run_id = begin_run(card["name"], "import", parameters, tags)
        version = _log(folder, name, run_id, _model_tags(card))
        end_run(run_id)
    return _named(name, version, alias)


def _log(model: Path, name: str, run_id: str, tags: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(scratch) / wheel_name()
        wheel.write_bytes(wheel_bytes())
        example = input_example(read_card(model, "denoiser")["class_names"])
        version = register_pyfunc(model, name, run_id, ENTRY, wheel, signature(), example)
    write_card(name, version, tags)
    return version


def _named(name: str, version: str, alias: str | None) -> str:
    if alias:
        promote(name, version, alias)
    say(f"  registered models:/{name}/{version}" + (f" as {alias}" if alias else ""))
    return f"models:/{name}/{version}"


def _registered(name: str, weights_sha256: str, run_id: str | None = None) -> str | None:
    """The version with these weights, of this run or of any."""
    for row in list_versions():
        same_run = run_id in (None, row["run_id"])
        if row["name"] == name and same_run and row["tags"].get("weights_sha256") == weights_sha256:
            return str(row["version"])
    return None


def _model_tags(card: dict[str, Any]) -> dict[str, Any]:
    """What a model's card says of itself; a model from elsewhere says less."""
    patches = card.get("patches", {})
    tags = {
        "kind": card["space"]["kind"],
        "resolution": card["denoiser"]["resolution"],
        "p": patches.get("p"),
        "schedule": patches.get("schedule"),
        "images_seen": card.get("images_seen"),
        "updates": card.get("updates"),
        "weights_sha256": card["weights_sha256"],
        "code_version": card["code_version"],
    }
    return {key: value for key, value in tags.items() if value is not None}


def _tags(folder: Path, card: dict[str, Any], run: RunCard) -> dict[str, Any]:
    last = read_progress(folder)[-1]
    tags = _model_tags(card) | {
        "dataset_fingerprint": run.dataset_fingerprint,
        "recipe_sha256": file_sha256(folder / "recipe.yaml"),
    }
    if last.held_out_loss is not None:
        tags["held_out_loss"] = f"{last.held_out_loss:.4f}"
    return tags
