"""The outcome of a comparison of training speeds: tables, a plot and an answer, from its record alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev, variance
from typing import Any

from markupsafe import Markup

from patchloom.errors import UserError
from patchloom.pipelines.pages.html import Number, Picture, Table, svg, tidy
from patchloom.pipelines.registry.quality import TITLES
from patchloom.pipelines.reproduce.outcome import Finding, Outcome
from patchloom.pipelines.tune.decisions import ComparedSettings, t_quantile
from patchloom.pipelines.tune.ranking import with_spread
from patchloom.platform.progress import clock
from patchloom.platform.records.speed import SpeedResults, SpeedTrial

PATCH_SETTING, FULL_SETTING = "p 0.5", "p 1"  # the paper's choice, and training on full-size images
DISTANCES = ("kid", "fid", "frechet_distance")  # of the samples: the first that was measured
TWICE_FROM, TWICE_TO = 1.9, 2.1  # ratios of times that count as twice
END_METRICS = ("fid", "frechet_distance", "kid", "precision", "recall")


@dataclass(frozen=True)
class Cell:
    """The trainings of one setting that had one share of the time, one for each seed."""

    setting: str
    share: float
    trials: Sequence[SpeedTrial]

    def mean_of(self, value: Callable[[SpeedTrial], float]) -> float:
        """The mean of a value over the seeds."""
        return mean(map(value, self.trials))


def cells_of(trials: Sequence[SpeedTrial]) -> list[Cell]:
    """The trainings by setting and share of the time, in the order of the search."""
    found: dict[tuple[str, float], list[SpeedTrial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.name):
        found.setdefault((trial.setting, trial.share), []).append(trial)
    return [Cell(setting, share, group) for (setting, share), group in found.items()]


@dataclass(frozen=True)
class Measured:
    """A metric of trainings, smaller is better.

    Args:
        title: what it is called.
        cells: the settings by their share of the time.
        value: its value for a training.
    """

    title: str
    cells: Sequence[Cell]
    value: Callable[[SpeedTrial], float]

    def values(self, cell: Cell) -> dict[int, float]:
        """The values of a setting by seed."""
        return {trial.repeat: self.value(trial) for trial in cell.trials}

    def shown(self, cell: Cell) -> str:
        """`0.1234 ± 0.0012`."""
        return with_spread(list(self.values(cell).values()))

    def table(self) -> Table:
        """Settings by the time they had."""
        shares = sorted({cell.share for cell in self.cells})
        by_place = {(cell.setting, cell.share): cell for cell in self.cells}
        rows = [
            [
                setting,
                *(self.shown(by_place[setting, share]) if (setting, share) in by_place else "" for share in shares),
            ]
            for setting in dict.fromkeys(cell.setting for cell in self.cells)
        ]
        return Table(["setting", *(clock(_time_of(self.cells, share)) for share in shares)], rows)

    def winners(self) -> list[str]:
        """For each share of the time, whether the seeds decide which setting is the best."""
        shares, found = sorted({cell.share for cell in self.cells}), []
        for share in shares:
            cells = [cell for cell in self.cells if cell.share == share]
            compared = ComparedSettings([self.values(cell) for cell in cells])
            best = min(range(len(cells)), key=lambda number: float(compared.means[number]))
            decided = "decided" if compared.winner == best else "undecided"
            when = f"Lowest after {clock(_time_of(self.cells, share))}" if len(shares) > 1 else "Lowest"
            found.append(f"{when}: {cells[best].setting} ({decided}).")
        return found

    def verdict(self, patches: Cell, full: Cell) -> tuple[str, str]:
        """How patches after less time compare with full images after more: a word, and a sentence with numbers."""
        difference = patches.mean_of(self.value) - full.mean_of(self.value)
        needed = self.decisive_difference(patches, full)
        word = "undecided"
        if needed is not None and abs(difference) > needed:
            word = "better" if difference < 0 else "worse"
        rule = "" if needed is None else f" (a difference above {needed:.2g} is decided)"
        times = [clock(cell.mean_of(lambda trial: trial.seconds)) for cell in (patches, full)]
        return word, (
            f"{self.title}: {patches.setting} has {self.shown(patches)} after {times[0]}, {full.setting} has "
            f"{self.shown(full)} after {times[1]}: {word}{rule}."
        )

    def decisive_difference(self, one: Cell, other: Cell) -> float | None:
        """What Welch's t test at 5 % asks of two settings; None without two seeds.

        Each error is pooled over the settings that had the same share of the time: after more of it, trainings of
        different seeds differ less.
        """
        errors = [self._error(cell.share) for cell in (one, other)]
        if not all(freedom for _, freedom in errors):
            return None
        parts = [error / len(cell.trials) for cell, (error, _) in zip((one, other), errors, strict=True)]
        if sum(parts) == 0:
            return 0.0
        squares = sum(part**2 / freedom for part, (_, freedom) in zip(parts, errors, strict=True))
        return t_quantile(int(sum(parts) ** 2 / squares)) * math.sqrt(sum(parts))  # Welch and Satterthwaite

    def _error(self, share: float) -> tuple[float, int]:
        """The variance of a value over seeds, pooled over the settings of a share, and its degrees of freedom."""
        groups = [list(self.values(cell).values()) for cell in self.cells if cell.share == share]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum((len(group) - 1) * variance(group) for group in groups if len(group) > 1)
        return (squares / freedom if freedom else 0.0), freedom


def outcome_of(results: SpeedResults, samples: Picture, details: Sequence[tuple[str, Markup]] = ()) -> Outcome:
    """Quality after equal time and for equal counted images, and whether patches are twice as fast.

    Args:
        results: the record.
        samples: samples of the same seeds.
        details: pages of the searches, with titles.
    """
    timed, counted = measures(results.by_time), measures(results.by_images)
    findings = [
        Finding(f"{one.title} after equal time: mean ± standard deviation", one.table(), one.winners()) for one in timed
    ]
    findings += [*_ends_findings(results), _images_finding(counted)]
    repeats = len({trial.repeat for trial in results.by_time})
    count = results.by_time[0].samples.count
    return Outcome(
        lead="The same network, trained on patches and on full images: each setting for a quarter, half and all of a "
        f"time, and for equal counted images, with {repeats} seed{'s' * (repeats != 1)} each.",
        numbers=[
            Number("trainings", f"{len(results.trials)}"),
            Number("TFLOP of training", f"{sum(trial.flops for trial in results.trials) / 1e12:,.0f}"),
            Number("time of all trainings", clock(sum(trial.trial_seconds for trial in results.trials))),
            Number("samples of each", f"{count:,}"),
        ],
        findings=findings,
        texts=answer(timed),
        differences=[
            f"{results.data}; {results.recipe}.",
            f"Held-out losses are those of {results.held_out_images:,} images, samples those of {results.sampler}.",
            "Times are those of the training steps. Their number is planned from a few steps that are measured before "
            "the search.",
            "The paper compares FID at equal counted images, and states the time of a training.",
            "A lowest setting is decided if a t test at 5 % puts it ahead of each other one in its column or table; "
            "the answer uses Welch's t test at 5 %. Each is a test of its own.",
            *([f"{results.failed} trainings failed and have no result."] if results.failed else []),
            "No setting was chosen to agree with the paper.",
        ],
        figures=[
            (
                _plot(timed),
                f"Mean and standard deviation over {repeats} seeds; each point is a training of its own. The thin "
                f"lines are held-out losses during the longest ones. {timed[1].title} is that of {count:,} samples.",
            )
        ],
        pictures=[samples],
        details=details,
    )


def measures(trials: Sequence[SpeedTrial]) -> list[Measured]:
    """The held-out loss, and the KID or the Fréchet distance of the samples.

    Raises:
        UserError: there are no trials, or they have no distance in common.
    """
    cells = cells_of(trials)
    name = next((name for name in DISTANCES if all(name in trial.samples.metrics for trial in trials)), None)
    if not trials or name is None:
        raise UserError(
            f"none of {', '.join(DISTANCES)} was measured for all of {len(trials)} trainings: see their logs"
        )
    return [
        Measured("Held-out loss", cells, lambda trial: trial.held_out_loss),
        Measured(TITLES[name][0], cells, lambda trial: trial.samples.metrics[name]),
    ]


def answer(timed: Sequence[Measured]) -> list[str]:
    """Whether patches after half of the time are as good as full images after all of it: one sentence, then numbers."""
    cells = {(cell.setting, cell.share): cell for cell in timed[0].cells}
    if (PATCH_SETTING, 0.5) not in cells or (FULL_SETTING, 1) not in cells:
        return []
    patches, full = cells[PATCH_SETTING, 0.5], cells[FULL_SETTING, 1]
    found = [one.verdict(patches, full) for one in timed]
    words = {word for word, _ in found}
    short = "undecided"
    if "worse" in words:
        short = "no"
    elif words == {"better"}:
        short = "yes"
    ratio = full.mean_of(lambda trial: trial.seconds) / patches.mean_of(lambda trial: trial.seconds)
    # times are planned from a few measured steps, and a machine may be slower later
    times = "twice" if TWICE_FROM <= ratio <= TWICE_TO else f"{ratio:.2f} times"
    lead = f"Is training on patches {times} as fast at an equal quality? Here: {short}."
    return [lead, *(sentence for _, sentence in found)]


def _time_of(cells: Sequence[Cell], share: float) -> float:
    """The mean seconds of training of all settings with a share of the time."""
    return mean(cell.mean_of(lambda trial: trial.seconds) for cell in cells if cell.share == share)


def _ends_findings(results: SpeedResults) -> list[Finding]:
    """The metrics of many samples of the trainings that had all of the time."""
    ends = {trial.name: trial.end for trial in results.by_time if trial.end}
    if not ends:
        return []
    first = next(iter(ends.values()))
    names = [name for name in END_METRICS if all(name in end.metrics for end in ends.values())]
    cells = cells_of([trial for trial in results.by_time if trial.name in ends])
    rows = [
        [cell.setting, *(with_spread([ends[trial.name].metrics[name] for trial in cell.trials]) for name in names)]
        for cell in cells
    ]
    lowest = Measured(TITLES[names[0]][0], cells, lambda trial: ends[trial.name].metrics[names[0]])
    title = f"{first.count:,} samples of each training of the whole time ({first.features})"
    header = ["setting", *(TITLES[name][0] for name in names)]
    return [Finding(title, Table(header, rows), [f"{lowest.title}. {text}" for text in lowest.winners()])]


def _images_finding(measured: Sequence[Measured]) -> Finding:
    """The settings after equal counted images."""
    rows = [
        [
            cell.setting,
            *(one.shown(cell) for one in measured),
            f"{cell.mean_of(lambda trial: trial.images):,.0f}",
            f"{cell.mean_of(lambda trial: trial.flops) / 1e12:,.1f}",
            clock(cell.mean_of(lambda trial: trial.seconds)),
        ]
        for cell in measured[0].cells
    ]
    header = ["setting", *(one.title for one in measured), "counted images", "TFLOP", "time"]
    texts = [f"{one.title}. {text}" for one in measured for text in one.winners()]
    return Finding("Equal counted images, as the paper compares: mean ± standard deviation", Table(header, rows), texts)


def _plot(timed: Sequence[Measured]) -> Markup:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, measured in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed, strict=True):
        for number, setting in enumerate(dict.fromkeys(cell.setting for cell in measured.cells)):
            cells = sorted((cell for cell in measured.cells if cell.setting == setting), key=lambda cell: cell.share)
            found = [list(measured.values(cell).values()) for cell in cells]
            minutes = [cell.mean_of(lambda trial: trial.seconds) / 60 for cell in cells]
            spreads = [stdev(values) if len(values) > 1 else 0 for values in found]
            axes.errorbar(
                minutes, list(map(mean, found)), spreads, marker="o", markersize=4, color=f"C{number}", label=setting
            )
            if measured is timed[0]:
                _plot_course(axes, cells[-1], number)
        axes.set_xlabel("minutes of training")
        axes.set_ylabel(measured.title)
        tidy(axes)
    return svg(figure)


def _plot_course(axes: Any, cell: Cell, number: int) -> None:
    """The mean held-out loss during trainings; a click on the setting's name hides it, too."""
    by_time = list(zip(*(trial.held_out for trial in cell.trials), strict=False))
    minutes = [mean(point.seconds for point in points) / 60 for points in by_time]
    (line,) = axes.plot(
        minutes, [mean(point.loss for point in points) for points in by_time], color=f"C{number}", linewidth=0.7
    )
    line.set_gid(f"part-{axes.figure.axes.index(axes)}-{number}")
