"""Search page: which setting to take and on what evidence, every trial a point, and what was not tried."""

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from patchloom.pipelines.frontier import (
    COSTS,
    HELD_OUT,
    Curve,
    Equal,
    Trial,
    at_equal,
    beside_the_paper,
    curve_of,
    importance,
    mean_over,
    metric_words,
    pareto,
    proxy_correlations,
    recommendation,
    stochastic_by_p,
)
from patchloom.pipelines.page import COLOURS, numbers, png_data, svg, table, tidy
from patchloom.pipelines.ranking import Ranked, ranked, setting_words
from patchloom.platform.errors import UserError
from patchloom.platform.progress import clock
from patchloom.platform.storage import read_json, read_json_lines

TRIALS_FILE = "trials.jsonl"
FORMAT = 2
KNOBS = {  # of a recipe, by what people ask of them first
    "patches.p": "p",
    "patches.schedule": "the schedule",
    "patches.sizes": "patch sizes and batch multipliers",
    "patches.draw": "how sizes are drawn across workers",
    "loss.reduction": "the loss's reduction",
    "model.coordinates": "the coordinates' encoding",
    "model.width": "the network's width",
    "optimizer.lr": "the learning rate",
    "train.batch_size": "the batch size",
    "noise.mean": "the training noise",
}
PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN, LOOK_SIDE = 560, 340, 56, 300


def search_sections(folder: Path) -> list[str]:
    """The page of a search's folder; raises UserError for one that is not finished."""
    card = read_json(folder / "search.json")
    if card["format_version"] != FORMAT:
        raise UserError(f"{folder} was written by another version of patchloom: search again with this one")
    trials, search = read_json_lines(folder / TRIALS_FILE), card["search"]
    order = ranked(trials, search["metric"])
    if not order:
        raise UserError(f"{folder} has no finished trial yet: let `patchloom tune` end, or go on with --restore")
    curves = {trial["name"]: curve_of(folder, trial) for trial in trials}
    budget = ", ".join(f"{value:,.4g} {name}" for name, value in search["budget"].items() if value)
    keys = list(search["space"])
    equals = [equal for by in COSTS if (equal := at_equal(trials, curves, by))]
    return [
        f'<p class="lead">{html.escape(recommendation(order, budget))}</p>',
        numbers(*_counts(trials, order)),
        f"<p>{html.escape(_how(search))}</p>",
        "<h3>Quality against cost</h3>",
        _frontier(folder, trials, search["metric"]),
        *_equal_sections(equals),
        *_curve_sections(trials, curves),
        *_importance_sections(trials, keys, search["metric"]),
        *_proxy_sections(trials, curves),
        "<h3>Every setting</h3>",
        _settings_table(trials, order, keys),
        "<h3>Not tried</h3>",
        f"<p>{html.escape(_not_tried(trials, search))}</p>",
    ]


def _counts(trials: list[Trial], order: list[Ranked]) -> list[tuple[str, str]]:
    states = [trial["status"] for trial in trials]
    spent = [trial for trial in trials if "flops" in trial]
    counts = [("settings with a result", f"{len(order)}"), ("trials finished", f"{states.count('finished')}")]
    counts += [(f"trials {name}", f"{states.count(name)}") for name in ("stopped", "failed") if name in states]
    seconds = sum(trial.get("seconds", 0.0) for trial in trials)
    return [
        *counts,
        ("TFLOP spent", f"{sum(trial['flops'] for trial in spent) / 1e12:,.2f}"),
        ("time of trials", clock(seconds)),
    ]


def _how(search: dict[str, Any]) -> str:
    """How trials were chosen and made comparable."""
    words = "All trials see the same rows, noise and crop positions, so that differences are less luck. "
    if search["metric"] == HELD_OUT:
        words += "The held-out loss is that of the averaged weights on full-size images. "
    if search["repeats"] > 1:
        words += f"Means of {search['repeats']} seeds with their standard deviation. "
    if search["searcher"] != "grid":
        words += f"Optuna chose the settings ({search['searcher']}). "
    if search["scheduler"]["kind"] != "none":
        words += "Trials that were behind were stopped early (asha). "
    return words + "Trials this short tell which setting starts best, not which ends best."


def _frontier(folder: Path, trials: list[Trial], metric: str) -> str:
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
    folder: Path, trial: Trial, place: tuple[float, float], values: tuple[float, float], on_front: bool, metric: str
) -> str:
    colour = {"finished": COLOURS[0] if on_front else COLOURS[1], "stopped": "#9aa5b1"}[trial["status"]]
    words = [
        f"trial {trial['name']}, {trial['status']}",
        *(f"{key.split('.')[-1]} {value}" for key, value in trial["settings"].items()),
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


def _equal_sections(equals: list[Equal]) -> list[str]:
    """Which setting is ahead at equal FLOPs, updates and counted images, in all and at each noise level."""
    if not equals:
        return []
    sections = ["<h3>At equal cost, counted in three ways</h3>"]
    for equal in equals:
        best = equal.order[0]
        sections.append(
            f"<p>At equal {COSTS[equal.by]} ({equal.cost:,.4g}): <b>{html.escape(best.words())}</b> is ahead, "
            f"{best.value().replace('+-', '±')}; by noise level in the table.</p>"
        )
        sections.append(_equal_table(equal))
    sections.append(
        '<p class="note">Numbers between two measurements of a trial lie on a straight line of their logarithms. Ramps '
        "and averages are those of a trial's own length, so one that could have gone on is judged a little early.</p>"
    )
    curves = _p_curves(equals)
    by_images = next((equal for equal in equals if equal.by == "images_seen"), None)
    words = beside_the_paper(by_images) if by_images else ""
    return [*sections, *curves, *([f"<p>{html.escape(words)}</p>"] if words else [])]


def _equal_table(equal: Equal) -> str:
    sigmas = list(equal.by_sigma(equal.order[0]))
    leads = {sigma: min(equal.order, key=lambda setting: mean(equal.by_sigma(setting)[sigma])) for sigma in sigmas}
    rows = []
    for setting in equal.order:
        cells = [setting.words(), setting.value().replace("+-", "±")]
        for sigma, losses in equal.by_sigma(setting).items():
            spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{mean(losses):.4f}{spread}{' *' if leads[sigma] is setting else ''}")
        rows.append(cells)
    return table(["setting", "held-out loss", *(f"sigma {sigma}" for sigma in sigmas)], rows) + (
        '<p class="note">* least at this noise level.</p>'
    )


def _p_curves(equals: list[Equal]) -> list[str]:
    """The held-out loss by p, as the paper's Figure 2 has FID, at each equal cost."""
    from matplotlib.figure import Figure

    by_p = [(equal, stochastic_by_p(equal)) for equal in equals]
    if any(len(found) < 2 for _, found in by_p):
        return []
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(by_p), squeeze=False)[0]
    for axes, (equal, found) in zip(panels, by_p, strict=True):
        errors = [1.96 * (setting.spread or 0) / len(setting.trials) ** 0.5 for setting in found.values()]
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
    caption = "Held-out loss by p. Bars: 95 % intervals of the mean over seeds, as if normal; none for one seed."
    return [f"<figure>{svg(figure)}<figcaption>{caption}</figcaption></figure>"]


def _curve_sections(trials: list[Trial], curves: dict[str, Curve]) -> list[str]:
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
        axes.plot([line["flops"] / 1e12 for line in curve], [line[HELD_OUT] for line in curve], linewidth=1.3,
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


def _importance_sections(trials: list[Trial], keys: list[str], metric: str) -> list[str]:
    shares = importance(trials, keys, metric)
    if len(shares) < 2:
        return []
    rows = [[key, f"{share:.0%}"] for key, share in shares.items()]
    words = (
        "Share of the variance over finished trials that each key accounts for by itself; the rest is seeds, and keys "
    )
    words += "together."
    return [
        "<h3>Which key mattered</h3>",
        f"<p>{words}</p>",
        table(["key", "share"], rows),
        _parallel(trials, keys, metric),
    ]


def _parallel(trials: list[Trial], keys: list[str], metric: str) -> str:
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
    names = sorted({str(value) for value in values})
    places = {name: number / max(1, len(names) - 1) for number, name in enumerate(names)}
    return [places[str(value)] for value in values], {place: name for name, place in places.items()}


def _proxy_sections(trials: list[Trial], curves: dict[str, Curve]) -> list[str]:
    """Whether the held-out loss, which stops and ranks trials, foretells what is dear to measure."""
    sections = []
    for expensive in ("final_distance", "preview_frechet_distance"):
        found = proxy_correlations(trials, curves, expensive)
        if found:
            rows = [[where, f"{correlation:.2f}", f"{count}"] for where, correlation, count in found]
            title = metric_words(expensive)
            sections.append(f"<p>Rank correlation (Spearman) of the held-out loss with the {title}:</p>")
            sections.append(table(["held-out loss at", "correlation", "trials"], rows, best=False))
    return ["<h3>Can the held-out loss be trusted?</h3>", *sections] if sections else []


def _settings_table(trials: list[Trial], order: list[Ranked], keys: list[str]) -> str:
    metric = order[0].metric
    more = [name for name in ("final_distance", "preview_frechet_distance") if name != metric and name in order[0].best]
    header = [*(key.split(".")[-1] for key in keys), metric_words(metric), *map(metric_words, more), "updates",
              "counted images", "TFLOP", "seconds"]  # fmt: skip
    rows = []
    for found in order:
        cells = [found.value().replace("+-", "±"), *(f"{mean_over(found, name):.4g}" for name in more)]
        cells += [f"{mean_over(found, 'updates'):,.0f}", f"{mean_over(found, 'images_seen'):,.0f}"]
        cells += [f"{mean_over(found, 'flops') / 1e12:.3f}", f"{mean_over(found, 'seconds'):.0f}"]
        rows.append([*_setting_cells(found.settings, keys), *cells])
    for trial in trials:
        if trial["status"] == "stopped":
            told = f"stopped at {trial[metric]:.4f}" if metric in trial else "stopped"
            cells = [told, *("" for _ in more), f"{trial.get('updates', 0):,}", f"{trial.get('images_seen', 0):,}"]
            rows.append([*_setting_cells(trial["settings"], keys), *cells, f"{trial.get('flops', 0) / 1e12:.3f}", ""])
        if trial["status"] == "failed":
            rows.append([*_setting_cells(trial["settings"], keys), f"failed: {trial['error']}"])
    return table(header, rows)


def _setting_cells(settings: dict[str, Any], keys: list[str]) -> list[str]:
    return [str(settings.get(key, "")) for key in keys]  # a key that hangs on others may not be there


def _not_tried(trials: list[Trial], search: dict[str, Any]) -> str:
    """What this search says nothing about."""
    fixed = [words for key, words in KNOBS.items() if not any(name.startswith(key) for name in search["space"])]
    sentences = [f"This search kept fixed: {', '.join(fixed)}."]
    failed = [trial for trial in trials if trial["status"] == "failed"]
    if failed:
        words = "; ".join(dict.fromkeys(setting_words(trial["settings"]) for trial in failed))
        sentences.append(f"Settings without a result, because they failed: {words}.")
    if any(trial["status"] == "stopped" for trial in trials):
        sentences.append("Settings that were stopped early might have caught up.")
    if search["repeats"] == 1:
        sentences.append("No setting was repeated with another seed.")
    sentences.append("Longer budgets, other data and other networks may order settings otherwise.")
    return " ".join(sentences)
