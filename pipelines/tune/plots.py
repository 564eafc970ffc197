"""Plots of a search: quality against cost, by p, and over time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from markupsafe import Markup

from patchloom.pipelines.pages.html import LINE_COLOURS, Panel, panels_attribute, render, svg, tidy
from patchloom.pipelines.tune.frontier import (
    COST_TITLES,
    METRIC_TITLES,
    P_KEY,
    EqualCostComparison,
    LossCurve,
    pareto_front,
    stochastic_by_p,
)
from patchloom.pipelines.tune.ranking import HELD_OUT_LOSS, setting_title, value_title
from patchloom.platform.files.inside import inner_path
from patchloom.platform.recipe.search import SCHEDULE_KEY
from patchloom.platform.records.search import TRIALS_FILE, TrialRow

STOPPED_COLOUR = "#9aa5b1"
MAX_LEGEND_ENTRIES = 10
TICKS = 6  # of an axis, at most
LEAST_SHARE = 0.25  # of the largest cost that an axis of costs spans, so that equal costs look equal
TOP = 8


@dataclass(frozen=True)
class Plot:
    """A plot as SVG, with its caption."""

    plot: Markup
    caption: str


@dataclass(frozen=True)
class _PlotSize:
    """Sides in SVG units; details of a trial stand on the right of the plot."""

    width: int = 560
    height: int = 340
    margin: int = 56
    details_width: int = 300

    @property
    def bottom(self) -> int:
        return self.height + TOP


@dataclass(frozen=True)
class _Axis:
    """A linear axis from values to positions, with some space at both ends."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, least_share: float = 0.0) -> "_Axis":
        low, high = min(values), max(values)
        space = max(0.08 * (high - low), (least_share * abs(high) - (high - low)) / 2) or 0.08 * abs(high) or 1.0
        return cls(low - space, high + space, start, end)

    def position(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list["_Tick"]:
        from matplotlib.ticker import MaxNLocator

        values = MaxNLocator(TICKS).tick_values(self.low, self.high)
        return [_Tick(self.position(value), f"{value:g}") for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class _Tick:
    position: float
    label: str


@dataclass(frozen=True)
class _TrialPoint:
    x: float
    y: float
    colour: str
    details: list[str]
    preview: Path | None
    on_front: bool


def frontier_plot(folder: Path, trials: Sequence[TrialRow], metric: str) -> Plot:
    """Every trial as a point of cost and quality; a line connects the trials that no other one beats."""
    shown = [trial for trial in trials if trial.value_of(metric) is not None and trial.flops is not None]
    values = [((trial.flops or 0.0) / 1e12, float(trial[metric])) for trial in shown]
    size = _PlotSize()
    x_axis = _Axis.over([cost for cost, _ in values], size.margin, size.width, LEAST_SHARE)
    y_axis = _Axis.over([quality for _, quality in values], size.bottom, TOP)
    front = pareto_front(values)
    points = []
    for index in [*front, *(index for index in range(len(shown)) if index not in front)]:
        trial, (cost, quality) = shown[index], values[index]
        preview = _preview_of(folder / "trials" / trial.name, trial)
        points.append(
            _TrialPoint(
                x=x_axis.position(cost),
                y=y_axis.position(quality),
                colour=STOPPED_COLOUR if trial.status == "stopped" else LINE_COLOURS[0 if index in front else 1],
                details=_details(trial, cost, quality, metric),
                preview=preview,
                on_front=index in front,
            )
        )
    box = (size.margin, TOP, size.width, size.bottom)
    panel = Panel(box, (x_axis.low, x_axis.high), (y_axis.low, y_axis.high))
    plot = render(
        "frontier.svg", plot=size, x_ticks=x_axis.ticks(), y_ticks=y_axis.ticks(), points=points,
        metric=METRIC_TITLES[metric], front_colour=LINE_COLOURS[0], panels=panels_attribute([panel]),
        clip=f"clip-{crc32(repr(values).encode()):x}",
    )  # fmt: skip
    caption = (
        f"{METRIC_TITLES[metric].capitalize()} against FLOPs spent. Each point is a trial; move the mouse over it to "
        "see its setting and preview. No trial is both better and cheaper than the trials on the line."
    )
    return Plot(plot, caption)


def _preview_of(run: Path, trial: TrialRow) -> Path | None:
    """The newest preview of a trial, if it is there."""
    path = inner_path(run, trial.preview, TRIALS_FILE) if trial.preview is not None else None
    return path if path is not None and path.is_file() else None


def _details(trial: TrialRow, cost: float, quality: float, metric: str) -> list[str]:
    return [
        f"trial {trial.name}, {trial.status}",
        *(f"{key.split('.')[-1]} {value_title(key, value)}" for key, value in trial.settings.items()),
        f"{METRIC_TITLES[metric]} {quality:.4f}",
        f"{cost:.3f} TFLOP, {trial.updates:,} updates",
    ]


def p_curves(comparisons: Sequence[EqualCostComparison]) -> Plot | None:
    """The held-out loss by p at each equal cost, like FID by p in Figure 2 of the paper.

    Returns None where fewer than two settings differ only in p.
    """
    from matplotlib.figure import Figure

    by_p = [(comparison, stochastic_by_p(comparison)) for comparison in comparisons]
    if not by_p or any(len(settings) < 2 for _, settings in by_p):
        return None
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(by_p), squeeze=False)[0]
    for axes, (comparison, settings) in zip(panels, by_p, strict=True):
        errors = [(setting.spread or 0) / len(setting.trials) ** 0.5 for setting in settings.values()]
        axes.errorbar(list(settings), [setting.mean for setting in settings.values()], errors, color=LINE_COLOURS[1],
                      marker="o", capsize=3, label="stochastic")  # fmt: skip
        others = [setting for setting in comparison.order if setting.settings.get(SCHEDULE_KEY) == "progressive"]
        for setting in others:
            label = "progressive" if setting is others[0] else None
            axes.plot(setting.settings.get(P_KEY, 0.5), setting.mean, "D", color=LINE_COLOURS[0], label=label)
        axes.set_title(f"equal {COST_TITLES[comparison.by]}", fontsize="medium")
        axes.set_xlabel("p")
        tidy(axes)
    panels[0].set_ylabel("held-out loss")
    return Plot(svg(figure), "Held-out loss by p. Bars: standard error of the mean over seeds; none for one seed.")


def training_curves(trials: Sequence[TrialRow], curves: Mapping[str, LossCurve]) -> Plot | None:
    """The held-out loss of every trial while it spent its budget; None where no trial has two points."""
    from matplotlib.figure import Figure

    shown = [trial for trial in trials if len(curves[trial.name]) > 1]
    if not shown:
        return None
    titles = list(dict.fromkeys(setting_title(trial.settings) for trial in shown))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    for trial in shown:
        number, curve = titles.index(setting_title(trial.settings)), curves[trial.name]
        has_label = trial.repeat == 0 and len(titles) <= MAX_LEGEND_ENTRIES
        axes.plot([line.flops / 1e12 for line in curve], [line[HELD_OUT_LOSS] for line in curve], linewidth=1.3,
                  color=f"C{number % 10}", linestyle="-" if trial.status == "finished" else ":",
                  label=titles[number] if has_label else None)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("TFLOP spent")
    axes.set_ylabel("held-out loss")
    tidy(axes)
    return Plot(svg(figure), "Dotted: stopped early.")
