"""The page of samples: the images, their metrics, and everything that the metrics depend on."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import JsonValue

from patchloom.models.features import INCEPTION
from patchloom.models.metrics import COLOUR_LAYOUT
from patchloom.pipelines.evaluate.features import COLOUR_FEATURES
from patchloom.pipelines.evaluate.results import seed_ranges
from patchloom.pipelines.pages.html import Number, Picture, Table, render
from patchloom.pipelines.registry.quality import TITLES
from patchloom.pipelines.sample.folder import read_entries
from patchloom.pipelines.sample.options import SampleOptions
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.evaluation import EvaluationIdentity, EvaluationResult
from patchloom.platform.records.record import Record
from patchloom.platform.records.samples import SamplingCard

METRICS_FILE = "metrics.json"
REFERENCE = ("--reference", "REFERENCE")  # in commands whose reference is not known
DEFAULTS = {declared.name: declared.default for declared in fields(SampleOptions)}
CELL_CHARACTERS = 90


def samples_section(folder: Path, name: str = "") -> Markup:
    """The body of the page of a sample folder, with its metrics if it was measured.

    Args:
        folder: the folder, or a local copy of it.
        name: how commands name it; by default as the folder.
    """
    card, name = SamplingCard.from_file(folder / "sampling.json"), name or folder.name
    measured, command = folder / METRICS_FILE, sample_command(card, folder, name)
    return render(
        "samples.html",
        model=card["model"]["reference"],
        sheet=Picture(folder / "contact_sheet.png", f"{sampling_text(card)}.", command=command),
        metrics=metrics_section(measured, name=name) if measured.is_file() else None,
        command="" if measured.is_file() else shlex.join(["patchloom", "evaluate", name, *REFERENCE]),
    )


def sample_command(card: SamplingCard, folder: Path, name: str) -> str:
    """The command that makes the samples of a folder again, elsewhere. Files that are not known are in capitals."""
    options = {key: value for key, value in (card.model_extra or {}).items() if value != DEFAULTS.get(key, value)}
    known = {
        "label": card.label if card.labels == "fixed" else None,
        "labels": "LABELS" if card.labels == "file" else None,
        "conditions": "CONDITIONS" if card.conditions else None,
        "outpaint": "IMAGE" if card.outpaint else None,
        "inpaint": "IMAGE" if card.inpaint else None,
        "mask": "MASK" if card.inpaint else None,
        "outpaint_method": kept.method if (kept := card.outpaint or card.inpaint) else None,
        "format": card.format if card.format != DEFAULTS["format"] else None,
        "shard_size": card.shard_size,
        "batch": card.batch,
    }
    words = ["patchloom", "sample", card.model.reference, f"{name}-again"]
    words += ["--seeds", seed_ranges(entry.seed for entry in read_entries(Folder.at(folder)))]
    for option, value in {**options, **known}.items():
        if value is not None:
            words.append(f"--{option.replace('_', '-')}={_option_text(option, value)}")
    return shlex.join(words)


def _option_text(name: str, value: Any) -> str:
    """The value of an option as the command line takes it: a size as 96x128, noise levels as 0.3-5."""
    return ("x" if name == "size" else "-").join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def evaluate_command(result: EvaluationResult, samples: str) -> str:
    """The command of an evaluation. Where it was not recorded, what is not known of it is in capitals."""
    if result.command.startswith("patchloom evaluate "):
        return result.command
    features = {COLOUR_LAYOUT: COLOUR_FEATURES, INCEPTION: INCEPTION}.get(result.identity.features, "FEATURES")
    return shlex.join(["patchloom", "evaluate", samples, *REFERENCE, "--features", features])


def sampling_text(options: Record) -> str:
    """How samples were made: `heun, 18 steps (35 network evaluations), guidance 1.3`."""
    steps = f"{options['steps']} steps ({options['network_evaluations']} network evaluations)"
    precision = options.get("precision", "fp32")
    half = f", {precision}" if precision != "fp32" else ""
    return f"{options['sampler']}, {steps}, guidance {options['guidance']:g}{half}"


def metrics_section(path: Path, command: str = "", name: str = "") -> Markup:
    """The metrics in a `metrics.json`, with their notes and pictures and what they depend on.

    Args:
        path: the file.
        command: the command that measures the same; that of the file by default.
        name: how commands name the samples; by default as the folder of the file.
    """
    result = EvaluationResult.read(path)
    command = command or evaluate_command(result, name or path.parent.name)
    shown = [_metric(name, f"{result.metrics[name]:.4g}") for name in TITLES if name in result.metrics]
    nearest = "Top: the samples nearest to a reference image. Bottom: that reference image. Equal pairs are copies."
    density = "Top: samples where reference images are densest. Bottom: samples where they are sparsest."
    pictures = [
        Picture(path.with_name(f"{path.stem}.nearest.png"), nearest, pixelated=True, command=command),
        Picture(path.with_name(f"{path.stem}.density.png"), density, pixelated=True, command=command),
    ]
    return render(
        "metrics.html", metrics=shown, notes=result.notes, pictures=pictures, command=command,
        identity=_identity_table(result.identity),
    )  # fmt: skip


def first_metric(path: Path) -> Number:
    """The first metric in a `metrics.json`, for the top of a page."""
    metrics = EvaluationResult.read(path).metrics
    name = next(name for name in TITLES if name in metrics)
    return _metric(name, f"{metrics[name]:.3f}")


def _metric(name: str, value: str) -> Number:
    title, is_higher_better = TITLES[name]
    return Number(f"{title} ({'higher' if is_higher_better else 'lower'} is better)", value)


def _identity_table(identity: EvaluationIdentity) -> Table:
    """What the metrics depend on, without options that were not used."""
    rows = [[key.replace("_", " "), _cell(value)] for key, value in identity.to_dict().items() if value is not None]
    return Table(["", "value"], rows)


def _cell(value: JsonValue) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    text = str(value)
    return text if len(text) <= CELL_CHARACTERS else f"{text[: CELL_CHARACTERS - 3]}..."
