"""Recipes: one YAML file that defines a model and its training. Errors name the path of the key."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from patchloom.errors import UserError
from patchloom.platform.recipe.files import BASE, ConfigFile, merged, recipe_layers
from patchloom.platform.recipe.sections import (
    Count,
    Fraction,
    Positive,
    Section,
    checked,
    parse_value,
    set_key,
)
from patchloom.redaction import redacted

BLOCK_TOLERANCE = 1e-9  # of the blocks of a patch size, whose shares are rounded: 1 - 0.9 is below 0.1


class DataSection(Section):
    """Which rows of the dataset are used, and how."""

    kind: Literal["pixels", "latents"] | None = Field(
        None, description="What the recipe was made for; a dataset of another kind gives a warning"
    )
    resolution: Count | None = Field(
        None, description="Side of the images or latents that the recipe was made for; another one gives a warning"
    )
    held_out_fraction: Fraction = Field(
        0.05, description="Share of the rows that are never trained on, chosen by their keys, to measure the loss on"
    )
    images: Count | None = Field(
        None,
        description="Train on so many of the rows for training, the same ones in every run of a dataset; fewer are a "
        "part of more. A mirror image of prepare --mirror is a row. Default: all",
    )
    whiten: bool = Field(
        True,
        description="Latents: normalise each channel to mean 0 and std sigma_data",
    )
    mirror: bool = Field(False, description="Pixels: mirror half of the images, but not their coordinates")
    augment: Fraction = Field(
        0.0, description="Pixels: probability of each geometric transformation of EDM; coordinates are transformed, too"
    )
    order: Literal["global", "windowed"] = Field(
        "global",
        description="Order of the rows in an epoch: a permutation of all, or windows of permuted shards for a remote "
        "dataset that the cache of a node cannot hold",
    )
    window_rows: Count = Field(
        262_144, description="Rows that are permuted at a time in the windowed order; the cache holds two windows"
    )


def _encoding(value: Any) -> Any:
    """The name of an encoding. Older recipes have `true` and `false` (in YAML also `on` and `off`)."""
    return {True: "linear", False: "none"}[value] if isinstance(value, bool) else value


class ModelSection(Section):
    """The network: DDPM++ and NCSN++ (EDM's SongUNet), ADM (EDM's DhariwalUNet), a ControlNet, or your `backbone`."""

    network: Literal["ddpmpp", "ncsnpp", "adm", "controlnet"] = Field("ddpmpp", description="A built-in network")
    base: str | None = Field(
        None,
        min_length=1,
        description="network: controlnet: the frozen Stable Diffusion that it controls, by hub id or as a folder in "
        "the format of diffusers",
    )
    width: Count = Field(128, description="Channels at the highest resolution, before width_multipliers")
    width_multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (1, 2, 2, 2), description="Channels of each resolution in units of width; each resolution is half of the last"
    )
    blocks: Count = Field(4, description="Residual blocks of each resolution")
    attention: tuple[Count, ...] = Field((16,), description="Resolutions with attention, for the full-size image")
    dropout: Fraction = Field(0.0, description="Dropout in the residual blocks")
    backbone: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:Class of your own network, called as net(x, noise_condition, labels); "
        "needs --allow-backbone",
    )
    backbone_options: dict[str, Any] = Field({}, description="Further arguments of the constructor of the backbone")
    coordinates: Annotated[Literal["linear", "periodic", "implicit", "none"], BeforeValidator(_encoding)] = Field(
        "linear", description="How the network gets the coordinates of a patch, if at all"
    )
    patch_size_condition: bool = Field(False, description="Also give the network the patch size (Eq. 4)")
    class_conditional: bool = Field(False, description="Give the network the class of the image")
    label_dropout: Fraction = Field(0.0, description="Fraction of labels dropped, for guidance; 0.1 in the paper")
    condition: bool = Field(True, description="Give the network the condition images of the dataset, if it has any")
    condition_dropout: Fraction = Field(
        0.0,
        description="Fraction of condition images replaced by zeros, for guidance; with equal fractions, label and "
        "condition are dropped together",
    )
    sigma_data: Positive = Field(0.5, description="Expected standard deviation of the data (EDM, Table 1)")

    @model_validator(mode="after")
    def _dropped_conditions_are_used(self) -> "ModelSection":
        if self.condition_dropout and not self.condition:
            raise PydanticCustomError("condition", "condition_dropout is set without a condition; set condition: true")
        return self

    @model_validator(mode="after")
    def _controlnet_has_a_base(self) -> "ModelSection":
        if (self.network == "controlnet") != (self.base is not None):
            raise PydanticCustomError("base", "network: controlnet and base need each other; set both, or neither")
        if self.base is None:
            return self
        named = ("width", "width_multipliers", "blocks", "attention", "dropout", "class_conditional", "condition",
                 "patch_size_condition", "sigma_data")  # fmt: skip
        if changed := [name for name in named if getattr(self, name) != type(self).model_fields[name].default]:
            raise PydanticCustomError("base", f"{', '.join(changed)}: not used with network: controlnet; remove them")
        if self.coordinates == "implicit":
            raise PydanticCustomError("base", "a ControlNet has no implicit coordinates; set coordinates: linear")
        return self

    @model_validator(mode="after")
    def _network_is_named_once(self) -> "ModelSection":
        if self.backbone is None:
            if self.backbone_options:
                raise PydanticCustomError("backbone", "backbone_options are set without a backbone; set model.backbone")
            return self
        named = ("network", "base", "width", "width_multipliers", "blocks", "attention", "dropout")
        changed = [name for name in named if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise PydanticCustomError(
                "backbone", f"{', '.join(changed)}: not used with a backbone; move to backbone_options"
            )
        if self.coordinates == "implicit" or self.patch_size_condition:
            raise PydanticCustomError(
                "backbone", "implicit coordinates and patch_size_condition need a built-in network; remove them"
            )
        return self


class SmallerPatchSection(Section):
    """One patch size smaller than the full image."""

    fraction: Fraction = Field(description="Side of the patch as a fraction of the image: 0.5 is a quarter of its area")
    weight: Positive = Field(description="Share of this size in the steps that are not full-size, before normalisation")
    batch_multiplier: Count = Field(description="Crops of a step for each full-size image of train.batch_size")


class PatchesSection(Section):
    """Which patch sizes are trained, and when (Patch Diffusion, Eq. 5)."""

    p: Fraction = Field(0.5, description="Fraction of steps on full-size images")
    schedule: Literal["stochastic", "progressive"] = Field(
        "stochastic", description="A random size in every step, or one size after the other, the smallest first"
    )
    sizes: tuple[SmallerPatchSection, ...] = (
        SmallerPatchSection(fraction=0.5, weight=0.6, batch_multiplier=2),
        SmallerPatchSection(fraction=0.25, weight=0.4, batch_multiplier=4),
    )
    draw: Literal["shared", "stratified", "independent"] = Field(
        "shared",
        description="Patch sizes of a step of the stochastic schedule: one for all workers, the same mix of all sizes "
        "in every step, or one for each of train.emulated_ranks",
    )
    shares_of: Literal["updates", "images"] = Field(
        "updates", description="What the progressive schedule divides: updates (paper) or images (released code)"
    )

    @model_validator(mode="after")
    def _schedule_fits_draw(self) -> "PatchesSection":
        if self.schedule == "progressive" and self.draw != "shared":
            raise PydanticCustomError(
                "draw",
                f"a progressive schedule cannot use draw: {self.draw}; set draw: shared",
            )
        if self.schedule == "stochastic" and self.shares_of != "updates":
            raise PydanticCustomError(
                "shares_of", "a stochastic schedule cannot use shares_of: images; set shares_of: updates"
            )
        return self

    @model_validator(mode="after")
    def _sizes_are_valid(self) -> "PatchesSection":
        fractions = [size.fraction for size in self.sizes]
        if any(not 0 < fraction < 1 for fraction in fractions):
            raise PydanticCustomError("sizes", "each fraction must be above 0 and below 1; p is for full-size images")
        if len(set(fractions)) < len(fractions):
            raise PydanticCustomError("sizes", "two sizes have the same fraction; merge them")
        if not self.sizes and self.p < 1:
            raise PydanticCustomError("sizes", f"p is {self.p:g} without smaller sizes; add a size or set p: 1")
        return self


class NoiseSection(Section):
    """Training noise: ln(sigma) ~ N(mean, std^2) (EDM, Table 1)."""

    mean: float = Field(-1.2, description="Mean of ln(sigma)")
    std: Positive = Field(1.2, description="Standard deviation of ln(sigma)")


class LossSection(Section):
    """How the errors of a crop become one number: `mean` over its pixels, or `sum` as in the code of the paper."""

    reduction: Literal["mean", "sum"] = Field(
        "mean", description="Mean over the pixels of a crop, or their sum, in which smaller crops count less"
    )


class OptimizerSection(Section):
    """Adam, with a learning rate that grows linearly over the first images."""

    lr: Positive = Field(2e-4, description="Learning rate after the ramp-up")
    beta1: Fraction = Field(0.9, description="Decay of Adam's average of gradients")
    beta2: Fraction = Field(0.999, description="Decay of Adam's average of squared gradients")
    eps: Positive = Field(1e-8, description="Adam's epsilon")
    lr_rampup_images: Annotated[int, Field(ge=0)] = Field(
        10_000_000, description="Counted images in which the learning rate grows from 0 to lr; a short run needs fewer"
    )


class AverageSection(Section):
    """A running average of the weights: EDM's with a half-life in images, or EDM2's power function."""

    halflife_images: Positive = Field(500_000, description="Half-life in counted images; a short run needs fewer")
    rampup_ratio: Positive = Field(
        0.05, description="The half-life is at most this share of the counted images so far, so that early weights fade"
    )
    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)] | None = Field(
        None, description="Relative width of a power-function average, which replaces the half-life"
    )
    snapshot_every_images: Annotated[int, Field(ge=0)] = Field(
        0, description="Power functions: store the average in RUN/ema for `patchloom models average`; 0 stores none"
    )

    @model_validator(mode="after")
    def _snapshots_are_of_power_functions(self) -> "AverageSection":
        if self.snapshot_every_images and self.sigma_rel is None:
            raise PydanticCustomError(
                "snapshots", "snapshots need a power-function average; set sigma_rel, or snapshot_every_images: 0"
            )
        return self


class KeepSection(Section):
    """Which checkpoints are kept: the newest, one per `every_images`, and those with the lowest held-out loss."""

    last: Count = Field(2, description="So many of the newest")
    every_images: Annotated[int, Field(ge=0)] = Field(0, description="Also one per so many counted images; 0: none")
    best: Annotated[int, Field(ge=0)] = Field(0, description="Also so many with the lowest held-out loss")


class TrainSection(Section):
    """The length of training in counted images, the batch, the precision and the checkpoints."""

    images: Count = Field(description="Length of the run in counted images: each crop and each full-size image is one")
    init_from: str | None = Field(
        None, description="Initial weights: models:/NAME@ALIAS, a model folder, or an EDM snapshot (.pkl)"
    )
    batch_size: Count = Field(
        512, description="Full-size images of an update, on all workers together; smaller crops come in larger batches"
    )
    block_size: Count = Field(
        8, description="Crops that stay together on a worker, and the smallest microbatch; batch_size is a multiple"
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the network; weights and averages are always fp32"
    )
    emulated_ranks: Count = Field(
        1, description="Number of groups of the batch that each draw a patch size (patches.draw: independent)"
    )
    checkpoint_every_images: Count = Field(
        1_000_000, description="Counted images between checkpoints; a lost node costs the work since the last one"
    )
    keep: KeepSection = KeepSection()
    log_every_images: Count = Field(50_000, description="Counted images between lines of progress")
    held_out_every_images: Annotated[int, Field(ge=0)] = Field(
        0, description="Measure the loss on held-out images this often; 0: with every preview and at the end"
    )
    held_out_images: Count = Field(
        64, description="Held-out images of a measurement; which ones they are matters less the more there are"
    )

    @model_validator(mode="after")
    def _blocks_divide_the_batch(self) -> "TrainSection":
        if self.batch_size % self.block_size:
            raise PydanticCustomError(
                "blocks", f"batch_size {self.batch_size} is not a multiple of block_size {self.block_size}"
            )
        return self


class PreviewSection(Section):
    """Grids of samples from fixed seeds during training; `every_images: 0` makes none."""

    every_images: Annotated[int, Field(ge=0)] = Field(1_000_000, description="Counted images between grids; 0: none")
    count: Count = Field(16, description="Samples of a grid")
    steps: Count = Field(12, description="Steps of the sampler")
    frechet_samples: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Samples for a Fréchet distance to training rows, on mean tile colours (not FID); 0: none",
    )


class Recipe(Section):
    """What a model is. Where it runs (workers, devices, addresses) is not part of a recipe."""

    format_version: Literal[1] = Field(1, description="Format of the file")
    name: Annotated[str, Field(min_length=1)] = Field(description="Name of the recipe, by which runs are shown")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of the first weights and of all random draws")
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    patches: PatchesSection = PatchesSection()
    noise: NoiseSection = NoiseSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    ema: Annotated[tuple[AverageSection, ...], Field(min_length=1)] = Field(
        (AverageSection(),), description="Averages of the weights; the first one is registered"
    )
    train: TrainSection
    preview: PreviewSection = PreviewSection()

    @model_validator(mode="after")
    def _draw_fits_the_batch(self) -> "Recipe":
        batch, block, ranks = self.train.batch_size, self.train.block_size, self.train.emulated_ranks
        if self.patches.draw == "independent" and batch % (block * ranks):
            raise PydanticCustomError(
                "ranks",
                f"train.emulated_ranks: batch_size {batch} is not a multiple of {block * ranks} "
                f"({ranks} ranks x block_size {block})",
            )
        if self.patches.draw != "independent" and ranks > 1:
            raise PydanticCustomError("ranks", "train.emulated_ranks above 1 need patches.draw: independent")
        if self.patches.draw == "stratified":
            self._check_stratified_blocks()
        return self

    @model_validator(mode="after")
    def _controlnet_is_trained_like_its_base(self) -> "Recipe":
        if self.model.base is None:
            return self
        if self.data.whiten or self.data.mirror or self.data.augment:
            raise PydanticCustomError(
                "base",
                "data: a ControlNet needs latents as its base knows them; set whiten: false, mirror: false, augment: 0",
            )
        if self.noise != NoiseSection():
            raise PydanticCustomError(
                "base", "noise: not used with network: controlnet, whose base has its own; remove it"
            )
        return self

    def _check_stratified_blocks(self) -> None:
        patches, blocks = self.patches, self.train.batch_size / self.train.block_size
        total = sum(size.weight for size in patches.sizes)
        shares = {
            size.fraction: (1 - patches.p) * size.weight / total * size.batch_multiplier for size in patches.sizes
        }
        for fraction, share in {1.0: patches.p, **shares}.items():
            if 0 < share * blocks < 1 - BLOCK_TOLERANCE:
                raise PydanticCustomError(
                    "draw",
                    f"patches.draw: a stratified step has {share * blocks:.2g} blocks of size {fraction:g} and "
                    "needs at least 1; raise train.batch_size or lower train.block_size",
                )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: path or address of a YAML file, or the name of a shipped recipe such as "demo_pixels". The file may be a
            variant: its `base` names another recipe, and its own keys replace those of the base.
        overrides: changes, such as ["patches.p=0.25", "train.images=10000"].

    Returns:
        The recipe, with every default filled in.

    Raises:
        UserError: there is no such recipe, or a key or value is wrong; the message names its path.

    Example:
        recipe = patchloom.load_recipe("demo_pixels", ["patches.p=0.25"])
        print(recipe.patches.p)
    """
    return _overridden(recipe_values(ConfigFile.find(str(name))), overrides)


def recipe_values(file: ConfigFile) -> dict[str, Any]:
    """The keys and values of a recipe file, over those of its bases. The result is not checked yet.

    Raises:
        UserError: a base is missing, is not a valid recipe, or has this recipe as its base.
    """
    values: dict[str, Any] = {}
    *bases, (_, own) = recipe_layers(file)
    for base, changes in bases:
        values = merged(values, changes)
        try:
            check_recipe(values)
        except UserError as error:
            raise UserError(f"{base}: {error}") from None
        del values["name"]  # each recipe has its own
    return merged(values, own)


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    if overrides:
        values = _with_defaults(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override} has no '='; write it as --set patches.p=0.25")
        set_key(values, key, parse_value(text, key))
    return check_recipe(values)


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values with all defaults, so that overrides reach into lists; unchanged if they are not valid yet."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def check_recipe(values: Mapping[str, object]) -> Recipe:
    """Build a recipe from plain values; raises UserError with the path of each wrong key."""
    return checked(Recipe, values)


def with_values(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """A copy of a recipe with changed keys such as `patches.p`; raises UserError as `check_recipe` does."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        set_key(values, key, value)
    return check_recipe(values)


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, with all defaults and without secrets in addresses."""
    return redacted(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def recipe_schema() -> str:
    """The JSON schema of recipes, with which editors complete and check YAML.

    A variant has a `base`, and needs only its own name next to it.
    """
    schema = Recipe.model_json_schema()
    schema["properties"][BASE] = {
        "description": "The recipe that this one is a variant of: a file relative to this one, or the name of a "
        "shipped recipe. The keys here replace those of the base",
        "minLength": 1,
        "title": "Base",
        "type": "string",
    }
    needs_length = {"properties": {"train": {"required": schema["$defs"]["TrainSection"].pop("required")}}}
    schema |= {"required": ["name"], "if": {"required": [BASE]}, "else": {"required": ["train"], **needs_length}}
    return json.dumps(schema, indent=2) + "\n"
