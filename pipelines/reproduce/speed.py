"""Training speed: patches and full images after equal time, and for equal counted images.

The paper says that training on patches is at least twice as fast at an equal or better quality. So the settings are
trained for a quarter, half and all of a time, each with ramps and averages of its own length, and patches after half of
the time are compared with full images after all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from markupsafe import Markup
from pydantic import JsonValue

from patchloom.pipelines.evaluate.page import METRICS_FILE
from patchloom.pipelines.pages.html import Number, Picture, Table, svg, tidy
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.registry.quality import TITLES
from patchloom.pipelines.reproduce.outcome import SHOWN_SAMPLES, Finding, Outcome
from patchloom.pipelines.reproduce.samplers import data_of
from patchloom.pipelines.reproduce.stages import (
    ReproductionFolder,
    Stage,
    data_stages,
    samples_flops,
    search_stage,
)
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.tune.decisions import ComparedSettings
from patchloom.pipelines.tune.frontier import METRIC_TITLES
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.planning import recipe_of_setting
from patchloom.pipelines.tune.ranking import HELD_OUT_LOSS, mean_of, setting_title
from patchloom.pipelines.tune.trials import trial_name
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import clock
from patchloom.platform.recipe.search import BUDGET_SHARE, load_search
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.search import TrialRow, read_trials

SPEED_DATA = "celeba"
BY_TIME, BY_IMAGES = "time", "images"  # folders of the two searches
P_KEY = "patches.p"
END_METRICS = ("fid", "frechet_distance", "kid", "precision", "recall")
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
            out = place.path(folder, "search", "trials", trial_name(number), "samples")
            stages.append(_measuring(place, f"trial {trial_name(number)} by {folder}", out, dataset))
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
    words = ("evaluate", samples, "--reference", dataset, "--features", place.asked.features)
    return Stage(f"Measure {title}", words)


def _ends(place: ReproductionFolder, trial: str, dataset: str) -> list[Stage]:
    """Sample more images from a trial of the whole time, and measure them."""
    small = place.asked.small
    count = SMALL_END_SAMPLES if small else FULL_END_SAMPLES
    definition, base = load_search(searches_of(small)[BY_TIME])
    steps = definition.final.steps if definition.final else 18
    model, out = place.path(BY_TIME, "search", "trials", trial), place.path("samples", trial)
    words = ("sample", model, out, "--seeds", f"0-{count - 1}", "--steps", str(steps))
    flops = samples_flops(recipe_of_setting(definition, base, {}), count, steps)
    title = f"{count:,} samples of trial {trial}"
    return [Stage(f"Make {title}", words, flops), _measuring(place, title, out, dataset)]


@dataclass(frozen=True)
class Cell:
    """The trials of one setting that had one share of the time.

    Args:
        title: the setting without its share of the time.
        share: of the time; 1 for the search by counted images.
        trials: one for each seed.
    """

    title: str
    share: float
    trials: Sequence[TrialRow]

    def by_seed(self, values: Mapping[str, float]) -> dict[int, float]:
        """The value of each seed, from those of all trials by name."""
        return {trial.repeat: values[trial.name] for trial in self.trials if trial.name in values}


def cells_of(trials: Sequence[TrialRow]) -> list[Cell]:
    """The finished trials by setting and share of the time, in the order of the search."""
    found: dict[tuple[str, float], list[TrialRow]] = {}
    for trial in sorted(trials, key=lambda trial: trial.name):
        if trial.status == "finished":
            settings: dict[str, JsonValue] = {
                key: value for key, value in trial.settings.items() if key != BUDGET_SHARE
            }
            share = float(str(trial.settings.get(BUDGET_SHARE, 1)))
            found.setdefault((setting_title(settings), share), []).append(trial)
    return [Cell(title, share, group) for (title, share), group in found.items()]


@dataclass(frozen=True)
class Measured:
    """A metric of the trials of a search, smaller is better.

    Args:
        title: what it is called.
        cells: the settings by their share of the time.
        values: its value by the name of the trial.
    """

    title: str
    cells: Sequence[Cell]
    values: Mapping[str, float]

    def compared(self) -> tuple[list[Cell], ComparedSettings]:
        """The settings that have values, with the test of their differences."""
        cells = [cell for cell in self.cells if cell.by_seed(self.values)]
        return cells, ComparedSettings([cell.by_seed(self.values) for cell in cells])

    def shown(self, cell: Cell) -> str:
        """`0.1234 ± 0.0012`."""
        found = list(cell.by_seed(self.values).values())
        if not found:
            return ""
        return f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")

    def table(self) -> Table:
        """Settings by the time they had."""
        shares = sorted({cell.share for cell in self.cells})
        by_place = {(cell.title, cell.share): cell for cell in self.cells}
        titles = list(dict.fromkeys(cell.title for cell in self.cells))
        rows = [
            [title, *(self.shown(by_place[title, share]) if (title, share) in by_place else "" for share in shares)]
            for title in titles
        ]
        return Table(["setting", *(_time_title(self.cells, share) for share in shares)], rows)

    def winners(self) -> list[str]:
        """For each share of the time, whether the seeds decide which setting is the best."""
        cells, compared = self.compared()
        found = []
        for share in sorted({cell.share for cell in cells}):
            places = [number for number, cell in enumerate(cells) if cell.share == share]
            best = min(places, key=lambda place: float(compared.means[place]))
            decided = "decided" if compared.winner_among(places) == best else "undecided"
            when = f"After {_time_title(self.cells, share)}" if len({cell.share for cell in cells}) > 1 else "Lowest"
            found.append(f"{when}: {cells[best].title} ({decided}).")
        return found

    def answer(self, patches: Cell, full: Cell) -> str:
        """Whether patches after half of the time are as good as full images after all of it."""
        cells, compared = self.compared()
        one, other = cells.index(patches), cells.index(full)
        difference, needed = (
            float(compared.means[one] - compared.means[other]),
            compared.decisive_difference(one, other),
        )
        verdict = "which is undecided"
        if needed is not None and abs(difference) > needed:
            verdict = "better, decided" if difference < 0 else "worse, decided"
        rule = "" if needed is None else f" (a difference above {needed:.4f} is decided)"
        return (
            f"{self.title}: {patches.title} has {self.shown(patches)} after half of the time, {full.title} has "
            f"{self.shown(full)} after all of it: {verdict}{rule}."
        )


def _time_title(cells: Sequence[Cell], share: float) -> str:
    """`11m58s`: the mean time of the trials with this share, without their starts and measurements."""
    seconds = [mean_of(cell.trials, "seconds") for cell in cells if cell.share == share]
    known = [one for one in seconds if one is not None]
    return clock(mean(known)) if known else f"{share:g} of the time"


def speed_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    """Quality after equal time and for equal counted images, and whether patches are twice as fast."""
    by_time, by_images = (read_trials(Folder.at(here / folder / "search")) for folder in (BY_TIME, BY_IMAGES))
    timed, counted = _measures(here, BY_TIME, by_time), _measures(here, BY_IMAGES, by_images)
    findings = [
        Finding(f"{one.title} after equal time: mean ± standard deviation", one.table(), one.winners()) for one in timed
    ]
    findings += [_ends_finding(here, place, by_time), _images_finding(counted)]
    first = EvaluationResult.read(here / BY_TIME / "search" / "trials" / trial_name(0) / "samples" / METRICS_FILE)
    card = open_dataset(place.dataset(data_of(place, SPEED_DATA), latents=False)).card
    trials = [*by_time, *by_images]
    return Outcome(
        lead="The same network, trained on patches and on full images: each setting for a quarter, half and all of a "
        "time, and for equal counted images.",
        numbers=[
            Number("trials", f"{len(trials)}"),
            Number("TFLOP of training", f"{sum(trial.flops or 0 for trial in trials) / 1e12:,.0f}"),
            Number("time of trials", clock(sum(trial.seconds or 0 for trial in trials))),
            Number("samples of a trial", f"{first.identity.n_samples:,}"),
        ],
        findings=findings,
        texts=_answers(timed),
        differences=[
            f"{card.rows:,} rows of {card.resolution} x {card.resolution} x {card.channels} {card.kind}, and a network "
            "that trains in minutes."
            if place.asked.small
            else f"{card.rows:,} rows.",
            "Times are planned from a few steps that are measured before the search, and those of trials include their "
            "starts and measurements.",
            "The paper compares FID at equal counted images, and states the time of a training.",
            "No setting was chosen to agree with the paper.",
        ],
        figures=[(_plot(timed), "Mean and standard deviation over the seeds. Each point is a training of its own.")],
        pictures=[_samples(place, here)],
        details=[
            ("The search by time", search_section(here / BY_TIME / "search")),
            ("The search by counted images", search_section(here / BY_IMAGES / "search")),
        ],
    )


def _measures(here: Path, folder: str, trials: Sequence[TrialRow]) -> list[Measured]:
    """The held-out loss, and the KID or the Fréchet distance of the samples."""
    cells = cells_of(trials)
    losses = {trial.name: loss for trial in trials if (loss := trial.held_out_loss) is not None}
    found = {
        trial.name: EvaluationResult.read(here / folder / "search" / "trials" / trial.name / "samples" / METRICS_FILE)
        for trial in trials
        if trial.status == "finished"
    }
    metrics = next(iter(found.values())).metrics
    name = next(one for one in ("kid", "fid", "frechet_distance") if one in metrics)
    values = {trial: float(str(result.metrics[name])) for trial, result in found.items()}
    title = METRIC_TITLES[HELD_OUT_LOSS]
    return [Measured(f"{title[0].upper()}{title[1:]}", cells, losses), Measured(TITLES[name][0], cells, values)]


def _cell_of(cells: Sequence[Cell], p: float, share: float) -> Cell | None:
    """The setting with a p and the stochastic schedule, after a share of the time."""
    title = setting_title({P_KEY: p})
    return next((cell for cell in cells if (cell.title, cell.share) == (title, share)), None)


def _answers(measures: Sequence[Measured]) -> list[str]:
    found = ["Are patches twice as fast at an equal quality?"]
    for measured in measures:
        patches, full = _cell_of(measured.cells, 0.5, 0.5), _cell_of(measured.cells, 1, 1)
        if patches and full:
            found.append(measured.answer(patches, full))
    return found if len(found) > 1 else []


def _ends_finding(here: Path, place: ReproductionFolder, trials: Sequence[TrialRow]) -> Finding:
    """The metrics of many samples of the trials that had all of the time."""
    results = {
        trial: EvaluationResult.read(here / "samples" / trial / METRICS_FILE)
        for trial in trials_of_whole_time(place.asked.small)
        if (here / "samples" / trial / METRICS_FILE).is_file()
    }
    any_result = next(iter(results.values()))
    names = [name for name in END_METRICS if name in any_result.metrics]
    rows = []
    for cell in cells_of([trial for trial in trials if trial.name in results]):
        values = [[float(str(results[trial.name].metrics[name])) for trial in cell.trials] for name in names]
        rows.append([cell.title, *(_with_spread(one) for one in values)])
    first = any_result.identity
    title = f"{first.n_samples:,} samples of each training of the whole time ({first.features})"
    return Finding(title, Table(["setting", *(TITLES[name][0] for name in names)], rows))


def _with_spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _images_finding(measures: Sequence[Measured]) -> Finding:
    """The settings after equal counted images."""
    rows = [
        [
            cell.title,
            *(one.shown(cell) for one in measures),
            f"{mean_of(cell.trials, 'images_seen') or 0:,.0f}",
            f"{(mean_of(cell.trials, 'flops') or 0) / 1e12:,.1f}",
            clock(mean_of(cell.trials, "seconds") or 0),
        ]
        for cell in measures[0].cells
    ]
    header = ["setting", *(one.title for one in measures), "counted images", "TFLOP", "time"]
    texts = [f"{one.title}. {text}" for one in measures for text in one.winners()]
    return Finding("Equal counted images, as the paper compares: mean ± standard deviation", Table(header, rows), texts)


def _plot(measures: Sequence[Measured]) -> Markup:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, measured in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for number, title in enumerate(dict.fromkeys(cell.title for cell in measured.cells)):
            cells = sorted((cell for cell in measured.cells if cell.title == title), key=lambda cell: cell.share)
            found = [list(cell.by_seed(measured.values).values()) for cell in cells]
            times = [(mean_of(cell.trials, "seconds") or 0) / 60 for cell in cells]
            spreads = [stdev(values) if len(values) > 1 else 0 for values in found]
            means = [mean(values) for values in found]
            axes.plot(times, means, marker="o", markersize=4, color=f"C{number}", label=title)
            axes.vlines(
                times,
                [one - spread for one, spread in zip(means, spreads, strict=True)],
                [one + spread for one, spread in zip(means, spreads, strict=True)],
                color=f"C{number}",
                linewidth=1,
            )
        axes.set_xlabel("minutes of a trial")
        axes.set_ylabel(measured.title)
        tidy(axes)
    return svg(figure)


def _samples(place: ReproductionFolder, here: Path) -> Picture:
    """The same seeds of the first training of each setting that had the whole time, one row each."""
    definition, _ = load_search(searches_of(place.asked.small)[BY_TIME])
    names = trials_of_whole_time(place.asked.small)[:: definition.repeats]
    folders = [place.folder.folder(f"samples/{name}") for name in names]
    rows = [read_samples(folder, list(read_entries(folder))[:SHOWN_SAMPLES]) for folder in folders]
    path = here / "speed.png"
    save_png(side_by_side(rows, scale=max(1, 64 // rows[0].shape[2])), path)
    titles = [_without_share(setting) for setting in definition.settings() if setting[BUDGET_SHARE] == 1]
    return Picture(path, f"The same seeds in each row: {'; '.join(titles)}.", pixelated=True)


def _without_share(setting: dict[str, JsonValue]) -> str:
    return setting_title({key: value for key, value in setting.items() if key != BUDGET_SHARE})
