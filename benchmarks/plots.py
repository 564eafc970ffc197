"""Plots of a result file, and of scaling to 1,024 GPUs.

python -m patchloom.benchmarks.plots RESULTS.json        # writes SVG files next to it
python -m patchloom.benchmarks.plots scaling FOLDER
"""

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from patchloom.benchmarks.findings import EXTRAPOLATED, Finding
from patchloom.benchmarks.result_file import PlotData, read_plot_data

COLOURS = ("#b3541e", "#2f6690", "#81a4cd", "#7a9e7e", "#9b7ede")  # the colours of the report pages
# what each plot of bars shows: the numbers with this unit, or one that starts with it
PLOTTED_UNITS = {"rates": "images/s", "ratios": "x", "flops": "% of the peak", "launches": "kernels"}
WIDTH_IN, GROWTH_WIDTH_IN, ROW_IN, LABEL_CHARACTERS = 8.0, 11.0, 0.34, 60  # a row has room for two lines


def plot_results(path: Path) -> list[Path]:
    """Draw the numbers and quality curves of a result file. Returns the SVG files, which are next to it."""
    results = read_plot_data(path)
    plots = []
    for kind, unit in PLOTTED_UNITS.items():
        rows = [
            (name, found) for name, each in results.findings.items() for found in each if found.unit.startswith(unit)
        ]
        if rows:
            plots.append(_plot_bars(path.with_name(f"{path.stem}-{kind}.svg"), rows, results.title))
    growing = [
        found for each in results.findings.values() for found in each if found.rows is not None and found.is_cost
    ]
    if growing:
        plots.append(_plot_growth(path.with_name(f"{path.stem}-growth.svg"), growing, results.title))
    if results.curves:
        plots.append(_plot_curves(path.with_name(f"{path.stem}-quality.svg"), results))
    return plots


def _plot_bars(path: Path, rows: list[tuple[str, Finding]], title: str) -> Path:
    """One bar per number; a line for the middle half, a tick for the limit and a dotted tick for the target."""
    figure, axes = plt.subplots(figsize=(WIDTH_IN, 1.2 + ROW_IN * len(rows)), layout="constrained")
    names = list(dict.fromkeys(name for name, _ in rows))
    for y, (name, found) in enumerate(rows):
        spread = found.measured
        axes.barh(y, spread.median, color=COLOURS[names.index(name) % len(COLOURS)], height=0.6)
        axes.plot([spread.low, spread.high], [y, y], color="black", linewidth=1.5)
        axes.annotate(f" {spread.median:.3g}", (max(spread.median, spread.high), y), va="center", size=8)
        for value, style in ((found.limit, "-"), (found.wanted, ":")):
            if value is not None and value < 40 * spread.median:
                axes.plot([value] * 2, [y - 0.4, y + 0.4], color="black", linestyle=style)
    labels = [textwrap.fill(_label(found), LABEL_CHARACTERS) for _, found in rows]
    axes.set_yticks(range(len(rows)), labels, size=8)
    axes.invert_yaxis()
    unit = rows[0][1].unit
    if unit in ("images/s", "kernels"):
        axes.set_xscale("log")
    axes.set_xlabel(f"{unit}  (| limit, \u22ee target)")
    _finish(figure, axes, title)
    return _save(figure, path)


def _label(found: Finding) -> str:
    """The name of a number, with the rest of its unit, such as "per update"."""
    name = found.what.strip()
    return f"{name}, {found.unit[2:]}" if found.unit.startswith("x ") else name


def _plot_growth(path: Path, costs: list[Finding], title: str) -> Path:
    """Costs by the rows of the dataset, a plot for each unit: dotted if extrapolated; targets are dashed."""
    units = list(dict.fromkeys(found.unit for found in costs))
    figure, panels = plt.subplots(
        len(units), figsize=(GROWTH_WIDTH_IN, 3.2 * len(units)), layout="constrained", sharex=True, squeeze=False
    )
    for axes, unit in zip(panels[:, 0], units, strict=True):
        of_unit = [found for found in costs if found.unit == unit]
        names = list(dict.fromkeys(found.what.removesuffix(EXTRAPOLATED) for found in of_unit))
        for number, name in enumerate(names):
            colour = COLOURS[number % len(COLOURS)]
            measured = [found for found in of_unit if found.what == name]
            ends = [measured[-1], *(found for found in of_unit if found.what == name + EXTRAPOLATED)]
            marker = "o-" if number < len(COLOURS) else "s-"
            axes.plot(*_by_rows(measured), marker, color=colour, label=name, markersize=4)
            axes.plot(*_by_rows(ends), ":", color=colour)
        for wanted in {found.wanted for found in of_unit if found.wanted is not None}:
            axes.axhline(wanted, linestyle="--", color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        _finish(figure, axes, title if axes is panels[0, 0] else "")
    panels[-1, 0].set_xlabel("rows of the dataset (dotted: extrapolated, dashed: target)")
    return _save(figure, path)


def _by_rows(costs: list[Finding]) -> tuple[list[int], list[float]]:
    return [found.rows or 0 for found in costs], [found.measured.median for found in costs]


def _plot_curves(path: Path, results: PlotData) -> Path:
    """The Fréchet distance over the seconds of training."""
    figure, axes = plt.subplots(figsize=(WIDTH_IN, 4), layout="constrained")
    for number, (name, curve) in enumerate(results.curves.items()):
        seconds = [point.seconds for point in curve]
        axes.plot(seconds, [point.distance for point in curve], "o-", color=COLOURS[number], label=name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("Fréchet distance of samples")
    axes.legend(frameon=False)
    _finish(figure, axes, f"quality at equal time, {results.title}")
    return _save(figure, path)


def plot_scaling(folder: Path) -> Path:
    """Counted images per second on 1 to 1,024 GPUs, for a batch that grows with them and for the paper's batch."""
    from patchloom.benchmarks.scaling import GPU_BATCH, GPUS, PAPER_BATCH, SETTINGS, StepCosts

    costs = StepCosts()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for number, setting in enumerate(SETTINGS):
        rates = [costs.rate(setting, gpus, GPU_BATCH) for gpus in GPUS]
        left.loglog(GPUS, rates, "o-", color=COLOURS[number], label=setting.name, markersize=4)
        left.loglog(GPUS, [rates[0] * gpus for gpus in GPUS], ":", color=COLOURS[number], linewidth=1)
        rates = [costs.rate(setting, gpus, PAPER_BATCH // gpus) for gpus in GPUS]
        right.loglog(GPUS, rates, "o-", color=COLOURS[number], label=setting.name, markersize=4)
    for axes, title in ((left, f"{GPU_BATCH} images per GPU (dotted: without communication)"),
                        (right, f"a batch of {PAPER_BATCH:,} in all")):  # fmt: skip
        axes.set_xlabel("GPUs (H100)")
        axes.set_xticks(GPUS[::2], [f"{gpus:,}" for gpus in GPUS[::2]])
        axes.minorticks_off()
        _finish(figure, axes, title)
    left.set_ylabel("counted images per second")
    left.legend(frameon=False)
    return _save(figure, folder / "scaling.svg")


def _finish(figure: Any, axes: Any, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, size=10, loc="left")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "patchloom"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main() -> int:
    """Draw the plots that the arguments name. Returns the exit code."""
    if sys.argv[1:2] == ["scaling"] and len(sys.argv) == 3:
        print(plot_scaling(Path(sys.argv[2])))
    elif len(sys.argv) == 2 and Path(sys.argv[1]).is_file():
        print(*plot_results(Path(sys.argv[1])), sep="\n")
    else:
        print("patchloom: give a result file, or `scaling FOLDER`", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
