"""Beginning: the weights of another model that a run starts from, kept in the run's own folder."""

from pathlib import Path

from patchloom.errors import UserError
from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import load_edm_snapshot, load_model
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.transfer import transfer
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import local_path
from patchloom.platform.progress import say
from patchloom.platform.tracking.registry import fetch_model

BEGINNING = "beginning"
SNAPSHOT = "snapshot.pkl"
MODEL_FILES = ("model.safetensors", "model.json")  # the card last


def keep_beginning(run: Folder, reference: str, network: DenoiserConfig) -> None:
    """Copy the weights that a recipe's `init_from` names into the run's folder, once it is known that they fit.

    There every node finds them, and an alias that moves on does not change a run that goes on. network: see
    `build_denoiser`. Raises UserError where the weights do not fit it.
    """
    if any(run.has(f"{BEGINNING}/{name}") for name in (SNAPSHOT, MODEL_FILES[-1])):
        return
    is_file = not reference.startswith(("models:/", "runs:/")) and local_path(reference).is_file()
    path = local_path(reference) if is_file else fetch_model(reference).folder
    try:
        left = transfer(build_denoiser(network), load_edm_snapshot(path) if is_file else load_model(path))
    except ValueError as error:
        raise UserError(f"train.init_from {reference}: {error}") from None
    if is_file:
        run.put(path, f"{BEGINNING}/{SNAPSHOT}")
    else:
        for name in MODEL_FILES:
            run.put(path / name, f"{BEGINNING}/{name}")
    fresh = f"; left fresh: {', '.join(left)}" if left else ""
    say(f"  beginning with the weights of {reference}{fresh}")


def load_beginning(run: Path) -> Denoiser:
    """The denoiser that a run's folder on this node keeps to begin with."""
    snapshot = run / BEGINNING / SNAPSHOT
    return load_edm_snapshot(snapshot) if snapshot.is_file() else load_model(run / BEGINNING)
