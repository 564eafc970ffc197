"""The model card of a run: the network, normalisation and classes that a recipe makes of a dataset."""

from typing import Any

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.augment import LABELS
from patchloom.models.cards import AutoencoderCard, DenoiserConfig, ModelCard, PatchesCard
from patchloom.models.denoiser import halvings_of
from patchloom.models.normalisation import Normalisation, pixel_normalisation
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


def new_model_card(recipe: Recipe, dataset: Dataset) -> ModelCard:
    """The card of the model that this recipe makes of this dataset.

    Raises:
        UserError: the recipe does not fit the dataset.
    """
    card, model = dataset.card, recipe.model
    _check_fit(recipe, dataset)
    class_names = dataset.class_names if model.class_conditional else []
    network, options = _network(recipe)
    denoiser = DenoiserConfig(
        network=network,
        network_options=options,
        resolution=card.resolution,
        channels=card.channels,
        classes=len(class_names),
        coordinates=model.coordinates,
        patch_size=model.patch_size_condition,
        sigma_data=model.sigma_data,
    )
    try:
        multiple = 2 ** halvings_of(denoiser)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    for fraction in (1.0, *(size.fraction for size in recipe.patches.sizes)):
        side = fraction * card["resolution"]
        if side != int(side) or int(side) % multiple:
            raise UserError(
                f"patches.sizes: fraction {fraction:g} of {card['resolution']} pixels is {side:g}, and the network "
                f"halves {multiple.bit_length() - 1} times; choose fractions that give a multiple of {multiple}"
            )
    return ModelCard(
        name=recipe.name,
        denoiser=denoiser,
        normalisation=_normalisation(recipe, card),
        autoencoder=AutoencoderCard.from_json(card.autoencoder.to_dict()) if card.autoencoder else None,
        class_names=tuple(class_names),
        label_dropout=model.label_dropout,
        patches=PatchesCard.from_json(recipe.patches.model_dump(mode="json")),
        dataset_fingerprint=dataset.fingerprint,
        code_version=__version__,
    )


def _network(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The network's name and its constructor's arguments, as `build_denoiser` takes them."""
    model = recipe.model
    if model.backbone is not None:
        return model.backbone, model.backbone_options
    network, options = RECIPE_NETWORKS[model.network]
    if network == "dhariwal":  # EDM's heads of 64 channels, or one head where there are fewer
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


def _normalisation(recipe: Recipe, card: DatasetCard) -> Normalisation:
    channels = card.channels
    if card.autoencoder is None:
        return pixel_normalisation(channels)
    if recipe.data.whiten:
        scale = tuple(recipe.model.sigma_data / std for std in card.std)
        return Normalisation("latents", tuple(card.mean), scale)
    return Normalisation("latents", (card.autoencoder.shift,) * channels, (card.autoencoder.scale,) * channels)


def _check_fit(recipe: Recipe, dataset: Dataset) -> None:
    """Raise UserError where the recipe asks of the dataset what it does not have."""
    card = dataset.card
    if recipe.model.class_conditional and not dataset.class_names:
        raise UserError(
            "model.class_conditional is true, and the dataset has no classes: set it to false, or prepare a folder "
            "whose sub-folders are the classes"
        )
    if recipe.data.mirror and card["kind"] == "latents":
        raise UserError(
            "data.mirror is true, and the mirror of a latent is not the latent of a mirror: set it to false"
        )
    if recipe.data.augment and (card["kind"] == "latents" or recipe.model.backbone):
        turned, untold = (
            "a turned latent is not the latent of a turned image",
            "a backbone takes no augmentation labels",
        )
        why = turned if card["kind"] == "latents" else untold
        raise UserError(f"data.augment is {recipe.data.augment:g}, and {why}: set it to 0")
    if not len(dataset.indices("train", recipe.data.held_out_fraction)):
        raise UserError(
            f"data.held_out_fraction {recipe.data.held_out_fraction:g} leaves no row of {len(dataset)} to train on: "
            "lower it"
        )
