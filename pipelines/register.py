"""Register: a finished run's model becomes a version of a registered name, with its lineage."""

from pathlib import Path
from typing import Any

from patchloom import __version__
from patchloom.models.checkpoints import read_card
from patchloom.pipelines.pyfunc import signature
from patchloom.platform.errors import UserError
from patchloom.platform.progress import say
from patchloom.platform.registry import describe_version, list_versions, promote, register_pyfunc
from patchloom.platform.storage import file_sha256, local_path, read_json, read_json_lines
from patchloom.platform.tracking import PROGRESS_FILE, log_artifacts

ENTRY = Path(__file__).parent / "pyfunc_entry.py"


def register(run: str, name: str, alias: str | None = None) -> str:
    """Register the model of a finished run folder; returns `models:/NAME/VERSION`.

    A second call with the same weights finds the version that is there. alias: point it at the version
    (`champion`, `candidate`). Raises UserError for a run without a model.
    """
    folder = local_path(run)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is no run: give the --out folder of `patchloom train`")
    if not (folder / "model" / "model.json").is_file():
        raise UserError(f"{folder} is not finished and has no model: run `patchloom train ... --resume` first")
    run_card, card = read_json(folder / "run.json"), read_card(folder / "model", "denoiser")
    version = _registered(name, card["weights_sha256"], run_card["run_id"])
    if version is None:
        requirements = [f"patchloom=={__version__}"]
        version = register_pyfunc(folder / "model", name, run_card["run_id"], ENTRY, requirements, signature())
        tags = _tags(folder, card, run_card)
        describe_version(name, version, _description(name, version, tags), tags)
        previews = sorted((folder / "previews").glob("*.png"))
        log_artifacts(run_card["run_id"], *previews[-1:], folder / PROGRESS_FILE)
    if alias:
        promote(name, version, alias)
    say(f"  registered models:/{name}/{version}" + (f" as {alias}" if alias else ""))
    return f"models:/{name}/{version}"


def _registered(name: str, weights_sha256: str, run_id: str) -> str | None:
    for row in list_versions():
        if row["name"] == name and row["run_id"] == run_id and row["tags"].get("weights_sha256") == weights_sha256:
            return str(row["version"])
    return None


def _tags(folder: Path, card: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    last = read_json_lines(folder / PROGRESS_FILE)[-1]
    tags = {
        "kind": card["space"]["kind"],
        "resolution": card["denoiser"]["resolution"],
        "p": card["patches"]["p"],
        "schedule": card["patches"]["schedule"],
        "images_seen": card["images_seen"],
        "updates": card["updates"],
        "dataset_fingerprint": run["dataset_fingerprint"],
        "recipe_sha256": file_sha256(folder / "recipe.yaml"),
        "weights_sha256": card["weights_sha256"],
        "code_version": run["code_version"],
    }
    if "held_out_loss" in last:
        tags["held_out_loss"] = f"{last['held_out_loss']:.4f}"
    return tags


def _description(name: str, version: str, tags: dict[str, Any]) -> str:
    lines = "\n".join(f"| {key} | {value} |" for key, value in tags.items())
    sample = f"patchloom sample models:/{name}/{version} samples --seeds 0-63"
    return f"Patch diffusion denoiser on {tags['kind']}.\n\n| | |\n|---|---|\n{lines}\n\nSample from it: `{sample}`"
