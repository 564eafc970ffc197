"""Initial weights: those of another model that a run starts from, copied into the run folder."""

from collections.abc import Callable
from pathlib import Path

from patchloom.errors import UserError
from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import load_edm_snapshot, load_model
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.transfer import transfer
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.storage import local_path
from patchloom.platform.progress import say
from patchloom.platform.tracking.registry import fetch_model

INITIAL_WEIGHTS = "beginning"  # the folder's name on disk
SNAPSHOT_FILE = "snapshot.pkl"
WEIGHT_FILES = ("model.safetensors", "model.json")  # the card last


def checked_initial_weights(run: Folder, reference: str, network: DenoiserConfig) -> Callable[[], None]:
    """Check the weights of a recipe's `init_from`, and return what copies them into the run folder.

    All nodes find them there, and a run that is resumed does not depend on a moved alias.

    Args:
        run: the run folder. If it has the weights, there is nothing to do.
        reference: a model reference or the path of an EDM snapshot.
        network: the network to train.

    Raises:
        UserError: the weights do not fit the network.
    """
    if any(run.has(f"{INITIAL_WEIGHTS}/{name}") for name in (SNAPSHOT_FILE, WEIGHT_FILES[-1])):
        return lambda: None
    is_reference = is_remote(reference) or reference.startswith(("models:/", "runs:/"))
    is_file = not is_reference and local_path(reference).is_file()
    path = local_path(reference) if is_file else fetch_model(reference).folder
    try:
        untransferred = transfer(build_denoiser(network), load_edm_snapshot(path) if is_file else load_model(path))
    except ValueError as error:
        raise UserError(f"train.init_from {reference}: {error}") from None

    def copy() -> None:
        if is_file:
            run.put(path, f"{INITIAL_WEIGHTS}/{SNAPSHOT_FILE}")
        else:
            for name in WEIGHT_FILES:
                run.put(path / name, f"{INITIAL_WEIGHTS}/{name}")
        new = f"; new weights for: {', '.join(untransferred)}" if untransferred else ""
        say(f"  starting with the weights of {reference}{new}")

    return copy


def load_initial_weights(run: Path) -> Denoiser:
    """The denoiser whose weights a run starts with."""
    snapshot = run / INITIAL_WEIGHTS / SNAPSHOT_FILE
    return load_edm_snapshot(snapshot) if snapshot.is_file() else load_model(run / INITIAL_WEIGHTS)
