"""Comparing: how two models differ in recipe, metrics, and samples of the same seeds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import load_sampling_model, verified_card
from patchloom.models.generate import Sampling, default_labels, generate_padded
from patchloom.pipelines.pages.pictures import is_own_picture, save_png, side_by_side
from patchloom.pipelines.registry.describing import recipe_of, version_of
from patchloom.pipelines.registry.quality import TITLES, Evaluation, comparable, differences, evaluations_of
from patchloom.pipelines.sample.options import DEFAULT_BATCH
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_new_file
from patchloom.platform.files.storage import local_path, make_folder
from patchloom.platform.progress import progress
from patchloom.platform.recipe.run_recipe import Recipe
from patchloom.platform.records.record import flat_values
from patchloom.platform.tracking.registry import FetchedModel, fetch_model


@dataclass(frozen=True)
class ComparedMetrics:
    """Metrics of two models that were measured in the same way: each metric's value for both models."""

    digest: str
    circumstances: str
    values: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ModelComparison:
    """How two models differ; `not_comparable` says why there are no metrics."""

    models: tuple[str, str]
    recipe: dict[str, tuple[Any, ...]]  # only keys with different values, and what the models make if that differs
    metrics: list[ComparedMetrics]
    not_comparable: list[str]
    picture: str | None

    def to_json(self) -> str:
        """What `models compare --json` prints."""
        metrics = [
            {"digest": found.digest, "circumstances": found.circumstances, **found.values} for found in self.metrics
        ]
        return json.dumps(vars(self) | {"metrics": metrics})

    def text(self) -> str:
        """The comparison as lines, one column for each model."""
        lines = [f"{'':24} {self.models[0]:<28} {self.models[1]}"]
        lines += [f"  {key:<22} {first!s:<28} {second!s}" for key, (first, second) in self.recipe.items()]
        if not self.recipe:
            lines.append("  the recipes are the same")
        for found in self.metrics:
            lines.append(f"  evaluation {found.digest}: {found.circumstances}")
            lines += [
                f"  {TITLES[name][0]:<22} {f'{first:.4f}':<28} {second:.4f}"
                for name, (first, second) in found.values.items()
            ]
        if self.not_comparable:
            lines.append(f"  the metrics cannot be compared: {'; '.join(self.not_comparable)}")
        if self.picture:
            lines.append(f"  samples of the same seeds, one model per row: {self.picture}")
        return "\n".join(lines)


def compare_models(
    one: str, other: str, *, picture: str | None = "comparison.png", seeds: int = 8, steps: int = 18
) -> ModelComparison:
    """Compare two models: recipe keys, metrics measured in the same way, and samples of the same seeds.

    Args:
        one: a model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model` or a folder.
        other: the model to compare it with.
        picture: the file for the samples, one model per row; None does not sample.
        seeds: how many images per model, of seeds 0, 1, ...
        steps: sampling steps.

    Raises:
        UserError: there is no such model, or the models make images of different sizes and `picture` is not None.
        CheckpointError: the weights of a model do not match their checksum.

    Example:
        found = patchloom.compare_models("models:/my-model@champion", "models:/my-model/1", picture=None)
        print(found.text())
    """
    place = local_path(picture) if picture else None
    if place:
        check_new_file(Folder(str(place.parent)), place.name, "picture of `models compare`", is_own_picture)
    fetched = fetch_model(one), fetch_model(other)
    cards = verified_card(fetched[0].folder), verified_card(fetched[1].folder)
    if place:
        _check_one_size(*cards)
    first, second = (_evaluations(model) for model in fetched)
    pairs = comparable(first, second)
    return ModelComparison(
        models=(fetched[0].reference, fetched[1].reference),
        recipe=_different_images(*cards) | _different_keys(*(recipe_of(model) for model in fetched)),
        metrics=[_compared_metrics(*pair) for pair in pairs],
        not_comparable=[] if pairs else why_not_comparable(first, second),
        picture=_sample_both(fetched, place, seeds, steps) if place else None,
    )


def _image_shape(card: ModelCard) -> tuple[int, int]:
    """Channels and side of the images that a model makes."""
    return 3 if card.autoencoder else card.denoiser.channels, card.image_side


def _check_one_size(one: ModelCard, other: ModelCard) -> None:
    """Raise UserError, before any sampling, if the images of two models do not fit into one picture."""
    if one.condition or other.condition:
        raise UserError("a model needs a condition image for each seed, and the picture is of seeds: pass --no-picture")
    shapes = _image_shape(one), _image_shape(other)
    if shapes[0] != shapes[1]:
        found = " and ".join(f"{side}x{side} with {channels} channels" for channels, side in shapes)
        raise UserError(f"the models make images of {found}, which do not fit into one picture: pass --no-picture")


def _different_images(*cards: ModelCard) -> dict[str, tuple[Any, ...]]:
    """What the models make, where it differs: `images` (pixels or latents), `image_channels` and `image_side`."""
    shapes = [_image_shape(card) for card in cards]
    values = {
        "images": tuple(card.normalisation.kind for card in cards),
        "image_channels": tuple(channels for channels, _ in shapes),
        "image_side": tuple(side for _, side in shapes),
    }
    return {key: found for key, found in values.items() if found[0] != found[1]}


def _evaluations(model: FetchedModel) -> list[Evaluation]:
    version = version_of(model)
    return evaluations_of(version.tags) if version else []


def _different_keys(*recipes: Recipe | None) -> dict[str, tuple[Any, ...]]:
    """Keys such as `patches.p` with the value in each recipe, if they differ; an import has no values."""
    flat = [flat_values(recipe.model_dump(mode="json")) if recipe else {} for recipe in recipes]
    values = {
        key: tuple(found.get(key) for found in flat) for key in dict.fromkeys(key for found in flat for key in found)
    }
    return {key: found for key, found in values.items() if found[0] != found[1]}


def _compared_metrics(first: Evaluation, second: Evaluation) -> ComparedMetrics:
    names = [name for name in TITLES if name in first.metrics and name in second.metrics]
    values = {name: (first.value(name), second.value(name)) for name in names}
    return ComparedMetrics(first.digest, first.circumstances(), values)


def why_not_comparable(first: list[Evaluation], second: list[Evaluation]) -> list[str]:
    """The fewest differences between an evaluation of one model and one of the other."""
    if not first or not second:
        who = "one of the models" if first or second else "neither model"
        has = "has no" if first or second else "has an"
        return [f"{who} {has} evaluation: run `patchloom evaluate` on samples of each"]
    return min((differences(a, b) for a in first for b in second), key=len)


def _sample_both(models: tuple[FetchedModel, FetchedModel], place: Path, seeds: int, steps: int) -> str:
    """Sample the same seeds from both models into a picture with one row per model; its path."""
    numbers = list(range(seeds))
    rows: list[np.ndarray] = []
    make_folder(place.parent)
    with progress("sampling both models", 2 * seeds, "images") as meter:
        for fetched in models:
            model = load_sampling_model(fetched.folder)
            labels = default_labels(numbers, model.card.sampled_classes)
            rows.append(generate_padded(model, numbers, labels, DEFAULT_BATCH, Sampling(steps=steps)).numpy())
            meter.update(meter.done + seeds)
    save_png(side_by_side(rows, scale=1 if rows[0].shape[-1] >= 64 else 2), place)
    return str(place)
