"""Search plots: the trials of a search as pictures: quality against cost, by p, over time, and key by key."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchloom.pipelines.pages.html import COLOURS, png_data, svg, tidy
from patchloom.pipelines.tune.frontier import COSTS, Curve, Equal, Row, metric_words, pareto, stochastic_by_p
from patchloom.pipelines.tune.ranking import setting_words, value_words

PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN, LOOK_SIDE = 560, 340, 56, 300


def frontier_plot(folder: Path, trials: list[Row], metric: str) -> str:
    """Every trial a point of cost and quality, with its preview where the mouse is; those that nothing beats joined."""
    there = [trial for trial in trials if metric in trial and "flops" in trial]
    points = [(trial["flops"] / 1e12, float(trial[metric])) for trial in there]
    scale_x, scale_y = _Scale.over([x for x, _ in points]), _Scale.over([y for _, y in points])

    def place(index: int) -> tuple[float, float]:
        x, y = points[index]
        return PLOT_MARGIN + scale_x(x) * (PLOT_WIDTH - PLOT_MARGIN), PLOT_HEIGHT * (1 - scale_y(y)) + 8

    front = pareto(points)
    parts = [_axes(scale_x, scale_y, metric)]
    corners = " ".join("{:.1f},{:.1f}".format(*place(index)) for index in front)
    parts.append(f'<polyline points="{corners}" fill="none" stroke="{COLOURS[0]}" stroke-dasharray="4 3"/>')
    parts += [
        _point(folder, there[index], place(index), points[index], index in front, metric) for index in range(len(there))
    ]
    width, height = PLOT_WIDTH + 40 + LOOK_SIDE, PLOT_HEIGHT + 60
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">'
        + "".join(parts)
        + f"</svg><figcaption>{metric_words(metric).capitalize()} against FLOPs spent; every point is a trial (move "
        "over it for its setting and preview), and no trial is better and cheaper than those on the line.</figcaption>"
        "</figure>"
    )


class _Scale:
    """From numbers to [0, 1], with some air at both ends."""

    def __init__(self, low: float, high: float) -> None:
        air = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
        self.low, self.high = low - air, high + air

    @staticmethod
    def over(values: Sequence[float]) -> "_Scale":
        return _Scale(min(values), max(values))

    def __call__(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return [self.low + part * (self.high - self.low) for part in (0.1, 0.3, 0.5, 0.7, 0.9)]


def _axes(scale_x: _Scale, scale_y: _Scale, metric: str) -> str:
    parts = []
    for value in scale_y.ticks():
        y = PLOT_HEIGHT * (1 - scale_y(value)) + 8
        parts.append(f'<line x1="{PLOT_MARGIN}" x2="{PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6eaee"/>')
        parts.append(f'<text x="{PLOT_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6675">{value:.3g}</text>')
    bottom = PLOT_HEIGHT + 8
    for value in scale_x.ticks():
        x = PLOT_MARGIN + scale_x(value) * (PLOT_WIDTH - PLOT_MARGIN)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#5b6675">{value:.3g}</text>')
    parts.append(f'<line x1="{PLOT_MARGIN}" x2="{PLOT_WIDTH}" y1="{bottom}" y2="{bottom}" stroke="#5b6675"/>')
    parts.append(f'<text x="{PLOT_WIDTH}" y="{bottom + 38}" text-anchor="end">TFLOP spent</text>')
    parts.append(f'<text x="0" y="{bottom + 38}">{metric_words(metric)} (less is better)</text>')
    return "".join(parts)


def _point(
    folder: Path, trial: Row, place: tuple[float, float], values: tuple[float, float], on_front: bool, metric: str
) -> str:
    colour = {"finished": COLOURS[0] if on_front else COLOURS[1], "stopped": "#9aa5b1"}[trial["status"]]
    words = [
        f"trial {trial['name']}, {trial['status']}",
        *(f"{key.split('.')[-1]} {value_words(value)}" for key, value in trial["settings"].items()),
        f"{metric_words(metric)} {values[1]:.4f}",
        f"{values[0]:.3f} TFLOP, {trial['updates']:,} updates",
    ]
    left = PLOT_WIDTH + 30
    look = "".join(
        f'<text x="{left}" y="{20 + 16 * number}">{html.escape(line)}</text>' for number, line in enumerate(words)
    )
    preview = folder / "trials" / trial["name"] / trial.get("preview", "none")
    if preview.is_file():
        top = 30 + 16 * len(words)
        look += (
            f'<image href="{png_data(preview)}" x="{left}" y="{top}" width="{LOOK_SIDE}" '
            f'height="{PLOT_HEIGHT + 50 - top}" preserveAspectRatio="xMinYMin" style="image-rendering: pixelated"/>'
        )
    x, y = place
    return (
        f'<g class="point"><circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}" fill-opacity=".85"/>'
        f'<title>{html.escape(", ".join(words))}</title><g class="looks">{look}</g></g>'
    )


def p_curves(equals: list[Equal]) -> list[str]:
    """The held-out loss by p, as the paper's Figure 2 has FID, at each equal cost."""
    from matplotlib.figure import Figure

    by_p = [(equal, stochastic_by_p(equal)) for equal in equals]
    if not by_p or any(len(found) < 2 for _, found in by_p):
        return []
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(by_p), squeeze=False)[0]
    for axes, (equal, found) in zip(panels, by_p, strict=True):
        errors = [(setting.spread or 0) / len(setting.trials) ** 0.5 for setting in found.values()]
        axes.errorbar(list(found), [setting.mean for setting in found.values()], errors, color=COLOURS[1], marker="o",
                      capsize=3, label="stochastic")  # fmt: skip
        others = [setting for setting in equal.order if setting.settings.get("patches.schedule") == "progressive"]
        for p, setting in ((setting.settings.get("patches.p", 0.5), setting) for setting in others):
            label = "progressive" if setting is others[0] else None
            axes.plot(p, setting.mean, "D", color=COLOURS[0], label=label)
        axes.set_title(f"equal {COSTS[equal.by]}", fontsize="medium")
        axes.set_xlabel("p")
        tidy(axes)
    panels[0].set_ylabel("held-out loss")
    caption = "Held-out loss by p. Bars: the standard error of the mean over seeds; none for one seed."
    return [f"<figure>{svg(figure)}<figcaption>{caption}</figcaption></figure>"]


def curve_sections(trials: list[Row], curves: dict[str, Curve]) -> list[str]:
    """The held-out loss of every trial while it spent its budget."""
    from matplotlib.figure import Figure

    drawn = [trial for trial in trials if len(curves[trial["name"]]) > 1]
    if not drawn:
        return []
    names = list(dict.fromkeys(setting_words(trial["settings"]) for trial in drawn))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    for trial in drawn:
        number = names.index(setting_words(trial["settings"]))
        curve = curves[trial["name"]]
        axes.plot([line.flops / 1e12 for line in curve], [line["held_out_loss"] for line in curve], linewidth=1.3,
                  color=f"C{number % 10}", linestyle="-" if trial["status"] == "finished" else ":",
                  label=names[number] if trial["repeat"] == 0 and len(names) <= 10 else None)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("TFLOP spent")
    axes.set_ylabel("held-out loss")
    tidy(axes)
    return [
        "<h3>While they trained</h3>",
        f"<figure>{svg(figure)}<figcaption>Dotted: stopped early.</figcaption></figure>",
    ]


def parallel_coordinates(trials: list[Row], keys: list[str], metric: str) -> str:
    """Parallel coordinates: a line a trial through its values, the darker the better."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    finished = sorted((trial for trial in trials if trial["status"] == "finished"), key=lambda trial: -trial[metric])
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    columns = [_positions([trial["settings"].get(key, "none") for trial in finished]) for key in keys]
    columns.append(_positions([float(trial[metric]) for trial in finished]))
    for number in range(len(finished)):
        shade = colormaps["YlOrBr"](0.15 + 0.8 * number / max(1, len(finished) - 1))
        axes.plot(range(len(columns)), [places[number] for places, _ in columns], color=shade, linewidth=1.6)
    for column, (_, marks) in enumerate(columns):
        axes.axvline(column, color="#c9d1d9", linewidth=0.8)
        for place, text in marks.items():
            axes.text(column + 0.02, place, text, fontsize="small", va="center")
    axes.set_xticks(range(len(columns)), [*(key.split(".")[-1] for key in keys), metric_words(metric)])
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return (
        f"<figure>{svg(figure)}<figcaption>Every finished trial a line; the darker, the better.</figcaption></figure>"
    )


def _positions(values: list[Any]) -> tuple[list[float], dict[float, str]]:
    """Where values stand on an axis from 0 to 1, and what is written there."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        span = (high - low) or 1
        marks = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"} if high > low else {0.0: f"{low:.4g}"}
        return [(value - low) / span for value in values], marks
    names = sorted({value_words(value) for value in values})
    places = {name: number / max(1, len(names) - 1) for number, name in enumerate(names)}
    return [places[value_words(value)] for value in values], {place: name for name, place in places.items()}
