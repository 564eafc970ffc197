"""Describing: what one model is, where it came from, how good it is, and how to sample from it."""

import dataclasses
import json
from dataclasses import dataclass

from patchloom.models.checkpoints import verified_card
from patchloom.pipelines.registry.quality import Evaluation, evaluations_of
from patchloom.pipelines.registry.version_card import CONDITIONS
from patchloom.platform.files.storage import local_path
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.tracking.registry import (
    FetchedModel,
    described_version,
    fetch_model,
    fetch_preview,
)
from patchloom.platform.tracking.versions import RegisteredVersion


@dataclass(frozen=True)
class VersionLineage:
    """What a model was made from; None for what is not recorded."""

    run: str | None
    dataset_fingerprint: str | None
    recipe_sha256: str | None
    code_version: str
    weights_sha256: str
    autoencoder_sha256: str | None


@dataclass(frozen=True)
class ModelDescription:
    """A verified model: its network, lineage, evaluations and recipe, and the command that samples from it."""

    reference: str
    aliases: list[str]
    lineage: VersionLineage
    kind: str
    resolution: int
    network: str
    images_seen: int | None
    held_out_loss: str | None
    class_names: list[str]
    condition: str | None
    evaluations: list[Evaluation]
    recipe: Recipe | None  # None for an import
    folder: str
    sample: str

    def to_json(self) -> str:
        """What `models show --json` prints; each evaluation has its digest. `condition` may be missing."""
        evaluations = [found.to_dict() | {"digest": found.digest} for found in self.evaluations]
        recipe = self.recipe.model_dump(mode="json") if self.recipe else {}
        values = dataclasses.asdict(self) | {"evaluations": evaluations, "recipe": recipe}
        return json.dumps({key: value for key, value in values.items() if key != "condition" or value is not None})


def describe_model(reference: str) -> ModelDescription:
    """Fetch and verify a model, and describe it.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model`, or a model or run folder.

    Raises:
        UserError: there is no such model.
        CheckpointError: its weights do not match their checksum.

    Example:
        description = patchloom.describe_model("models:/my-model@champion")
        print(description.resolution, description.lineage.dataset_fingerprint)
    """
    fetched = fetch_model(reference)
    card = verified_card(fetched.folder)
    version = version_of(fetched)
    tags = version.tags if version else {}
    return ModelDescription(
        reference=fetched.reference,
        aliases=version.aliases if version else [],
        lineage=VersionLineage(
            run=fetched.run_id,
            dataset_fingerprint=tags.get("dataset_fingerprint"),
            recipe_sha256=tags.get("recipe_sha256"),
            code_version=card.code_version,
            weights_sha256=card.weights_sha256,
            autoencoder_sha256=card.autoencoder.weights_sha256 if card.autoencoder else None,
        ),
        kind=card.normalisation.kind,
        resolution=card.denoiser.resolution,
        network=card.denoiser.title,
        images_seen=card.images_seen,
        held_out_loss=tags.get("held_out_loss"),
        class_names=list(card.class_names),
        condition=card.condition.summary if card.condition else None,
        evaluations=evaluations_of(tags),
        recipe=recipe_of(fetched),
        folder=str(fetched.folder),
        sample=f"patchloom sample {fetched.reference} samples --seeds 0-63{CONDITIONS if card.condition else ''}",
    )


def version_of(fetched: FetchedModel) -> RegisteredVersion | None:
    """The registry's entry of a fetched version; None for a folder."""
    return described_version(fetched.name, fetched.version) if fetched.name and fetched.version else None


def recipe_of(fetched: FetchedModel) -> Recipe | None:
    """The recipe that a model was trained with; None for an import."""
    path = fetched.folder / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def show_model(reference: str, picture: str | None = None) -> str:
    """A model's description as text.

    Args:
        reference: as for `describe_model`.
        picture: a file to save the preview grid of its run in.
    """
    place = None if picture is None else local_path(picture)
    model = describe_model(reference)
    lines = [model.reference + (f"  ({', '.join(model.aliases)})" if model.aliases else "")]
    for name in ("kind", "resolution", "network", "condition", "images_seen", "held_out_loss"):
        value = getattr(model, name)
        lines += [] if value is None else [f"  {name}: {value}"]
    lines += [f"  classes: {', '.join(model.class_names) or 'none'}"]
    lines += [
        f"  {name.replace('_', ' ')}: {value}" for name, value in dataclasses.asdict(model.lineage).items() if value
    ]
    for found in model.evaluations:
        lines += [f"  evaluation {found.digest}: {found.numbers()}", f"    {found.circumstances()}"]
    if place is not None:
        saved = fetch_preview(fetch_model(reference), place)
        lines += [f"  preview: {saved or 'the run has no preview'}"]
    return "\n".join([*lines, f"  folder: {model.folder}", f"  sample from it: {model.sample}"])
