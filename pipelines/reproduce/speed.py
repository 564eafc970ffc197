"""Training speed: patches and full images after equal time, and for equal counted images.

The paper says that training on patches is at least twice as fast at an equal or better quality. So the settings are
trained for a quarter, half and all of a time, each with ramps and averages of its own length, and patches after half of
the time are compared with full images after all of it.
"""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from patchloom.pipelines.evaluate.page import METRICS_FILE
from patchloom.pipelines.pages.html import Picture
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.reproduce.outcome import SHOWN_SAMPLES, Outcome
from patchloom.pipelines.reproduce.samplers import data_of
from patchloom.pipelines.reproduce.speed_outcome import outcome_of
from patchloom.pipelines.reproduce.stages import (
    ReproductionFolder,
    Stage,
    data_stages,
    samples_flops,
    search_stage,
)
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.planning import recipe_of_setting
from patchloom.pipelines.tune.ranking import setting_title
from patchloom.pipelines.tune.trials import trial_name
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe.search import BUDGET_SHARE, FinalEvaluation, Search, load_search
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.run import read_progress, training_seconds
from patchloom.platform.records.search import TrialRow, read_trials
from patchloom.platform.records.speed import HeldOutPoint, MeasuredSamples, SpeedResults, SpeedTrial

SPEED_DATA = "celeba"
BY_TIME, BY_IMAGES = "time", "images"  # folders of the two searches
SAMPLING_FILE = "sampling.json"
SMALL_END_SAMPLES, FULL_END_SAMPLES = 5_000, 50_000


def searches_of(small: bool) -> dict[str, str]:
    """The searches by the names of their folders."""
    end = "_cpu" if small else ""
    return {BY_TIME: f"speed_search{end}", BY_IMAGES: f"speed_images_search{end}"}


def speed_stages(place: ReproductionFolder) -> list[Stage]:
    """Prepare data, search by time and by counted images, measure all trials, and the longest with more samples."""
    name, small = data_of(place, SPEED_DATA), place.asked.small
    dataset = place.dataset(name, latents=False)
    stages = list(data_stages(place, name, small, latents=False))
    for folder, search in searches_of(small).items():
        stages.append(search_stage(place, name, search, dataset, folder=folder))
    for folder, search in searches_of(small).items():
        definition, _ = load_search(search)
        for number in range(len(definition.settings()) * definition.repeats):
            samples = f"{folder}/search/trials/{trial_name(number)}/samples"
            stages.append(_measuring(place, f"trial {trial_name(number)} by {folder}", samples, dataset))
    for trial in trials_of_whole_time(small):
        stages += _ends(place, trial, dataset)
    return stages


def trials_of_whole_time(small: bool) -> list[str]:
    """The names of the trials that spend the whole time: all seeds of a setting come before the next setting."""
    definition, _ = load_search(searches_of(small)[BY_TIME])
    return [
        trial_name(number * definition.repeats + repeat)
        for number, setting in enumerate(definition.settings())
        if setting[BUDGET_SHARE] == 1
        for repeat in range(definition.repeats)
    ]


def _measuring(place: ReproductionFolder, title: str, samples: str, dataset: str) -> Stage:
    options = ("--reference", dataset, "--features", place.asked.features, *place.with_workers)
    return Stage(f"Measure {title}", ("evaluate", place.path(samples), *options), needs=f"{samples}/{SAMPLING_FILE}")


def _ends(place: ReproductionFolder, trial: str, dataset: str) -> list[Stage]:
    """Sample more images from a trial of the whole time, and measure them."""
    small = place.asked.small
    count = SMALL_END_SAMPLES if small else FULL_END_SAMPLES
    definition, base = load_search(searches_of(small)[BY_TIME])
    steps = _steps(definition)
    run, out = f"{BY_TIME}/search/trials/{trial}", f"samples/{trial}"
    words = ("sample", place.path(run), place.path(out), "--seeds", f"0-{count - 1}", "--steps", str(steps))
    flops = samples_flops(recipe_of_setting(definition, base, {}), count, steps)
    title = f"{count:,} samples of trial {trial}"
    return [
        Stage(f"Make {title}", words, flops, needs=f"{run}/model/model.json"),
        _measuring(place, title, out, dataset),
    ]


def _steps(definition: Search) -> int:
    """The steps with which a search samples."""
    return (definition.final or FinalEvaluation()).steps


def speed_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    """Quality after equal time and for equal counted images, and whether patches are twice as fast."""
    results = _results(place, here)
    results.write(Folder.at(here))
    details = [
        ("The search by time", search_section(here / BY_TIME / "search")),
        ("The search by counted images", search_section(here / BY_IMAGES / "search")),
    ]
    return outcome_of(results, _samples(place, here), details)


def _results(place: ReproductionFolder, here: Path) -> SpeedResults:
    """What the commands have measured."""
    asked, name = place.asked, data_of(place, SPEED_DATA)
    definition, base = load_search(searches_of(asked.small)[BY_TIME])
    dataset = open_dataset(place.dataset(name, latents=False))
    held_out = len(dataset.split("held_out", base.data.held_out_fraction))
    recipe = recipe_of_setting(definition, base, {})
    card, rows = dataset.card, [read_trials(Folder.at(here / by / "search")) for by in (BY_TIME, BY_IMAGES)]
    return SpeedResults(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        code_version=asked.code_version,
        code_commit=asked.code_commit,
        machine=asked.machine,
        small=asked.small,
        recipe=f"{definition.recipe.removesuffix('.yaml')}, width {recipe.model.width}",
        data=f"{Path(place.source(name)).name}: {card.rows:,} images of {card.resolution} x {card.resolution} pixels",
        held_out_images=min(held_out, recipe.train.held_out_images),
        sampler=f"heun, {_steps(definition)} steps",
        by_time=_trials(here, BY_TIME),
        by_images=_trials(here, BY_IMAGES),
        failed=sum(row.status != "finished" for row in itertools.chain(*rows)),
    )


def _trials(here: Path, search: str) -> list[SpeedTrial]:
    folder = here / search / "search"
    finished = [trial for trial in read_trials(Folder.at(folder)) if trial.status == "finished"]
    return [gathered(folder / "trials" / trial.name, trial, here / "samples" / trial.name) for trial in finished]


def gathered(run: Path, row: TrialRow, more_samples: Path) -> SpeedTrial:
    """A finished trial with the metrics of its samples; `more_samples` are those of trials of the whole time."""
    lines = read_progress(run)
    seconds = training_seconds(lines)
    points = [
        HeldOutPoint(seconds=at, images=line.images_seen, loss=line.held_out_loss)
        for at, line in zip(seconds, lines, strict=True)
        if line.held_out_loss is not None
    ]
    is_whole = BUDGET_SHARE in row.settings and (more_samples / METRICS_FILE).is_file()
    return SpeedTrial(
        name=row.name,
        setting=_title_without_share(row.settings),
        share=float(str(row.settings.get(BUDGET_SHARE, 1))),
        repeat=row.repeat,
        images=row.images_seen,
        flops=row.flops or 0,
        seconds=seconds[-1],
        trial_seconds=row.seconds or 0,
        held_out_loss=points[-1].loss,
        held_out=points,
        samples=_measured(run / "samples"),
        end=_measured(more_samples) if is_whole else None,
    )


def _measured(samples: Path) -> MeasuredSamples:
    result = EvaluationResult.read(samples / METRICS_FILE)
    metrics = {name: float(value) for name, value in result.metrics.items() if isinstance(value, int | float)}
    return MeasuredSamples(count=result.identity.n_samples, features=result.identity.features, metrics=metrics)


def _samples(place: ReproductionFolder, here: Path) -> Picture:
    """The same seeds of the first training of each setting that had the whole time, one row each."""
    definition, _ = load_search(searches_of(place.asked.small)[BY_TIME])
    trials, repeats = trials_of_whole_time(place.asked.small), definition.repeats
    settings = [setting for setting in definition.settings() if setting[BUDGET_SHARE] == 1]
    rows, titles = [], []
    for number, setting in enumerate(settings):
        of_setting = [place.folder.folder(f"samples/{name}") for name in trials[number * repeats :][:repeats]]
        first = next((folder for folder in of_setting if folder.has(SAMPLING_FILE)), None)
        if first is not None:
            rows.append(read_samples(first, list(read_entries(first))[:SHOWN_SAMPLES]))
            titles.append(_title_without_share(setting))
    path = here / "speed.png"
    save_png(side_by_side(rows, scale=max(1, 64 // rows[0].shape[2])), path)
    return Picture(path, f"The same seeds in each row, after the whole time: {'; '.join(titles)}.", pixelated=True)


def _title_without_share(setting: Mapping[str, JsonValue]) -> str:
    return setting_title({key: value for key, value in setting.items() if key != BUDGET_SHARE})
