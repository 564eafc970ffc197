"""The model card of a run: the network, normalisation and classes that a recipe makes of a dataset."""

from typing import Any

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.augment import LABELS
from patchloom.models.cards import (
    CONTROLNET,
    MODEL_FORMAT,
    AutoencoderCard,
    ConditionCard,
    DenoiserConfig,
    ModelCard,
    PatchesCard,
)
from patchloom.models.controlnet import describe_base
from patchloom.models.denoiser import halvings_of
from patchloom.models.known_bases import BaseConfig, planned_base
from patchloom.models.normalisation import Normalisation, pixel_normalisation, spread_of
from patchloom.models.patches import patch_side
from patchloom.pipelines.train.data_shape import DataShape
from patchloom.pipelines.train.shard_plan import training_rows
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.recipe.run_recipe import Recipe
from patchloom.platform.records.dataset import DatasetCard

HEAD_WIDTH = 64
STEM_LAYERS = 3  # 1x1 convolutions of implicit coordinates, as in the released code
RECIPE_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("song", {"embedding": "positional"}),
    "ncsnpp": (
        "song",
        {
            "embedding": "fourier",
            "residual_input": True,
            "filter_taps": [1, 3, 3, 1],
            "noise_width_multiplier": 2,
        },
    ),
    "adm": ("dhariwal", {}),
}


def new_denoiser_config(recipe: Recipe, data: Dataset | DataShape) -> DenoiserConfig:
    """The network that this recipe makes of a dataset, or of data of this shape.

    Raises:
        UserError: the recipe does not fit the data.
    """
    shape, model = DataShape.of(data), recipe.model
    base = _base(model.base, is_planned=isinstance(data, DataShape)) if model.base else None
    if base and isinstance(data, DataShape):
        shape = data.for_base(base.text, base.downscale)
    _check_fit(recipe, shape)
    network, options = _network(recipe, shape, base)
    denoiser = DenoiserConfig(
        network=network,
        network_options=options,
        resolution=shape.resolution,
        channels=shape.channels,
        classes=shape.classes if model.class_conditional else 0,
        coordinates=model.coordinates,
        patch_size=model.patch_size_condition,
        condition_channels=shape.condition_channels or None if model.condition else None,
        sigma_data=1.0 if model.base else model.sigma_data,
    )
    _check_sizes(recipe, denoiser)
    if isinstance(data, Dataset):
        _check_rows(recipe, data)
    return denoiser


def new_model_card(recipe: Recipe, dataset: Dataset) -> ModelCard:
    """The card of the model that this recipe makes of this dataset.

    Raises:
        UserError: the recipe does not fit the dataset.
    """
    card, denoiser = dataset.card, new_denoiser_config(recipe, dataset)
    class_names = dataset.class_names if denoiser.classes else []
    condition = _condition(recipe, card)
    return ModelCard(
        format_version=MODEL_FORMAT if condition else 1,
        name=recipe.name,
        denoiser=denoiser,
        normalisation=_normalisation(recipe, card),
        autoencoder=AutoencoderCard.from_json(card.autoencoder.to_dict()) if card.autoencoder else None,
        class_names=tuple(class_names),
        empty_classes=_empty_classes(card) if class_names else None,
        label_dropout=recipe.model.label_dropout,
        condition=condition,
        patches=PatchesCard.from_json(recipe.patches.model_dump(mode="json")),
        dataset_fingerprint=dataset.fingerprint,
        code_version=__version__,
    )


def _empty_classes(card: DatasetCard) -> tuple[int, ...] | None:
    return tuple(number for number, entry in enumerate(card.classes) if not entry.rows) or None


def _network(recipe: Recipe, shape: DataShape, base: BaseConfig | None) -> tuple[str, dict[str, Any]]:
    """The name of the network and the keyword arguments of its constructor."""
    model = recipe.model
    if base is not None:
        return CONTROLNET, _controlnet(base, shape)
    if model.backbone is not None:
        return model.backbone, model.backbone_options
    network, options = RECIPE_NETWORKS[model.network]
    if network == "dhariwal":  # heads of 64 channels as in EDM, or one head where a level has fewer channels
        options = options | {"head_width": min(HEAD_WIDTH, model.width * min(model.width_multipliers))}
    return network, {
        "width": model.width,
        "width_multipliers": list(model.width_multipliers),
        "blocks": model.blocks,
        "attention": list(model.attention),
        "dropout": model.dropout,
        "stem": [model.width] * STEM_LAYERS if model.coordinates == "implicit" else [],
        "augmentation": LABELS if recipe.data.augment else 0,
        **options,
    }


def _base(base: str, is_planned: bool) -> BaseConfig:
    """What is known of a base; for a plan without data, also without its files."""
    try:
        return planned_base(base) if is_planned else BaseConfig(describe_base(base))
    except ValueError as error:
        raise UserError(f"model.base: {error}") from None


def _controlnet(base: BaseConfig, shape: DataShape) -> dict[str, Any]:
    """The options of a ControlNet; raises UserError if the data do not fit the base."""
    if shape.text is None or not shape.condition_channels:
        missing = "--text" if shape.condition_channels else "--condition (with --like, give --like-condition)"
        raise UserError(
            f"model.network is controlnet, which needs a condition image and a text embedding with each image: prepare "
            f"the images with {missing}"
        )
    tokens, width = shape.text
    if width != (wanted := base.options["unet"].get("cross_attention_dim")):
        raise UserError(
            f"model.base: the texts of {base.options['base']} have the width {wanted}, and those of the dataset "
            f"{width}: prepare it with the embeddings of the base's text encoder"
        )
    control_channels = shape.condition_channels // shape.downscale**2
    return {**base.options, "control_channels": control_channels, "downscale": shape.downscale, "tokens": tokens}


def _normalisation(recipe: Recipe, card: DatasetCard) -> Normalisation:
    """The map from stored pixels or latents to the values of the network."""
    if card.autoencoder is None:
        return pixel_normalisation(card.channels)
    if recipe.data.whiten:
        spreads = (spread_of(*channel) for channel in zip(card.mean, card.std, strict=True))
        return Normalisation("latents", tuple(card.mean), tuple(recipe.model.sigma_data / spread for spread in spreads))
    return AutoencoderCard.from_json(card.autoencoder.to_dict()).normalisation()


def _condition(recipe: Recipe, card: DatasetCard) -> ConditionCard | None:
    """The conditions of the dataset, and the map from their values to those of the network."""
    condition, transform = card.condition, card.transform
    if condition is None or not recipe.model.condition:
        return None
    if condition.dtype == "uint8":
        values = pixel_normalisation(condition.channels)
        mean, scale = values.mean, values.scale
    else:
        mean = tuple(condition.mean)
        scale = tuple(1 / spread_of(*channel) for channel in zip(condition.mean, condition.std, strict=True))
    return ConditionCard(
        kind=condition.kind,
        factor=condition.factor,
        channels=condition.channels,
        dtype=condition.dtype,
        downscale=condition.downscale,
        mean=mean,
        scale=scale,
        dropout=recipe.model.condition_dropout,
        crop=transform.crop if transform else None,
        resize=transform.resize if transform else None,
    )


def _check_sizes(recipe: Recipe, denoiser: DenoiserConfig) -> None:
    """Raise UserError unless the network can halve every patch size often enough."""
    try:
        halvings = halvings_of(denoiser)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    for fraction in (1.0, *(size.fraction for size in recipe.patches.sizes)):
        side = patch_side(fraction, denoiser.resolution)
        if side is None or side % 2**halvings:
            raise UserError(
                f"patches.sizes: fraction {fraction:g} of {denoiser.resolution} pixels is "
                f"{fraction * denoiser.resolution:g}, and the network "
                f"halves the image {halvings} times: choose fractions that give a multiple of {2**halvings}"
            )


def unexpected_data(recipe: Recipe, card: DatasetCard) -> str | None:
    """What the dataset has and the recipe was not made for, in one line; None if it has all."""
    pairs = (("kind", recipe.data.kind, card.kind), ("resolution", recipe.data.resolution, card.resolution))
    other = [
        f"data.{key} is {wanted}, and the dataset has {found}"
        for key, wanted, found in pairs
        if wanted not in (None, found)
    ]
    return f"{recipe.name} was made for other data: {'; '.join(other)}" if other else None


def _check_fit(recipe: Recipe, shape: DataShape) -> None:
    """Raise UserError if the recipe needs something that data of this shape do not have."""
    data, is_latent = recipe.data, shape.kind == "latents"
    if recipe.model.class_conditional and not shape.classes:
        raise UserError(
            "model.class_conditional is true, and the data have no classes: set it to false, or prepare a folder with "
            "one sub-folder per class (with --like, give --like-classes)"
        )
    if recipe.model.condition_dropout and not shape.condition_channels:
        raise UserError(
            f"model.condition_dropout is {recipe.model.condition_dropout:g}, and the data have no conditions: set it "
            "to 0, or prepare the images with --condition (with --like, give --like-condition)"
        )
    if data.mirror and is_latent:
        raise UserError("data.mirror is true, and mirroring a latent does not mirror the image: set it to false")
    if data.augment and (is_latent or recipe.model.backbone):
        latents = "latents cannot be augmented, only images"
        reason = latents if is_latent else "a backbone does not take augmentation labels"
        raise UserError(f"data.augment is {data.augment:g}, and {reason}: set it to 0")


def _check_rows(recipe: Recipe, dataset: Dataset) -> None:
    """Raise UserError if the dataset has not enough rows for training."""
    held_out = recipe.data.held_out_fraction
    if not len(training_rows(dataset, recipe)):
        raise UserError(
            f"data.held_out_fraction {held_out:g} leaves none of {len(dataset)} rows for training: lower it"
        )
