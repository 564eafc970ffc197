"""Tracked: the MLflow run that mirrors a run folder, begun as soon as the store answers."""

from pathlib import Path

from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.records.run import RUN_FILE, RunCard
from patchloom.platform.tracking.runs import begin_run, end_run, flat_parameters, log_artifacts, log_dataset, run_exists


def tracked(folder: Path, there: Folder, parent_run: str | None = None) -> str:
    """The id of the MLflow run of a training run's folder, which holds all that a new one needs.

    A run that was begun without MLflow, or in another store, gets a run in this one. there: the folder's own
    address. Raises what the store's client raises while the store is away.
    """
    card = RunCard.read(folder)
    if card.run_id is not None and run_exists(card.run_id):
        return card.run_id
    recipe = load_recipe(folder / "recipe.yaml")
    tags = {
        "patchloom.dataset": card.dataset_fingerprint,
        "patchloom.version": card.code_version,
        "patchloom.folder": str(there),
    }
    parameters = flat_parameters(recipe.model_dump(mode="json"))
    run_id = begin_run(recipe.name, "train", parameters, tags, parent_run)
    log_artifacts(run_id, folder / "recipe.yaml")
    log_dataset(run_id, card.dataset or "", card.dataset_fingerprint)
    card.model_copy(update={"run_id": run_id}).write(folder)
    if there.is_remote:
        there.put(folder / RUN_FILE, RUN_FILE)
    return run_id


def end_tracking(folder: Path, status: str) -> None:
    """Close the run; a store that is away at the end of a run must not undo the run."""
    run_id = RunCard.read(folder).run_id
    if run_id is None:
        return  # the follower has said so
    try:
        end_run(run_id, status)
    except Exception as error:
        say(f"  MLflow did not take the end of run {run_id} ({type(error).__name__}); the run folder is complete")
