"""The page of a run: curves, previews, speeds, costs."""

from pathlib import Path
from statistics import median
from typing import Any

from patchloom.models.loss import SIGMA_BINS
from patchloom.pipelines.pages.html import COLOURS, numbers, picture, svg, tidy
from patchloom.platform.progress import clock
from patchloom.platform.records.run import ProgressLine, read_progress


def run_sections(folder: Path) -> list[str]:
    """The page of a run folder, also of one that is still training."""
    lines = read_progress(folder)
    if not lines:
        return ['<p class="note">This run has not written a line yet.</p>']
    sections = [
        numbers(*_counts(lines[-1])),
        numbers(*_speeds(lines)),
        f"<figure>{_curves(lines)}<figcaption>Loss of the trained weights by patch size, and that of the averaged "
        "weights on held-out full-size images; beside it, by noise level.</figcaption></figure>",
    ]
    previews = [line for line in lines if line.preview]
    sections += [
        picture(folder / str(line.preview), f"Preview after {line.images_seen:,} counted images.", pixels=True)
        for line in _spread(previews, 3)
    ]
    return sections


def _counts(last: ProgressLine) -> list[tuple[str, str]]:
    """What a run has done by its last line, counted in every way there is."""
    counts = [("updates", f"{last.step:,}"), ("counted images", f"{last.images_seen:,}")]
    if last.flops:  # else the run is an autoencoder's
        counts += [
            ("full-size images", f"{last.full_size_images:,}"),
            ("images-equivalent, by pixels", f"{last.pixel_equivalent_images:,.0f}"),
            ("TFLOP", f"{last.flops / 1e12:,.1f}"),
            ("left to go", clock(last.eta_seconds)),
        ]
    return counts


def _speeds(lines: list[ProgressLine]) -> list[tuple[str, str]]:
    """How fast a run went: medians of its lines, and the most memory of worker 0."""
    told = [line for line in lines if line.straggler_loss is not None]
    speeds = [("images/s (median)", f"{median(line.images_per_second for line in lines):,.0f}")]
    if not told:
        return speeds
    by_size = [line.images_per_second_by_patch_size for line in told]
    for size in sorted(set().union(*by_size), key=int, reverse=True):
        speeds.append((f"images/s of {size} x {size}", f"{median(r[size] for r in by_size if size in r):,.0f}"))
    peak, source = told[-1].peak_flops_per_second, told[-1].peak_flops_source
    of_peak = f"model FLOPs utilisation, of {peak / 1e12:,.3g} TFLOP/s ({source})"
    for key, name in (
        ("model_flops_utilisation", of_peak),
        ("straggler_loss", "straggler loss"),
        ("data_wait_share", "waiting for data"),
    ):
        speeds.append((name, f"{median(line[key] for line in told):.1%}"))
    return [*speeds, ("peak memory", f"{max(line.peak_memory_bytes for line in told) / 2**30:,.2f} GiB")]


def _spread(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _curves(lines: list[ProgressLine]) -> str:
    """Loss over counted images as inline SVG: by patch size with the held-out loss, and by noise level."""
    from matplotlib.figure import Figure

    by_sigma = any(line.loss_by_sigma for line in lines)
    figure = Figure(figsize=(11 if by_sigma else 9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2 if by_sigma else 1, sharey=False, squeeze=False)[0]
    sizes = sorted({size for line in lines for size in line.loss_by_patch_size}, key=int, reverse=True)
    _plot(panels[0], lines, "loss_by_patch_size", {size: f"{size} x {size}" for size in sizes})
    if not sizes:
        panels[0].plot([line.images_seen for line in lines], [line.loss for line in lines], color=COLOURS[0])
    held_out = [(line.images_seen, line.held_out_loss) for line in lines if line.held_out_loss is not None]
    if held_out:
        panels[0].plot(*zip(*held_out, strict=True), "o--", label="held out, full size", color="#1c2430", markersize=4)
    panels[0].set_ylabel("loss")
    if by_sigma:
        names = [name for name in SIGMA_BINS if any(name in line.loss_by_sigma for line in lines)]
        labels = {name: f"sigma {name.replace('-inf', ' and more')}" for name in names}
        _plot(panels[1], lines, "loss_by_sigma", labels)
    for axes in panels:
        axes.set_xlabel("counted images")
        tidy(axes)
    return svg(figure)


def _plot(axes: Any, lines: list[ProgressLine], key: str, labels: dict[str, str]) -> None:
    """One curve a name of the dictionary under `key`."""
    for (name, label), colour in zip(labels.items(), COLOURS, strict=False):
        points = [(line.images_seen, line[key][name]) for line in lines if name in line[key]]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.4)
