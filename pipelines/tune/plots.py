"""Plots of a search: quality against cost, by p, over time, and key by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from pydantic import JsonValue

from patchloom.pipelines.pages.html import LINE_COLOURS, render, svg, tidy
from patchloom.pipelines.tune.frontier import (
    COST_TITLES,
    METRIC_TITLES,
    P_KEY,
    EqualCostComparison,
    LossCurve,
    pareto_front,
    stochastic_by_p,
)
from patchloom.pipelines.tune.ranking import HELD_OUT_LOSS, setting_title, short_value, value_title
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
    plot = render(
        "frontier.svg", plot=size, x_ticks=x_axis.ticks(), y_ticks=y_axis.ticks(), points=points,
        metric=METRIC_TITLES[metric], front_colour=LINE_COLOURS[0],
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


def parallel_coordinates(trials: Sequence[TrialRow], keys: Sequence[str], metric: str) -> Plot:
    """One line per finished trial through its values of all keys; darker lines are better."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    finished = sorted((trial for trial in trials if trial.status == "finished"), key=lambda trial: -trial[metric])
    columns = [_category_positions([trial.settings.get(key, "none") for trial in finished]) for key in keys]
    columns.append(_category_positions([float(trial[metric]) for trial in finished]))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    for number in range(len(finished)):
        shade = colormaps["YlOrBr"](0.15 + 0.8 * number / max(1, len(finished) - 1))
        axes.plot(range(len(columns)), [positions[number] for positions, _ in columns], color=shade, linewidth=1.6)
    for column, (_, labels) in enumerate(columns):
        axes.axvline(column, color="#c9d1d9", linewidth=0.8)
        for position, label in labels.items():
            axes.text(column + 0.02, position, label, fontsize="small", va="center")
    axes.set_xticks(range(len(columns)), [*(key.split(".")[-1] for key in keys), METRIC_TITLES[metric]])
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return Plot(svg(figure), "Each line is a finished trial; darker lines are better.")


def _category_positions(values: Sequence[JsonValue]) -> tuple[list[float], dict[float, str]]:
    """The positions of values on an axis from 0 to 1, and the labels of the axis."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        span = (high - low) or 1
        labels = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"} if high > low else {0.0: f"{low:.4g}"}
        return [(number - low) / span for number in numbers], labels
    names = sorted({short_value(value) for value in values})
    positions = {name: number / max(1, len(names) - 1) for number, name in enumerate(names)}
    return [positions[short_value(value)] for value in values], {place: name for name, place in positions.items()}
