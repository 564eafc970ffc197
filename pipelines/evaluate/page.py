"""The page of samples: the images, their metrics, and everything that the metrics depend on."""

from pathlib import Path

from markupsafe import Markup
from pydantic import JsonValue

from patchloom.pipelines.pages.html import Number, Picture, Table, render
from patchloom.pipelines.registry.quality import TITLES
from patchloom.platform.records.evaluation import EvaluationIdentity, EvaluationResult
from patchloom.platform.records.record import Record
from patchloom.platform.records.samples import SamplingCard

METRICS_FILE = "metrics.json"
CELL_CHARACTERS = 90


def samples_section(folder: Path) -> Markup:
    """The body of the page of a sample folder, with its metrics if it was measured."""
    card = SamplingCard.from_file(folder / "sampling.json")
    measured = folder / METRICS_FILE
    return render(
        "samples.html",
        model=card["model"]["reference"],
        sheet=Picture(folder / "contact_sheet.png", f"{sampling_text(card)}."),
        metrics=metrics_section(measured) if measured.is_file() else None,
    )


def sampling_text(options: Record) -> str:
    """How samples were made: `heun, 18 steps (35 network evaluations), guidance 1.3`."""
    steps = f"{options['steps']} steps ({options['network_evaluations']} network evaluations)"
    precision = options.get("precision", "fp32")
    half = f", {precision}" if precision != "fp32" else ""
    return f"{options['sampler']}, {steps}, guidance {options['guidance']:g}{half}"


def metrics_section(path: Path) -> Markup:
    """The metrics in a `metrics.json`, with their notes and pictures and what they depend on."""
    result = EvaluationResult.read(path)
    shown = [Number(TITLES[name][0], f"{result.metrics[name]:.4g}") for name in TITLES if name in result.metrics]
    nearest = "Top: the samples nearest to a reference image. Bottom: that reference image. Equal pairs are copies."
    density = "Top: samples where reference images are densest. Bottom: samples where they are sparsest."
    pictures = [
        Picture(path.with_name(f"{path.stem}.nearest.png"), nearest, pixelated=True),
        Picture(path.with_name(f"{path.stem}.density.png"), density, pixelated=True),
    ]
    return render(
        "metrics.html", metrics=shown, notes=result.notes, pictures=pictures, identity=_identity_table(result.identity)
    )


def first_metric(path: Path) -> Number:
    """The first metric in a `metrics.json`, for the top of a page."""
    metrics = EvaluationResult.read(path).metrics
    name = next(name for name in TITLES if name in metrics)
    return Number(TITLES[name][0], f"{metrics[name]:.3f}")


def _identity_table(identity: EvaluationIdentity) -> Table:
    """What the metrics depend on, without options that were not used."""
    rows = [[key.replace("_", " "), _cell(value)] for key, value in identity.to_dict().items() if value is not None]
    return Table(["", "value"], rows)


def _cell(value: JsonValue) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    text = str(value)
    return text if len(text) <= CELL_CHARACTERS else f"{text[: CELL_CHARACTERS - 3]}..."
