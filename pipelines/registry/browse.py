"""Browse: what the registry holds, one version's card, two of them side by side; promoting and deleting them."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from patchloom.errors import UserError
from patchloom.models.checkpoints import load_whole_model, verified_card
from patchloom.models.generate import Sampling, default_labels, generate_padded
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.registry.quality import TITLES, Evaluation, comparable, differences, evaluations_of, is_better
from patchloom.platform.files.storage import local_path, make_folder
from patchloom.platform.progress import progress, say
from patchloom.platform.tracking.registry import (
    FetchedModel,
    delete_version,
    fetch_model,
    fetch_preview,
    find_version,
    list_versions,
    promote,
)
from patchloom.platform.tracking.runs import flat_parameters, tracking_uri

HEADER = ("MODEL", "ALIASES", "KIND", "SIDE", "P", "SCHEDULE", "IMAGES", "QUALITY", "AGE")
COMPUTE_BATCH = 8  # that of `patchloom sample`, so that a seed's picture is the same


def models_table() -> str:
    """Every registered version: aliases, kind, resolution, p, images seen, quality and age."""
    rows = list_versions()
    if not rows:
        return f"no model is registered at {tracking_uri()}"
    lines = [HEADER, *(_line(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    tags, age = row["tags"], _age(time.time() - row["created_unix_s"])
    images = f"{int(tags['images_seen']):,}" if "images_seen" in tags else ""
    return (
        f"{row['name']}/{row['version']}", ",".join(row["aliases"]), tags.get("kind", ""), tags.get("resolution", ""),
        tags.get("p", ""), tags.get("schedule", ""), images, quality_of(tags), age,
    )  # fmt: skip


def quality_of(tags: dict[str, str]) -> str:
    """The best-founded number that a version has: its evaluation on most samples, else what training told."""
    evaluations = evaluations_of(tags)
    if evaluations:
        return evaluations[0].words()
    if "psnr_db" in tags:
        return f"PSNR {float(tags['psnr_db']):.1f} dB"
    return f"held-out loss {tags['held_out_loss']}" if "held_out_loss" in tags else ""


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def model_card(reference: str) -> dict[str, Any]:
    """One model, verified: its card, recipe, where it came from, its evaluations, and how to sample from it.

    reference: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder. Raises UserError for one that is not
    there, and CheckpointError where its weights do not match their checksum.
    """
    fetched = fetch_model(reference)
    card = verified_card(fetched.folder)
    row = _row(fetched)
    tags = row.get("tags", {})
    return {
        "reference": fetched.reference,
        "aliases": row.get("aliases", []),
        "lineage": {
            "run": fetched.run_id,
            "dataset_fingerprint": tags.get("dataset_fingerprint"),
            "recipe_sha256": tags.get("recipe_sha256"),
            "code_version": card["code_version"],
            "weights_sha256": card["weights_sha256"],
            "autoencoder_sha256": card.get("autoencoder", {}).get("weights_sha256"),
        },
        "kind": card["space"]["kind"],
        "resolution": card["denoiser"]["resolution"],
        "network": card["denoiser"]["network"],
        "images_seen": card.get("images_seen"),
        "held_out_loss": tags.get("held_out_loss"),
        "class_names": card["class_names"],
        "evaluations": [asdict(found) | {"digest": found.digest} for found in evaluations_of(tags)],
        "recipe": _recipe(fetched),
        "folder": str(fetched.folder),
        "sample": f"patchloom sample {fetched.reference} samples --seeds 0-63",
    }


def _row(fetched: FetchedModel) -> dict[str, Any]:
    """What the registry says of a fetched version; nothing for a folder."""
    rows = list_versions(fetched.name) if fetched.name else []
    return next((row for row in rows if row["version"] == fetched.version), {})


def _recipe(fetched: FetchedModel) -> dict[str, Any]:
    path = fetched.folder / "recipe.yaml"
    return dict(yaml.safe_load(path.read_text())) if path.is_file() else {}


def show_model(reference: str, picture: str | None = None) -> str:
    """The card of a model in words; its preview grid goes to the file `picture`, if one is named."""
    card = model_card(reference)
    lines = [f"{card['reference']}" + (f"  ({', '.join(card['aliases'])})" if card["aliases"] else "")]
    lines += [f"  {name}: {card[name]}" for name in ("kind", "resolution", "network", "images_seen", "held_out_loss")
              if card[name] is not None]  # fmt: skip
    lines += [f"  classes: {', '.join(card['class_names']) or 'none'}"]
    lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in card["lineage"].items() if value]
    for found in evaluations_of(_row(fetch_model(reference)).get("tags", {})):
        lines += [f"  evaluation {found.digest}: {found.numbers()}", f"    {found.circumstances()}"]
    if picture is not None:
        place = fetch_preview(fetch_model(reference), local_path(picture))
        lines += [f"  preview: {place}" if place else "  preview: none was kept"]
    return "\n".join([*lines, f"  folder: {card['folder']}", f"  sample from it: {card['sample']}"])


def compare_models(
    one: str, other: str, *, picture: str | None = "comparison.png", seeds: int = 8, steps: int = 18
) -> dict[str, Any]:
    """What two models differ in: recipe keys, metrics of equal circumstances, and samples of the same seeds.

    picture: a file for the samples (seeds 0 ... seeds - 1, one model a row), None to sample nothing. Metrics stand side
    by side only where they depend on the same things; else `not_comparable` says in what they differ. Raises
    UserError for models of other sizes, where a picture is asked for.
    """
    fetched = [fetch_model(reference) for reference in (one, other)]
    recipes = [flat_parameters(_recipe(found)) for found in fetched]
    results = [evaluations_of(_row(found).get("tags", {})) for found in fetched]
    pairs = comparable(results[0], results[1])
    return {
        "models": [found.reference for found in fetched],
        "recipe": {
            key: [recipe.get(key) for recipe in recipes]
            for key in dict.fromkeys([*recipes[0], *recipes[1]])
            if recipes[0].get(key) != recipes[1].get(key)
        },
        "metrics": [
            {"digest": mine.digest, "circumstances": mine.circumstances(),
             **{name: [mine.metrics[name], theirs.metrics[name]] for name in TITLES
                if name in mine.metrics and name in theirs.metrics}}
            for mine, theirs in pairs
        ],
        "not_comparable": [] if pairs else _why_not(results[0], results[1]),
        "picture": _same_seeds(fetched, local_path(picture), seeds, steps) if picture else None,
    }  # fmt: skip


def _why_not(mine: list[Evaluation], theirs: list[Evaluation]) -> list[str]:
    if not mine or not theirs:
        lacks = "one of them has no" if mine or theirs else "neither has an"
        return [f"{lacks} evaluation: run `patchloom evaluate` on samples of each"]
    return min((differences(a, b) for a in mine for b in theirs), key=len)


def _same_seeds(fetched: list[FetchedModel], place: Path, seeds: int, steps: int) -> str:
    """Samples of the same seeds, one model a row."""
    rows: list[np.ndarray] = []
    numbers = list(range(seeds))
    make_folder(place.parent)
    with progress("sampling both", 2 * seeds, "images") as meter:
        for found in fetched:
            model = load_whole_model(found.folder)
            labels = default_labels(numbers, model.denoiser.classes)
            rows.append(generate_padded(model, numbers, labels, COMPUTE_BATCH, Sampling(steps=steps)).numpy())
            meter.update(meter.done + seeds)
    if rows[0].shape != rows[1].shape:
        sizes = " and ".join(f"{row.shape[-1]}x{row.shape[-2]}" for row in rows)
        raise UserError(f"the models make images of {sizes}, which do not stand in one picture: give --no-picture")
    save_png(side_by_side(rows, scale=1 if rows[0].shape[-1] >= 64 else 2), place)
    return str(place)


def comparison_words(found: dict[str, Any]) -> str:
    """A comparison as lines."""
    lines = [f"{'':24} {found['models'][0]:<28} {found['models'][1]}"]
    for key, (mine, theirs) in found["recipe"].items():
        lines.append(f"  {key:<22} {mine!s:<28} {theirs!s}")
    if not found["recipe"]:
        lines.append("  the recipes are the same")
    for result in found["metrics"]:
        lines.append(f"  evaluation {result['digest']}: {result['circumstances']}")
        for name, (title, _) in TITLES.items():
            if name in result:
                mine, theirs = (f"{value:.4f}" for value in result[name])
                lines.append(f"  {title:<22} {mine:<28} {theirs}")
    if found["not_comparable"]:
        lines.append(f"  their metrics cannot be compared: {'; '.join(found['not_comparable'])}")
    if found["picture"]:
        lines.append(f"  the same seeds, one model a row: {found['picture']}")
    return "\n".join(lines)


def promote_model(name: str, version: str, alias: str = "champion", if_better: str | None = None) -> str:
    """Point an alias at a version; returns what was done, in words.

    if_better: a metric (`fid`, `kid`, ...) in which the version must beat the one that the alias points at, on results
    that may be compared. Raises UserError where it does not, or where they cannot be compared, and says in
    what they differ; the alias stays where it was.
    """
    rows = {row["version"]: row for row in list_versions(name)}
    find_version(name, version=version)
    holder = next((row for row in rows.values() if alias in row["aliases"]), None)
    words = f"models:/{name}@{alias} is version {version}"
    if holder is not None and holder["version"] == version:
        return f"{words} already"
    if if_better is not None and holder is not None:
        words += f" ({_improvement(rows[version], holder, if_better)})"
    promote(name, version, alias)
    return words


def _improvement(new: dict[str, Any], old: dict[str, Any], metric: str) -> str:
    """What the new version gains on the old one; raises UserError where that is nothing or cannot be told."""
    is_better(metric, 0.0, 0.0)  # an unknown metric is said before anything else
    mine, theirs = evaluations_of(new["tags"]), evaluations_of(old["tags"])
    versions = f"versions {new['version']} and {old['version']} of {new['name']}"
    pairs = comparable(mine, theirs, metric)
    if not pairs:
        with_it = [[found for found in side if metric in found.metrics] for side in (mine, theirs)]
        raise UserError(f"{versions} cannot be compared by {metric}: {'; '.join(_why_not(*with_it))}")
    ours, old_ones = (found.metrics[metric] for found in pairs[0])
    numbers = f"{TITLES[metric][0]} {ours:.6g} against {old_ones:.6g}"
    if not is_better(metric, ours, old_ones):
        raise UserError(
            f"version {new['version']} is not better than version {old['version']}: {numbers}; not promoted"
        )
    return numbers


def delete_model(name: str, version: str, yes: bool = False) -> str:
    """Delete a version after a question; returns what was done. Its run, and the samples made of it, stay.

    Raises UserError without `yes` where nobody can be asked, and for a version that is not there.
    """
    find_version(name, version=version)
    aliases = next(row["aliases"] for row in list_versions(name) if row["version"] == version)
    held = f", which {' and '.join(f'@{alias}' for alias in aliases)} points at" if aliases else ""
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"models:/{name}/{version}{held} would be deleted, and nobody can be asked: give --yes")
        say(f"Delete models:/{name}/{version}{held}? [y/N] ")
        if input().strip().lower() not in ("y", "yes"):
            return "nothing was deleted"
    delete_version(name, version)
    return f"deleted models:/{name}/{version}"
