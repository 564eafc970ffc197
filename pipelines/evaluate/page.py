"""Evaluation page: samples, how near they come to a reference, and all that these numbers depend on."""

import html
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.pipelines.pages.html import numbers, picture, table
from patchloom.pipelines.registry.quality import TITLES
from patchloom.platform.files.storage import read_json


def samples_sections(folder: Path) -> list[str]:
    """The page of a sample folder, with its metrics where they were measured."""
    sampling = read_json(folder / "sampling.json")
    model = sampling["model"]["reference"]
    sections = [
        f'<p class="lead">Samples of <code>{html.escape(model)}</code>.</p>',
        picture(folder / "contact_sheet.png", sampling_words(sampling)),
    ]
    if (folder / "metrics.json").is_file():
        return [*sections, "<h2>The numbers</h2>", *metric_sections(folder / "metrics.json")]
    return [*sections, "<p>Not measured yet: <code>patchloom evaluate</code> does it.</p>"]


def sampling_words(sampling: dict[str, Any]) -> str:
    """How samples were made, in a sentence."""
    return (
        f"{sampling['sampler']}, {sampling['steps']} steps ({sampling['network_evaluations']} network evaluations), "
        f"guidance {sampling['guidance']:g}."
    )


def metric_sections(path: Path) -> list[str]:
    """The numbers of a `metrics.json`, what must be known of them, their pictures, and what they depend on."""
    result = read_json(path)
    if "identity" not in result:
        raise UserError(f"{path} was written by another version: run `patchloom evaluate` again")
    metrics, identity = result["metrics"], result["identity"]
    shown = [(TITLES[name][0], f"{metrics[name]:.4g}") for name in TITLES if name in metrics]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result["notes"])
    return [
        numbers(*shown),
        f"<ul>{notes}</ul>" if notes else "",
        picture(
            path.with_name(f"{path.stem}.nearest.png"),
            "Above, the samples that come nearest to a reference image; below, that image. Equal pairs are copies.",
            pixels=True,
        ),
        picture(
            path.with_name(f"{path.stem}.density.png"),
            "Above, samples where reference images lie densest; below, where they lie thinnest.",
            pixels=True,
        ),
        "<p>Numbers may be compared where all of this is equal:</p>",
        table(["what", "value"], _rows(identity), best=False),
    ]


def first_number(path: Path) -> tuple[str, str]:
    """The name and the value of the first metric, for the head of a page."""
    metrics = read_json(path)["metrics"]
    name = next(name for name in TITLES if name in metrics)
    return f"{TITLES[name][0]}*", f"{metrics[name]:.3f}"


def _rows(identity: dict[str, Any]) -> list[list[str]]:
    """What results depend on, options that were not used left out."""
    return [[key.replace("_", " "), _short(value)] for key, value in identity.items() if value is not None]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    return str(value) if len(str(value)) <= 90 else f"{str(value)[:60]}..."
