"""The page of a run: its counts, speeds, curves and previews."""

import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from patchloom.errors import UserError
from patchloom.models.loss import SIGMA_BINS
from patchloom.pipelines.pages.html import LINE_COLOURS, Fact, Number, Picture, render, svg, tidy
from patchloom.pipelines.train.resuming import RECIPE_FILE
from patchloom.platform.dataset.prepared import is_dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.inside import inner_path
from patchloom.platform.progress import clock
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.records.run import PROGRESS_FILE, ProgressLine, RunCard, read_progress
from patchloom.redaction import redacted

SHOWN_PREVIEWS, SHOWN_CLASSES = 3, 8


def run_section(folder: Path, command: str = "", name: str = "") -> Markup:
    """The body of the page of a run folder. The run may still be training.

    Args:
        folder: the folder.
        command: the command that does the same as the run; that of its card by default.
        name: how commands name it; by default as the folder.
    """
    lines, about, command = read_progress(folder), _about(folder), command or train_command(folder, name)
    if not lines:
        return render("run.html", about=about, counts=[])
    with_preview = _spread([line for line in lines if line.preview], SHOWN_PREVIEWS)
    previews = [_shown_preview(folder, line, command) for line in with_preview]
    return render(
        "run.html",
        about=about,
        counts=_counts(lines[-1]),
        speeds=_speeds(lines),
        curves=_curves(lines),
        command=command,
        previews=previews,
    )


def train_command(folder: Path, name: str = "") -> str:
    """The command of a run. Where it was not recorded, one that trains its recipe on its dataset.

    What is not known is in capitals. An autoencoder's run without a command has none.
    """
    card = RunCard.read(folder)
    if card.command or card.kind == "autoencoder":
        return " && ".join([card.command, *card.continued])
    name, dataset = name or folder.name, redacted(card.dataset or "DATASET")
    return shlex.join(["patchloom", "train", f"{name}/{RECIPE_FILE}", "--data", dataset, "--out", f"{name}-again"])


def run_title(folder: Path, name: str) -> str:
    """`Training of demo-pixels`: the title of the page of a run folder."""
    if RunCard.read(folder).kind == "autoencoder":
        return f"Training of the autoencoder {name}"
    return f"Training of {load_recipe(folder / RECIPE_FILE).name}"


def _about(folder: Path) -> list[Fact]:
    """What a run is made of: its recipe, data, command, code and MLflow run."""
    card = RunCard.read(folder)
    facts = [] if card.kind == "autoencoder" else [Fact("recipe", _recipe_text(load_recipe(folder / RECIPE_FILE)))]
    if card.dataset is not None:
        facts.append(Fact("dataset", card.dataset, is_code=True))
        facts += [Fact("data", text) for text in _data_texts(card)]
    facts += [Fact("command", command, is_code=True) for command in [card.command, *card.continued] if command]
    commit = f", commit {card.code_commit[:12]}" if card.code_commit else ""
    facts.append(Fact("code", f"patchloom {card.code_version}{commit}"))
    if card.run_id is not None:
        server = redacted(card.tracking_uri or "")
        link = f"{server.rstrip('/')}/#/runs/{card.run_id}" if server.startswith(("http://", "https://")) else ""
        place = f" in {server}" if server else ""
        facts.append(Fact("MLflow run", f"{card.run_id}{place}", is_code=True, link=link))
    return facts


def _recipe_text(recipe: Recipe) -> str:
    patches, train = recipe.patches, recipe.train
    network = recipe.model.backbone or f"{recipe.model.network} of width {recipe.model.width}"
    return (
        f"{recipe.name}: {network}, p = {patches.p:g} ({patches.schedule}), batches of {train.batch_size:,}, "
        f"{train.images:,} counted images, seed {recipe.seed}"
    )


def _data_texts(card: RunCard) -> list[str]:
    """The rows and the largest classes of the dataset of a run, if it is on this machine, whole and unchanged."""
    place = Folder.at(str(card.dataset))
    try:
        if place.is_remote or not is_dataset(place):
            return []
        dataset = open_dataset(place.address)
    except UserError:  # the page of a run needs no dataset
        return []
    if dataset.fingerprint != card.dataset_fingerprint:
        return []
    found = dataset.card
    text = f"{found.rows:,} rows of {found.resolution} x {found.resolution} x {found.channels} {found.kind}"
    if len(found.classes) < 2:
        return [text]
    largest = sorted(found.classes, key=lambda one: -one.rows)
    shown = ", ".join(f"{one.name} {one.rows:,}" for one in largest[:SHOWN_CLASSES])
    more = f" and {len(largest) - SHOWN_CLASSES} more" if len(largest) > SHOWN_CLASSES else ""
    return [f"{text}; {len(found.classes)} classes: {shown}{more}"]


def _shown_preview(folder: Path, line: ProgressLine, command: str) -> Picture:
    path = inner_path(folder, str(line.preview), folder / PROGRESS_FILE)
    return Picture(path, f"Preview after {line.images_seen:,} counted images.", pixelated=True, command=command)


def _counts(last: ProgressLine) -> list[Number]:
    """How far the run is, in every unit of cost."""
    counts = [
        Number("updates", f"{last.step:,}", "Steps of the optimizer."),
        Number("counted images", f"{last.images_seen:,}", "Crops and full-size images of all batches: each is one."),
    ]
    if last.flops:  # an autoencoder's run does not count these
        counts += [
            Number("full-size images", f"{last.full_size_images:,}", "Counted images that were not crops."),
            Number(
                "images by pixels",
                f"{last.pixel_equivalent_images:,.0f}",
                "Pixels of all counted images, divided by those of a full-size image.",
            ),
            Number(
                "TFLOP", f"{last.flops / 1e12:,.1f}", "10^12 floating-point operations of the network, with gradients."
            ),
        ]
    if last.eta_seconds:
        counts.append(Number("left to go", clock(last.eta_seconds)))
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
        meaning = "FLOPs of the network per second, divided by the most that the devices can do."
        speeds.append(Number(f"model FLOPs utilisation, of {peak}", f"{share:.1%}", meaning))
    shares = {
        "straggler_loss": ("time lost to the slowest worker", "Share of the time in which a worker waits for it."),
        "data_wait_share": ("waiting for data", "Share of the time in which the network waited for its next batch."),
    }
    speeds += [
        Number(name, f"{median(line[key] for line in measured):.1%}", meaning)
        for key, (name, meaning) in shares.items()
    ]
    peak_memory = f"{max(line.peak_memory_bytes for line in measured) / 2**30:,.2f} GiB"
    return [*speeds, Number("peak memory", peak_memory, "The most that worker 0 has used.")]


def _spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _curves(lines: list[ProgressLine]) -> list[tuple[Markup, str]]:
    """Plots over counted images, with captions. The held-out loss has its own: it is a mean also if training sums."""
    found = [(_plotted(_plot_sizes, lines, "training loss"), "Training loss by patch size.")]
    if any(line.held_out_loss is not None for line in lines):
        held_out = _plotted(_plot_held_out, lines, "held-out loss")
        found.append((held_out, "Loss of the averaged weights on held-out full-size images."))
    if any(line.loss_by_sigma for line in lines):
        found.append((_plotted(_plot_sigmas, lines, "training loss"), "Training loss by noise level."))
    return found


def _plotted(draw: Callable[[Any, list[ProgressLine]], None], lines: list[ProgressLine], title: str) -> Markup:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    draw(axes, lines)
    axes.set_ylabel(title)
    axes.set_xlabel("counted images")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    tidy(axes)
    return svg(figure)


def _plot_sizes(axes: Any, lines: list[ProgressLine]) -> None:
    sizes = sorted({size for line in lines for size in line.loss_by_patch_size}, key=int, reverse=True)
    _plot(axes, lines, "loss_by_patch_size", {size: f"{size} x {size}" for size in sizes})
    if not sizes:
        axes.plot([line.images_seen for line in lines], [line.loss for line in lines], color=LINE_COLOURS[0])


def _plot_held_out(axes: Any, lines: list[ProgressLine]) -> None:
    points = [(line.images_seen, line.held_out_loss) for line in lines if line.held_out_loss is not None]
    axes.plot(*zip(*points, strict=True), "o-", color=LINE_COLOURS[1], markersize=4, linewidth=1.4)


def _plot_sigmas(axes: Any, lines: list[ProgressLine]) -> None:
    names = [name for name in SIGMA_BINS if any(name in line.loss_by_sigma for line in lines)]
    _plot(axes, lines, "loss_by_sigma", {name: f"sigma {name.replace('-inf', ' and more')}" for name in names})


def _plot(axes: Any, lines: list[ProgressLine], key: str, labels: dict[str, str]) -> None:
    """One curve for each name in the field `key` of the progress lines."""
    for (name, label), colour in zip(labels.items(), itertools.cycle(LINE_COLOURS), strict=False):
        points = [(line.images_seen, line[key][name]) for line in lines if name in line[key]]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.4)
