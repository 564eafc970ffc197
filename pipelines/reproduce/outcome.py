"""Outcomes: what a reproduction found, next to what the paper has, as tables, sentences and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from markupsafe import Markup
from pydantic import JsonValue

from patchloom.pipelines.evaluate.page import METRICS_FILE
from patchloom.pipelines.pages.html import Number, Picture, Table, render
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.recipes import counted, shape_of_recipe, shipped_shape
from patchloom.pipelines.registry.quality import TITLES
from patchloom.pipelines.reproduce.paper import DATA, PaperResult, PaperTable
from patchloom.pipelines.reproduce.stages import (
    PHOTOGRAPHS_DATA,
    ReproductionFolder,
    results_on,
    run_of,
    samples_of,
    used_data,
)
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.tune.decisions import ComparedSettings
from patchloom.pipelines.tune.frontier import (
    COST_TITLES,
    EQUAL_WITHIN,
    FINAL_DISTANCE,
    METRIC_TITLES,
    EqualCostComparison,
    compare_at_equal_cost,
    compared_with_paper,
    decision,
)
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.ranking import RankedSetting, mean_of, ranked
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import aligned, clock
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.run import last_progress
from patchloom.platform.records.search import TrialRow, read_trials

SHOWN_SAMPLES = 12
TIED_WITHIN = 0.01  # of an FID of the paper, which trains each system once
COMPARED_COSTS = ("images_seen", "flops")  # the paper compares at equal counted images


@dataclass(frozen=True)
class Finding:
    """A table with its title, and what it says in sentences."""

    title: str
    table: Table
    texts: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Outcome:
    """What a reproduction found.

    Args:
        lead: what it is, in a sentence or two.
        numbers: what it used.
        findings: tables with what they say.
        texts: what they say together, in sentences.
        differences: what differs from the paper, in sentences.
        figures: plots with captions.
        pictures: pictures of samples.
        details: pages of its parts, with titles.
    """

    lead: str
    numbers: Sequence[Number]
    findings: Sequence[Finding]
    texts: Sequence[str]
    differences: Sequence[str]
    figures: Sequence[tuple[Markup, str]] = field(default=())
    pictures: Sequence[Picture] = field(default=())
    details: Sequence[tuple[str, Markup]] = field(default=())

    def section(self, commands: Sequence[str], command: str = "", origin: str = "") -> Markup:
        """The body of its page.

        Args:
            commands: those that made it.
            command: the one that ran all of them.
            origin: on which machine and with which code.
        """
        return render("reproduction.html", outcome=self, commands=commands, command=command, origin=origin)

    def text(self) -> str:
        """Its tables and findings for a terminal."""
        parts = []
        for one in self.findings:
            parts.append("\n".join([one.title, aligned([one.table.header, *one.table.rows]), *one.texts]))
        return "\n\n".join([*parts, *self.texts])


def table_outcome(table: PaperTable, place: ReproductionFolder, here: Path) -> Outcome:
    """The outcome of a table whose commands have finished.

    Args:
        table: the table.
        place: the folder of the reproduction.
        here: a local folder with its cards; pictures are written there.
    """
    small = place.asked.small
    names = used_data(table, place.asked)
    if small and table.small_search:
        parts = [SearchPart.read(table, name, place, here) for name in names]
        findings = [one for part in parts for one in part.findings()]
        details = [(f"The search on {part.title}", search_section(here / part.name / "search")) for part in parts]
        numbers = _search_numbers(parts)
    else:
        findings, numbers, details = [_systems_table(table, place, here)], _system_numbers(table, place, here), []
    return Outcome(
        lead=_lead(table, place),
        numbers=numbers,
        findings=findings,
        texts=[_cost_of_table_3()] if table.title == "Table 3" else [],
        differences=_differences(table, place, here),
        pictures=[_samples_picture(table, place, name, here) for name in names],
        details=details,
    )


def _lead(table: PaperTable, place: ReproductionFolder) -> str:
    subject = f"{table.subject[0].upper()}{table.subject[1:]}"
    size = "at small scale" if place.asked.small else "at full size"
    return f"{subject} ({table.title} of Wang et al. 2023), {size}. {_data_text(table, place)}"


def _data_text(table: PaperTable, place: ReproductionFolder) -> str:
    """What takes the place of the paper's data."""
    wanted = [DATA[name].title for name in table.data]
    if used_data(table, place.asked) == [PHOTOGRAPHS_DATA]:
        return f"Windows of six photographs take the place of {_listed(wanted)}."
    texts = [_as_data(place, name) for name in used_data(table, place.asked)]
    missing = [DATA[name].title for name in table.data if name not in place.asked.data]
    left_out = f" Not reproduced, for want of data: {_listed(missing)}." if missing else ""
    return f"Data: {_listed(texts)}.{left_out}"


def _as_data(place: ReproductionFolder, name: str) -> str:
    """`cats.zip as AFHQv2-Cat`: what was given, and what it stands for."""
    return f"{Path(place.asked.data[name]).name} as {DATA[name].title}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass(frozen=True)
class SearchPart:
    """The search of a table on one dataset.

    Args:
        name: the name of the data.
        title: what the data are, for readers.
        results: the paper's, on all datasets that this one stands for.
        trials: its trials.
    """

    name: str
    title: str
    results: Sequence[PaperResult]
    trials: Sequence[TrialRow]

    @classmethod
    def read(cls, table: PaperTable, name: str, place: ReproductionFolder, here: Path) -> "SearchPart":
        """The search in the folder of a reproduction."""
        trials = read_trials(Folder.at(here / name / "search"))
        if name == PHOTOGRAPHS_DATA:
            return cls(name, name.capitalize(), table.results, trials)
        return cls(name, _as_data(place, name), results_on(table, name), trials)

    @cached_property
    def comparisons(self) -> dict[str, EqualCostComparison | None]:
        """The settings at equal cost, by the unit of the cost."""
        return {by: compare_at_equal_cost(self.trials, by) for by in COMPARED_COSTS}

    @property
    def systems(self) -> list[str]:
        """The paper's names of what is compared, in its order."""
        return list(dict.fromkeys(result.system for result in self.results))

    def _setting(self, system: str, by: str) -> RankedSetting | None:
        wanted = next(result for result in self.results if result.system == system).settings
        comparison = self.comparisons[by]
        return next((one for one in comparison.order if _has(one.settings, wanted)), None) if comparison else None

    def _system_of(self, setting: RankedSetting) -> str:
        return next(result.system for result in self.results if _has(setting.settings, result.settings))

    def _paper(self, system: str) -> tuple[str, str]:
        """FID and time in the paper, of every dataset that this one stands for."""
        found = [result for result in self.results if result.system == system]
        several = len({result.data for result in found}) > 1
        fids = [f"{one.metrics['fid']:g}" + (f" ({one.data})" if several else "") for one in found]
        return ", ".join(fids), ", ".join(dict.fromkeys(one.time for one in found))

    def findings(self) -> list[Finding]:
        """For each cost, the systems with the paper's numbers and ours, and whether the direction is the same."""
        seeds = len({trial.repeat for trial in self.trials})
        found = []
        for by in COMPARED_COSTS:
            cost = "TFLOP" if by == "images_seen" else "counted images"
            header = ["system", "paper: FID", "held-out loss", "colour distance", cost, "paper: time"]
            rows = []
            for system in self.systems:
                fid, time = self._paper(system)
                rows.append([system, fid, *_cells(self._setting(system, by), by), time])
            title = f"{self.title}, at equal {COST_TITLES[by]}: mean ± standard deviation over {seeds} seeds"
            texts = [*self._directions(by), *(self.cost() if by == "images_seen" else [])]
            found.append(Finding(title, Table(header, rows), texts))
        return found

    def _directions(self, by: str) -> list[str]:
        """Whether the direction at an equal cost is that of the paper, by each metric."""
        comparison = self.comparisons[by]
        if comparison is None:
            return [f"Not compared: a trial failed, or ended more than {EQUAL_WITHIN:.0%} off the others."]
        found = [self._direction(comparison.order)]
        trials = [trial for setting in comparison.order for trial in setting.trials]
        if all(trial.final_distance is not None for trial in trials):
            found.append(self._direction(ranked(trials, FINAL_DISTANCE)))
        if len(self.systems) > 2 and by == "images_seen":
            found.append(compared_with_paper(comparison))
        return found

    def cost(self) -> list[str]:
        """How much cheaper patches are per counted image, as a sentence."""
        settings = {
            result.settings.get("patches.p"): self._setting(result.system, "images_seen") for result in self.results
        }
        return cost_ratio(settings.get(0.5), settings.get(1.0))

    def agrees(self, order: Sequence[RankedSetting]) -> bool | None:
        """Whether the best of our settings is the best of the paper; None where the seeds do not decide which is best.

        Args:
            order: settings, best first.
        """
        if ComparedSettings([setting.by_seed for setting in order]).winner != 0:
            return None
        return self._system_of(order[0]) in self._best_of_paper()

    def _best_of_paper(self) -> list[str]:
        """The systems whose FID in the paper is the lowest, or as low, on every dataset that this one stands for."""
        best = list(self.systems)
        for data in {result.data for result in self.results}:
            fids = {one.system: one.metrics["fid"] for one in self.results if one.data == data}
            best = [system for system in best if fids[system] <= min(fids.values()) * (1 + TIED_WITHIN)]
        return best

    def _direction(self, order: Sequence[RankedSetting]) -> str:
        best, theirs = self._system_of(order[0]), _listed(self._best_of_paper())
        verb = "have" if len(self._best_of_paper()) > 1 else "has"
        paper = {
            True: f"In the paper, {theirs} {verb} the lowest FID: the same direction.",
            False: f"In the paper, {theirs} {verb} the lowest FID: the direction differs.",
            None: f"In the paper, {theirs} {verb} the lowest FID.",
        }
        metric = {FINAL_DISTANCE: "colour distance"}.get(order[0].metric, METRIC_TITLES[order[0].metric])
        return f"{best} has the lowest {metric}, {order[0].value_of_n()}. {decision(order)} {paper[self.agrees(order)]}"


def cost_ratio(patches: RankedSetting | None, full: RankedSetting | None) -> list[str]:
    """How much more full images cost than p = 0.5 for as many counted images, as a sentence; none without both."""
    if patches is None or full is None:
        return []
    costs = [(mean_of(full.trials, unit), mean_of(patches.trials, unit)) for unit in ("flops", "seconds")]
    ratios = [more / less for more, less in costs if more and less]
    if len(ratios) < len(costs):
        return []
    return [
        f"For as many counted images, full images took {ratios[0]:.2f} times the FLOPs and {ratios[1]:.2f} times "
        "the time of p = 0.5, with the start and the measurements of each trial. The paper says about 2."
    ]


def _has(settings: Mapping[str, JsonValue], wanted: Mapping[str, JsonValue]) -> bool:
    return all(settings.get(key) == value for key, value in wanted.items())


def _cells(setting: RankedSetting | None, by: str) -> list[str]:
    if setting is None:
        return ["not comparable", "", ""]
    distances = [trial.final_distance for trial in setting.trials if trial.final_distance is not None]
    distance = ranked(setting.trials, FINAL_DISTANCE)[0].value() if len(distances) == len(setting.trials) else ""
    unit, scale = ("flops", 1e12) if by == "images_seen" else ("images_seen", 1)
    cost = (mean_of(setting.trials, unit) or 0) / scale
    return [setting.value(), distance, f"{cost:,.2f}" if scale > 1 else f"{cost:,.0f}"]


def _search_numbers(parts: Sequence[SearchPart]) -> list[Number]:
    trials = [trial for part in parts for trial in part.trials]
    return [
        Number("trials", f"{len(trials)}"),
        Number("seeds of each setting", f"{len({trial.repeat for trial in trials})}"),
        Number("TFLOP of training", f"{sum(trial.flops or 0 for trial in trials) / 1e12:,.1f}"),
        Number("time of trials", clock(sum(trial.seconds or 0 for trial in trials))),
    ]


def _systems_of(table: PaperTable, place: ReproductionFolder) -> list[tuple[str, PaperResult]]:
    return [(name, result) for name in used_data(table, place.asked) for result in results_on(table, name)]


def _systems_table(table: PaperTable, place: ReproductionFolder, here: Path) -> Finding:
    """Systems that were trained, sampled and measured one by one, next to the paper's numbers."""
    rows, header = [], list[str]()
    for name, result in _systems_of(table, place):
        measured = EvaluationResult.read(here.joinpath(name, *samples_of(result), METRICS_FILE))
        run = last_progress(here.joinpath(name, *run_of(result)))
        names = [metric for metric in TITLES if metric in measured.metrics or metric in result.metrics]
        title = _as_data(place, name) if name != PHOTOGRAPHS_DATA else name
        row, header = [title, result.system], ["data", "system"]
        for metric in names:
            if metric in result.metrics:
                header.append(f"paper: {TITLES[metric][0]}")
                row.append(f"{result.metrics[metric]:g}")
            if metric in measured.metrics:
                header.append(TITLES[metric][0])
                row.append(f"{measured.metrics[metric]:.4g}")
        header += ["samples", "counted images", "TFLOP", "paper: time"]
        row += [f"{measured.identity.n_samples:,}", f"{run.images_seen:,}", f"{run.flops / 1e12:,.1f}", result.time]
        rows.append(row)
    return Finding(f"{table.title}: one training of each system", Table(header, rows))


def _system_numbers(table: PaperTable, place: ReproductionFolder, here: Path) -> list[Number]:
    runs = {(name, *run_of(result)) for name, result in _systems_of(table, place)}
    lines = [last_progress(here.joinpath(*run)) for run in runs]
    return [
        Number("trained systems", f"{len(runs)}"),
        Number("counted images", f"{sum(line.images_seen for line in lines):,}"),
        Number("TFLOP of training", f"{sum(line.flops for line in lines) / 1e12:,.1f}"),
        Number("time of all commands", clock(sum(stage.seconds for stage in place.asked.stages))),
    ]


def _cost_of_table_3() -> str:
    shapes = {name: shipped_shape(name, load_recipe(name)) for name in ("imagenet256", "adm256")}
    flops = {name: counted(load_recipe(name), shape).evaluation_flops / 1e9 for name, shape in shapes.items()}
    return (
        f"An evaluation of LPDM-ADM at full size has {flops['imagenet256']:,.1f} GFLOP, or half as many multiply-adds; "
        "the paper has 78, which fits neither. ADM in pixels has "
        f"{flops['adm256'] / 2:,.0f} billion multiply-adds; the paper has 1120."
    )


def _differences(table: PaperTable, place: ReproductionFolder, here: Path) -> list[str]:
    """What differs from the paper, in sentences."""
    texts = []
    for name in used_data(table, place.asked):
        card = open_dataset(place.dataset(name, table.latents)).card
        title = _as_data(place, name) if name in place.asked.data else PHOTOGRAPHS_DATA.capitalize()
        size = f"{card.resolution} x {card.resolution} x {card.channels}"
        texts.append(f"{title}: {card.rows:,} rows of {size} {card.kind}.")
    if not place.asked.small:
        return [
            *texts,
            "One training of each system, as in the paper; GPUs, precision and batch are those of its recipe.",
        ]
    if not table.small_search:
        return [
            *texts,
            f"Small networks, trained once for minutes. Metrics on {place.asked.features} are not those of the paper.",
        ]
    trial = here / used_data(table, place.asked)[0] / "search" / "trials"
    recipe = load_recipe(sorted(trial.glob("*/recipe.yaml"))[0])
    full = load_recipe(table.results[0].recipe)
    counts = counted(recipe, shape_of_recipe(recipe))
    return [
        *texts,
        f"A network of {counts.parameters / 1e6:.2f} M parameters and {counts.evaluation_flops / 1e9:.2g} GFLOP for "
        f"{shape_of_recipe(recipe)}, instead of {counted(full, shape_of_recipe(full)).parameters / 1e6:.1f} M.",
        f"Thousands of counted images per trial, instead of {full.train.images / 1e6:,.0f} million: this says how "
        "training starts. Each trial has a ramp and an average of its own length.",
        "Held-out loss of the averaged weights on full-size images, and the Fréchet distance of mean tile colours of "
        "samples, instead of FID. Neither needs to rank systems as FID does.",
        "No setting was chosen to agree with the paper.",
    ]


def _samples_picture(table: PaperTable, place: ReproductionFolder, name: str, here: Path) -> Picture:
    """The same seeds of every system, one row each, in the order of the paper."""
    rows, titles = [], []
    for result in results_on(table, name):
        if place.asked.small and table.small_search:
            trials = [
                row for row in read_trials(Folder.at(here / name / "search")) if row.equal is None and row.repeat == 0
            ]
            found = next((row for row in trials if _has(row.settings, result.settings)), None)
            samples = place.folder.folder(f"{name}/search/trials/{found.name}/samples") if found else None
        else:
            samples = place.folder.folder("/".join([name, *samples_of(result)]))
        if samples is None or not samples.has("sampling.json"):
            continue
        entries = list(read_entries(samples))[:SHOWN_SAMPLES]
        rows.append(read_samples(samples, entries))
        titles.append(result.system)
    path = here / f"{name}.png"
    if rows:
        save_png(side_by_side(rows, scale=max(1, 64 // rows[0].shape[2])), path)
    equal = " Trials of equal FLOPs, first seed." if place.asked.small and table.small_search else ""
    data = "" if name == PHOTOGRAPHS_DATA else f"{_as_data(place, name)}. "
    return Picture(path, f"{data}The same seeds in each row: {', '.join(titles)}.{equal}", pixelated=True)
