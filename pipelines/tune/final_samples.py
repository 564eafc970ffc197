"""Final samples: the quality of the trials of a search by images that their models make."""

from contextlib import nullcontext

from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.evaluate.memorisation import memorised_shares
from patchloom.pipelines.registry.quality import TITLES
from patchloom.pipelines.sample.sampling import sample
from patchloom.pipelines.train.resuming import RECIPE_FILE
from patchloom.pipelines.train.shard_plan import training_rows
from patchloom.pipelines.tune.trials import TRIAL_FILE, trial_folder
from patchloom.platform.compute.session import ray_session
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say, without_results
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.recipe.search import FinalEvaluation
from patchloom.platform.records.search import TrialRow
from patchloom.platform.tracking.runs import log_metrics


def measure_samples(folder: Folder, trials: list[TrialRow], final: FinalEvaluation, dataset: Dataset) -> list[TrialRow]:
    """Sample the model of every finished trial, and measure the distance of its samples and how many are memorised.

    What an earlier call has measured is kept. Returns the rows with their `final_distance` and memorised shares.
    """
    wanted = [trial for trial in trials if trial.status == "finished" and trial.final_distance is None]
    with ray_session() if wanted else nullcontext():  # of all trials: a session takes seconds to start
        return [
            _with_measured_samples(trial_folder(folder, trial), trial, final, dataset) if trial in wanted else trial
            for trial in trials
        ]


def _with_measured_samples(run: Folder, trial: TrialRow, final: FinalEvaluation, dataset: Dataset) -> TrialRow:
    say(f"  trial {trial.name}: {final.samples} samples for the final evaluation")
    samples = run.folder("samples").address
    metric, name = ("fid", "fid") if final.features == "inception" else ("fd", "frechet_distance")
    with without_results():
        sample(run.address, samples, f"0-{final.samples - 1}", steps=final.steps)
        measured = evaluate(samples, dataset.address, metrics=(metric,), features=final.features)
        distance = measured.metrics[name]
        assert isinstance(distance, float)
        found = {"final_distance": distance, **_memorised(run, samples, final, dataset)}
    say(f"  trial {trial.name}: {TITLES[name][0]} {distance:.4g}")
    row = trial.model_copy(update=found)
    run.write_json(TRIAL_FILE, row.to_dict())
    if row.run_id is not None:
        log_metrics(row.run_id, found)
    return row


def _memorised(run: Folder, samples: str, final: FinalEvaluation, dataset: Dataset) -> dict[str, float]:
    """The memorised shares of a `TrialRow`, compared with the images that the trial was trained on."""
    recipe = load_recipe(local_copy(run.address, lambda name: name == RECIPE_FILE) / RECIPE_FILE)
    held_out = dataset.split("held_out", recipe.data.held_out_fraction)
    shares = memorised_shares(samples, dataset.address, training_rows(dataset, recipe), held_out, final.features)
    if shares is None:
        return {}
    by_chance = {} if shares.held_out is None else {"memorised_by_chance": shares.held_out}
    return {"memorised_share": shares.samples, **by_chance}
