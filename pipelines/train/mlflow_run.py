"""The MLflow run that mirrors a run folder."""

from pathlib import Path

from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.records.run import RUN_FILE, RunCard
from patchloom.platform.tracking.origin import command_line
from patchloom.platform.tracking.runs import (
    begin_run,
    end_run,
    failed_on_error,
    log_artifacts,
    log_dataset,
    recorded_value,
    reopen_run,
    run_exists,
    tag_run,
)
from patchloom.platform.tracking.store import check_answers, shown_uri


def ensure_mlflow_run(folder: Path, address: Folder, parent_run: str | None = None, run_name: str | None = None) -> str:
    """Find the MLflow run of a run folder, or create it.

    A run that started without MLflow, or with another tracking store, gets a new MLflow run.

    Args:
        folder: the run folder on this machine.
        address: the run folder itself, which may be remote.
        parent_run: id of the MLflow run of a search, if the run is a trial.
        run_name: the name on MLflow's pages; by default that of the recipe with its p and schedule.

    Returns:
        The id of the MLflow run.

    Raises:
        Exception: whatever MLflow's client raises while the tracking store does not answer.
    """
    card = RunCard.read(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    if card.run_id is not None and run_exists(card.run_id):
        reopen_run(card.run_id, is_made_longer=_records_new_length(card.run_id, recipe, folder))
        return card.run_id
    tags = {
        "patchloom.dataset": card.dataset_fingerprint,
        "patchloom.version": card.code_version,
        "patchloom.folder": str(address),
    }
    name = run_name or setting_name(recipe)
    description = _description(recipe, card)
    run_id = begin_run(name, "train", recipe.model_dump(mode="json"), tags, parent_run, description)
    with failed_on_error(run_id):
        log_artifacts(run_id, folder / "recipe.yaml")
        log_dataset(run_id, card.dataset or "", card.dataset_fingerprint)
    card.model_copy(update={"run_id": run_id, "tracking_uri": shown_uri()}).write(folder)
    if address.is_remote:
        address.put(folder / RUN_FILE, RUN_FILE)
    return run_id


def setting_name(recipe: Recipe) -> str:
    """`demo-latents p=0.25 progressive`: a recipe with the setting of its patches."""
    patches = recipe.patches
    return f"{recipe.name} p={patches.p:g}" + (f" {patches.schedule}" if patches.p < 1 else "")


def _description(recipe: Recipe, card: RunCard) -> str:
    """What a run trains, as Markdown."""
    patches, network = recipe.patches, recipe.model.backbone or recipe.model.network
    sizes = " and ".join(f"{size.fraction:g}" for size in patches.sizes)
    steps = "All steps are on full-size images."
    if patches.p < 1:
        steps = (
            f"{patches.p:.0%} of the steps are on full-size images, the others on patches of {sizes} of their side "
            f"({patches.schedule} schedule)."
        )
    lines = [
        f"Trains the network `{network}` of the recipe `{recipe.name}` on {recipe.train.images:,} counted images "
        "(crops and full images).",
        "",
        f"- {steps}",
        f"- Dataset: `{card.dataset}` (fingerprint `{card.dataset_fingerprint[:12]}`)",
        f"- Seed: {recipe.seed}",
    ]
    command = command_line()
    return "\n".join([*lines, f"- Command: `{command}`"] if command else lines)


def _records_new_length(run_id: str, recipe: Recipe, folder: Path) -> bool:
    """Record a longer recipe in the run: as its artifact and as a tag, because MLflow keeps parameters as they are."""
    if recorded_value(run_id, "train.images") == str(recipe.train.images):
        return False
    log_artifacts(run_id, folder / "recipe.yaml")
    tag_run(run_id, {"train.images": str(recipe.train.images)})
    return True


def end_tracking(folder: Path, status: str) -> None:
    """End the MLflow run of a run folder as FINISHED, FAILED or KILLED. Errors of MLflow are only reported."""
    run_id = RunCard.read(folder).run_id
    if run_id is None:
        return  # the forwarder has reported it
    try:
        check_answers()  # the client itself would wait for a minute
        end_run(run_id, status)
    except Exception as error:
        say(f"  MLflow did not record the end of run {run_id} ({type(error).__name__}); the run folder is complete")
