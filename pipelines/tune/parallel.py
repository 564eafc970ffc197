"""Parallel coordinates: every trial of a search as a line through its settings, its cost and its metric."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue

from patchloom.pipelines.pages.html import render
from patchloom.pipelines.tune.frontier import METRIC_TITLES
from patchloom.pipelines.tune.plots import Plot
from patchloom.pipelines.tune.ranking import is_number_value, setting_title, short_value, value_order, value_title
from patchloom.platform.records.search import TrialRow

AXIS_DISTANCE, LEAST_WIDTH = 150, 560  # in SVG units
AXIS_TOP, AXIS_BOTTOM, AXIS_MARGIN = 44, 296, 40
MOST_VALUES = 8  # that stand on an axis one by one
LOG_RATIO = 20.0  # from here on, an axis of positive numbers is logarithmic
FEW = 3  # settings: fewer are compared in a sentence
HANDFUL = 6  # settings of one key, which the table shows as well
NO_VALUE = "none"  # of a key that depends on others


@dataclass(frozen=True)
class ParallelAxis:
    """An axis with the positions of all trials, and the labels next to it by position."""

    title: str
    x: float
    positions: list[float]
    labels: Mapping[float, str]


@dataclass(frozen=True)
class ParallelLine:
    """A finished trial: its name, its points, its colour, and what it shows under the mouse."""

    name: str
    points: list[tuple[float, float]]
    color: str
    title: str


def parallel_coordinates(trials: Sequence[TrialRow], keys: Sequence[str], metric: str) -> Plot | None:
    """One line per finished trial through its values of all keys, its cost and its metric.

    Returns None where the table of settings shows as much: for a single key with a handful of values, and for fewer
    than three settings.
    """
    finished = sorted(
        (trial for trial in trials if trial.status == "finished"), key=lambda trial: -float(trial[metric])
    )
    varied = [key for key in keys if len({repr(trial.settings.get(key)) for trial in finished}) > 1]
    settings = {repr(sorted(trial.settings.items())) for trial in finished}
    if len(settings) < FEW or (len(varied) < 2 and len(settings) <= HANDFUL):
        return None
    axes = _axes(finished, varied, metric)
    lines = [_line(trial, number, axes, finished, metric) for number, trial in enumerate(finished)]
    width = axes[-1].x + AXIS_DISTANCE - AXIS_MARGIN
    plot = render("parallel.svg", width=width, top=AXIS_TOP, bottom=AXIS_BOTTOM, axes=axes, lines=lines)
    caption = f"Each line is a finished trial. It stands out more the lower its {METRIC_TITLES[metric]} is."
    return Plot(plot, caption)


def _axes(trials: Sequence[TrialRow], keys: Sequence[str], metric: str) -> list[ParallelAxis]:
    """The axes of the keys, of the cost and of the metric, from left to right."""
    columns = [(key.split(".")[-1], _setting_column(trials, key)) for key in keys]
    if all(trial.flops is not None for trial in trials):
        columns.append(("TFLOP", _NumberColumn([(trial.flops or 0.0) / 1e12 for trial in trials])))
    columns.append((METRIC_TITLES[metric], _NumberColumn([float(trial[metric]) for trial in trials])))
    distance = max(AXIS_DISTANCE, (LEAST_WIDTH - 2 * AXIS_MARGIN) / len(columns))
    return [
        ParallelAxis(title, AXIS_MARGIN + number * distance, column.positions, column.labels)
        for number, (title, column) in enumerate(columns)
    ]


def _line(
    trial: TrialRow, number: int, axes: Sequence[ParallelAxis], trials: Sequence[TrialRow], metric: str
) -> ParallelLine:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shade = colormaps["YlOrBr"](0.25 + 0.7 * number / max(1, len(trials) - 1))
    title = f"trial {trial.name}: {setting_title(trial.settings)}; {METRIC_TITLES[metric]} {float(trial[metric]):.4f}"
    return ParallelLine(trial.name, [(axis.x, axis.positions[number]) for axis in axes], to_hex(shade), title)


def _setting_column(trials: Sequence[TrialRow], key: str) -> "_NumberColumn | _NameColumn":
    """Few values stand one by one, in order; many numbers on a scale."""
    values = [trial.settings.get(key, NO_VALUE) for trial in trials]
    numbers = [float(str(value)) for value in values if is_number_value(value)]
    if len(numbers) == len(values) and len(set(numbers)) > MOST_VALUES:
        return _NumberColumn(numbers)
    return _NameColumn(values, key)


@dataclass(frozen=True)
class _NameColumn:
    """Values one below the other: numbers by size, then names."""

    values: Sequence[JsonValue]
    key: str

    @cached_property
    def _places(self) -> dict[str, float]:
        names = list(dict.fromkeys(value_title(self.key, value) for value in sorted(self.values, key=value_order)))
        step = (AXIS_BOTTOM - AXIS_TOP) / len(names)
        return {name: AXIS_BOTTOM - step * (number + 0.5) for number, name in enumerate(names)}

    @property
    def positions(self) -> list[float]:
        return [self._places[value_title(self.key, value)] for value in self.values]

    @property
    def labels(self) -> dict[float, str]:
        return {place: name for name, place in self._places.items()}


@dataclass(frozen=True)
class _NumberColumn:
    """Numbers on a scale from the smallest to the largest one."""

    values: Sequence[float]

    @property
    def positions(self) -> list[float]:
        low, high = min(self.values), max(self.values)
        to = math.log if low > 0 and high / low >= LOG_RATIO else float
        if high == low:
            return [(AXIS_TOP + AXIS_BOTTOM) / 2] * len(self.values)
        return [
            AXIS_BOTTOM - (to(value) - to(low)) / (to(high) - to(low)) * (AXIS_BOTTOM - AXIS_TOP)
            for value in self.values
        ]

    @property
    def labels(self) -> dict[float, str]:
        return {place: short_value(value) for place, value in zip(self.positions, self.values, strict=True)
                if place in (min(self.positions), max(self.positions))}  # fmt: skip
