"""Tune: many short runs of one recipe on Ray Tune, at an equal budget, compared on the held-out loss."""

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from patchloom import __version__
from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.models.codec import identity_space
from patchloom.models.cost import measured_seconds_of_crop, step_cost
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import training_flops
from patchloom.models.generate import one_thread
from patchloom.pipelines.ranking import METRIC, ranked, setting_words
from patchloom.pipelines.run import method_of
from patchloom.pipelines.train import model_card, train
from patchloom.platform.cluster import quiet_environment, ray_session, session_cpus
from patchloom.platform.dataset import Dataset, open_dataset
from patchloom.platform.errors import UserError
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.recipe import Recipe, check_recipe, recipe_yaml, with_values
from patchloom.platform.search import Budget, Search, load_search
from patchloom.platform.storage import (
    local_path,
    locked,
    make_folder,
    read_json,
    write_atomic,
    write_json,
    write_json_lines,
)
from patchloom.platform.tracking import (
    PROGRESS_FILE,
    JsonLinesTail,
    begin_run,
    end_run,
    flat_parameters,
    log_artifacts,
    log_dataset,
    log_metrics,
    require_reachable,
    tracking_uri,
)

SEARCH_FORMAT = 1
SEARCH_FILE = "search.json"
TRIAL = "trial.json"  # in a trial's run folder: its row of the table, once it is finished


@dataclass(frozen=True)
class TuneResult:
    """A finished search: its trials, best first, and the recipe of the best at full length."""

    folder: Path
    run_id: str
    trials: list[dict[str, Any]]
    best: Recipe


@dataclass(frozen=True)
class Trial:
    """One run of a search: a setting, which repeat of it, and the recipe with the images that its budget buys."""

    settings: dict[str, Any]
    repeat: int
    recipe: Recipe


def plan_trials(search: Search, base: Recipe, dataset: Dataset, images: list[int] | None = None) -> list[Trial]:
    """Every trial in order; raises UserError, with its setting, where one does not fit.

    images: what an earlier call found that the budget of each setting buys (a budget in seconds is measured once).
    """
    planned = []
    for number, setting in enumerate(search.settings()):
        try:
            recipe = with_values(base, {**search.set, **setting})
            length = images[number] if images else _images_for(search.budget, recipe, dataset)
            fractions = {key: max(1, round(share * length)) for key, share in search.of_budget.items()}
            recipe = with_values(recipe, {"train.images": length, **fractions})
        except UserError as error:
            raise UserError(f"setting {number} ({setting_words(setting)}): {error}") from None
        for repeat in range(search.repeats):
            planned.append(Trial(setting, repeat, with_values(recipe, {"seed": recipe.seed + repeat})))
    return planned


def _images_for(budget: Budget, recipe: Recipe, dataset: Dataset) -> int:
    """The counted images that a budget buys a recipe, as the mean of what its steps cost."""
    denoiser = model_card(recipe, dataset)["denoiser"]
    method = method_of(recipe, denoiser["resolution"])
    per_update = method.batch_size * method.schedule.mean_multiplier
    if budget.images is not None:
        return budget.images
    if budget.updates is not None:
        return round(budget.updates * per_update)
    if budget.flops is not None:
        cost_of_crop = {size.pixels: float(training_flops(denoiser, size.pixels)) for size in method.schedule.sizes}
        return max(1, round(budget.flops / step_cost(method, cost_of_crop, 1)[0] * per_update))
    assert budget.seconds is not None  # the schema holds exactly one of them
    return max(1, round(budget.seconds / seconds_of_update(recipe, dataset) * per_update))


def seconds_of_update(recipe: Recipe, dataset: Dataset) -> float:
    """The mean time of a step of this recipe here, on one thread as a trial has it (or on the GPU), measured now."""
    denoiser = model_card(recipe, dataset)["denoiser"]
    method = method_of(recipe, denoiser["resolution"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_thread():
        network = build_denoiser(denoiser).to(device).train()
        cost_of_crop = measured_seconds_of_crop(network, method, identity_space(network.channels))
    return step_cost(method, cost_of_crop, 1)[0]


def tune(search: str, dataset: str, out: str, *, restore: bool = False, concurrent: int | None = None) -> TuneResult:
    """Run a search into the folder `out`: one run folder and one MLflow child run a trial.

    search: a YAML file or the name of a shipped one. concurrent: trials at once, all CPUs by default.
    restore: go on with an interrupted search; finished trials stay, others resume from their checkpoints.
    Raises UserError for a search that does not fit the dataset, or when every trial failed.
    """
    definition, base = load_search(search)
    rows = open_dataset(dataset)
    known = local_path(out) / SEARCH_FILE
    planned = plan_trials(definition, base, rows, read_json(known).get("images") if known.is_file() else None)
    if not len(rows.indices("held_out", base.data.held_out_fraction)):
        raise UserError("data.held_out_fraction holds no row out, so trials cannot be compared: raise it")
    folder = make_folder(local_path(out))
    with locked(folder):
        lengths = [trial.recipe.train.images for trial in planned if trial.repeat == 0]
        run_id = _open_folder(folder, definition, rows, restore, lengths)
        began = time.monotonic()
        total = sum(trial.recipe.train.images for trial in planned)
        with progress(f"searching {definition.name}", total, "images") as meter:
            trials = _run_trials(folder, planned, rows, run_id, concurrent, meter)
        order = ranked(trials)
        failed = [trial for trial in trials if trial["status"] != "finished"]
        for trial in failed:
            say(f"  trial {trial['trial']} ({setting_words(trial['settings'])}) failed: {trial['error']}")
        good = [trial for setting in order for trial in setting.trials]
        write_json_lines(folder / "trials.jsonl", good + failed)
        if not order:
            end_run(run_id, "FAILED")
            raise UserError(f"all {len(trials)} trials failed; the first: {failed[0]['error']}")
        best = with_values(base, order[0].settings)
        write_atomic(folder / "best.yaml", recipe_yaml(best))
        log_metrics(run_id, {METRIC: order[0].mean, "trials": len(trials), "seconds": time.monotonic() - began})
        log_artifacts(run_id, folder / "trials.jsonl", folder / "best.yaml")
        end_run(run_id)
    say(f"  best of {len(order)} settings: {order[0].words()}, {METRIC} {order[0].value()}")
    return TuneResult(folder, run_id, good + failed, best)


def _open_folder(folder: Path, search: Search, dataset: Dataset, restore: bool, images: list[int]) -> str:
    wanted = {"search": search.model_dump(mode="json"), "dataset_fingerprint": dataset.fingerprint}
    path = folder / SEARCH_FILE
    if path.is_file():
        if not restore:
            raise UserError(f"{folder} holds a search: give --restore to go on with it, or choose another folder")
        found = read_json(path)
        if {key: found.get(key) for key in wanted} != wanted:
            raise UserError(f"{folder} holds another search or dataset: give the same, or choose another folder")
        return str(found["run_id"])
    require_reachable()
    tags = {"patchloom.dataset": dataset.fingerprint, "patchloom.version": __version__, "patchloom.folder": str(folder)}
    run_id = begin_run(search.name, "search", flat_parameters(search.model_dump(mode="json")), tags)
    log_dataset(run_id, dataset.address, dataset.fingerprint)
    write_atomic(folder / "search.yaml", yaml.safe_dump(wanted["search"], sort_keys=False))
    card = {"format_version": SEARCH_FORMAT, "kind": "search", "run_id": run_id, "images": images, **wanted}
    write_json(path, card)
    return run_id


def _run_trials(
    folder: Path,
    planned: list[Trial],
    dataset: Dataset,
    run_id: str,
    concurrent: int | None,
    meter: Meter,
) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = [
        {
            "trial": number,
            "settings": trial.settings,
            "repeat": trial.repeat,
            "recipe": trial.recipe.model_dump(mode="json"),
            "dataset": dataset.address,
            "folder": str(folder / "trials" / f"{number:03d}"),
            "parent_run": run_id,
            "tracking_uri": tracking_uri(),
            "backbones": allowed_backbones(),
        }
        for number, trial in enumerate(planned)
    ]
    rows = [read_json(Path(job["folder"]) / TRIAL) for job in jobs if (Path(job["folder"]) / TRIAL).is_file()]
    finished = {row["trial"] for row in rows}
    meter.begin(sum(row["images_seen"] for row in rows))
    todo = [job for job in jobs if job["trial"] not in finished]
    if todo:
        with _watched([Path(job["folder"]) for job in todo], meter):
            rows += _run_on_ray_tune(folder, todo, concurrent)
        shutil.rmtree(folder / ".ray", ignore_errors=True)
    return sorted(rows, key=lambda row: int(row["trial"]))


def _run_on_ray_tune(folder: Path, jobs: list[dict[str, Any]], concurrent: int | None) -> list[dict[str, Any]]:
    from ray import tune as ray_tune

    with ray_session():
        import ray

        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(run_trial, {"cpu": 1, "gpu": gpus}),
            param_space={"job": ray_tune.grid_search(jobs)},
            tune_config=ray_tune.TuneConfig(max_concurrent_trials=min(concurrent or session_cpus(), len(jobs))),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=str(folder / ".ray"),
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=1),
            ),
        )
        results = tuner.fit()
    rows = []
    for result in results:
        job = result.config["job"]
        if result.error is None:
            rows.append(read_json(Path(job["folder"]) / TRIAL))
        else:
            reason = str(result.error).strip().split("\n")[-1]
            rows.append({**_name(job), "status": "failed", "error": reason})
    return rows


def run_trial(config: dict[str, Any]) -> None:
    """One trial in its own process: a run like any other, without Ray workers inside it."""
    import os

    from ray import tune as ray_tune

    quiet_environment()
    job = config["job"]
    os.environ["MLFLOW_TRACKING_URI"] = job["tracking_uri"]
    allow_backbones(*job["backbones"])
    began = time.monotonic()
    result = train(
        check_recipe(job["recipe"]),
        job["dataset"],
        job["folder"],
        workers=0,
        resume=True,
        parent_run=job["parent_run"],
        show=lambda _: None,
    )
    kept = ("updates", "images_seen", "full_size_images", "flops", METRIC, "held_out_loss_by_sigma", "loss")
    row = {**_name(job), "status": "finished"}
    row |= {key: result.last[key] for key in kept if key in result.last}
    row |= {"seconds": time.monotonic() - began, "run_id": result.run_id, "folder": str(result.folder)}
    write_json(result.folder / TRIAL, row)
    ray_tune.report({METRIC: row[METRIC]})


def _name(job: dict[str, Any]) -> dict[str, Any]:
    """Which trial a row is of."""
    return {key: job[key] for key in ("trial", "settings", "repeat")}


class _watched:
    """Feeds a meter from the progress files of many runs while the block runs."""

    def __init__(self, folders: list[Path], meter: Meter) -> None:
        self.meter = meter
        self.tails = [JsonLinesTail(folder / PROGRESS_FILE) for folder in folders]
        self.seen = [0] * len(folders)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._look()

    def _look(self) -> None:
        for number, tail in enumerate(self.tails):
            for line in tail.new_lines():
                self.seen[number] = line["images_seen"]
        if any(self.seen):
            begun = sum(1 for seen in self.seen if seen)
            self.meter.update(sum(self.seen), f"{begun} of {len(self.seen)} trials begun")
