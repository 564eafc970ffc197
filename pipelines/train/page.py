"""The page of a run: its counts, speeds, curves and previews."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from patchloom.models.loss import SIGMA_BINS
from patchloom.pipelines.pages.html import LINE_COLOURS, Number, Picture, render, svg, tidy
from patchloom.platform.files.inside import inner_path
from patchloom.platform.progress import clock
from patchloom.platform.records.run import PROGRESS_FILE, ProgressLine, read_progress

SHOWN_PREVIEWS = 3


def run_section(folder: Path) -> Markup:
    """The body of the page of a run folder. The run may still be training."""
    lines = read_progress(folder)
    if not lines:
        return render("run.html", counts=[])
    previews = [
        _shown_preview(folder, line) for line in _spread([line for line in lines if line.preview], SHOWN_PREVIEWS)
    ]
    return render(
        "run.html",
        counts=_counts(lines[-1]),
        speeds=_speeds(lines),
        curves=_curves(lines),
        has_sigmas=_has_sigmas(lines),
        previews=previews,
    )


def _shown_preview(folder: Path, line: ProgressLine) -> Picture:
    path = inner_path(folder, str(line.preview), folder / PROGRESS_FILE)
    return Picture(path, f"Preview after {line.images_seen:,} counted images.", pixelated=True)


def _counts(last: ProgressLine) -> list[Number]:
    """How far the run is, in every unit of cost."""
    counts = [Number("updates", f"{last.step:,}"), Number("counted images", f"{last.images_seen:,}")]
    if last.flops:  # an autoencoder's run does not count these
        counts += [
            Number("full-size images", f"{last.full_size_images:,}"),
            Number("images-equivalent, by pixels", f"{last.pixel_equivalent_images:,.0f}"),
            Number("TFLOP", f"{last.flops / 1e12:,.1f}"),
            Number("left to go", clock(last.eta_seconds)),
        ]
    return counts


def _speeds(lines: list[ProgressLine]) -> list[Number]:
    """Medians over the progress lines, and the peak memory of worker 0."""
    measured = [line for line in lines if line.straggler_loss is not None]
    speeds = [Number("images/s (median)", f"{median(line.images_per_second for line in lines):,.0f}")]
    if not measured:
        return speeds
    by_size = [line.images_per_second_by_patch_size for line in measured]
    for size in sorted(set().union(*by_size), key=int, reverse=True):
        rate = median(rates[size] for rates in by_size if size in rates)
        speeds.append(Number(f"images/s of {size} x {size}", f"{rate:,.0f}"))
    if compared := [line for line in measured if line.has_utilisation]:
        peak = f"{compared[-1].peak_flops_per_second / 1e12:,.3g} TFLOP/s ({compared[-1].peak_flops_source})"
        share = median(line.model_flops_utilisation for line in compared)
        speeds.append(Number(f"model FLOPs utilisation, of {peak}", f"{share:.1%}"))
    shares = {"straggler_loss": "time lost to the slowest worker", "data_wait_share": "waiting for data"}
    speeds += [Number(name, f"{median(line[key] for line in measured):.1%}") for key, name in shares.items()]
    return [*speeds, Number("peak memory", f"{max(line.peak_memory_bytes for line in measured) / 2**30:,.2f} GiB")]


def _spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _has_sigmas(lines: list[ProgressLine]) -> bool:
    return any(line.loss_by_sigma for line in lines)


def _curves(lines: list[ProgressLine]) -> Markup:
    """Loss over counted images: by patch size with the held-out loss, and by noise level."""
    from matplotlib.figure import Figure

    panels = 2 if _has_sigmas(lines) else 1
    figure = Figure(figsize=(11 if panels == 2 else 9, 3.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_sizes(axes[0], lines)
    if panels == 2:
        names = [name for name in SIGMA_BINS if any(name in line.loss_by_sigma for line in lines)]
        labels = {name: f"sigma {name.replace('-inf', ' and more')}" for name in names}
        _plot(axes[1], lines, "loss_by_sigma", labels)
    for panel in axes:
        panel.set_xlabel("counted images")
        tidy(panel)
    return svg(figure)


def _plot_sizes(axes: Any, lines: list[ProgressLine]) -> None:
    sizes = sorted({size for line in lines for size in line.loss_by_patch_size}, key=int, reverse=True)
    _plot(axes, lines, "loss_by_patch_size", {size: f"{size} x {size}" for size in sizes})
    if not sizes:
        axes.plot([line.images_seen for line in lines], [line.loss for line in lines], color=LINE_COLOURS[0])
    held_out = [(line.images_seen, line.held_out_loss) for line in lines if line.held_out_loss is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", label="held out, full size", color="#1c2430", markersize=4)
    axes.set_ylabel("loss")


def _plot(axes: Any, lines: list[ProgressLine], key: str, labels: dict[str, str]) -> None:
    """One curve for each name in the field `key` of the progress lines."""
    for (name, label), colour in zip(labels.items(), LINE_COLOURS, strict=False):
        points = [(line.images_seen, line[key][name]) for line in lines if name in line[key]]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.4)
