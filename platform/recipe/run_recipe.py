"""Recipes: one YAML file that says what a model is, read into frozen values with every error at its path."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from patchloom.errors import UserError
from patchloom.platform.recipe.sections import (
    Count,
    Fraction,
    Positive,
    Section,
    checked,
    parse_value,
    read_yaml,
    set_key,
)

SHIPPED = Path(__file__).parents[2] / "tune_configs"


class Data(Section):
    """What of the dataset is seen, and how."""

    held_out_fraction: Fraction = 0.05
    whiten: bool = Field(True, description="Latents: per channel to mean 0 and std sigma_data, from the dataset's card")
    mirror: bool = Field(False, description="Pixels: mirror half of the images, and not the coordinates")
    augment: Fraction = Field(
        0.0, description="Pixels: probability of each of EDM's geometric transformations; the coordinates move along"
    )


def _encoding(value: Any) -> Any:
    """`true` and `false` (YAML's `on` and `off`) are what there was before there were several encodings."""
    return {True: "linear", False: "none"}[value] if isinstance(value, bool) else value


class Model(Section):
    """The network. DDPM++ and NCSN++ are EDM's SongUNet, ADM its DhariwalUNet; or a `backbone` of one's own."""

    network: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    width: Count = 128
    width_multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2, 2)
    blocks: Count = 4
    attention: tuple[Count, ...] = Field((16,), description="Resolutions of the full-size image that attend")
    dropout: Fraction = 0.0
    backbone: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:Class of a network of one's own, called as net(x, noise_condition, labels); "
        "needs --allow-backbone",
    )
    backbone_options: dict[str, Any] = Field({}, description="Further arguments of its constructor")
    coordinates: Annotated[Literal["linear", "periodic", "implicit", "none"], BeforeValidator(_encoding)] = Field(
        "linear", description="How a patch's place is told: as channels, or not at all"
    )
    patch_size_condition: bool = Field(False, description="Tell the network the patch's size too (Eq. 4)")
    class_conditional: bool = False
    label_dropout: Fraction = Field(0.0, description="Share of labels left out, for guidance; the paper uses 0.1")
    sigma_data: Positive = 0.5

    @model_validator(mode="after")
    def _one_network(self) -> "Model":
        if self.backbone is None:
            if self.backbone_options:
                raise PydanticCustomError("backbone", "backbone_options are given and there is no backbone: name one")
            return self
        named = ("network", "width", "width_multipliers", "blocks", "attention", "dropout")
        changed = [name for name in named if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise PydanticCustomError(
                "backbone", f"{', '.join(changed)}: a backbone builds itself; move them to backbone_options"
            )
        if self.coordinates == "implicit" or self.patch_size_condition:
            raise PydanticCustomError(
                "backbone", "implicit coordinates and patch_size_condition are inside patchloom's networks: leave them"
            )
        return self


class SmallerPatch(Section):
    """One patch size below the full image."""

    fraction: Fraction
    weight: Positive
    batch_multiplier: Count


class Patches(Section):
    """Which crop sizes are trained, and when (Patch Diffusion, Eq. 5)."""

    p: Fraction = Field(0.5, description="Ratio of steps on full-size images")
    schedule: Literal["stochastic", "progressive"] = "stochastic"
    sizes: tuple[SmallerPatch, ...] = (
        SmallerPatch(fraction=0.5, weight=0.6, batch_multiplier=2),
        SmallerPatch(fraction=0.25, weight=0.4, batch_multiplier=4),
    )
    draw: Literal["shared", "stratified", "independent"] = Field(
        "shared",
        description="A stochastic step's sizes: one for all workers, the same mix of all in every step, or one for "
        "each of train.emulated_ranks",
    )
    shares_of: Literal["updates", "images"] = Field(
        "updates", description="What a progressive schedule's shares are of: updates (paper) or images (released code)"
    )

    @model_validator(mode="after")
    def _schedule_makes_sense(self) -> "Patches":
        if self.schedule == "progressive" and self.draw != "shared":
            raise PydanticCustomError(
                "draw",
                f"a progressive schedule has one size at a time and nothing to draw {self.draw}: set draw: shared",
            )
        if self.schedule == "stochastic" and self.shares_of != "updates":
            raise PydanticCustomError("shares_of", "a stochastic schedule draws updates: set shares_of: updates")
        return self

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> "Patches":
        fractions = [size.fraction for size in self.sizes]
        if any(not 0 < fraction < 1 for fraction in fractions):
            raise PydanticCustomError("sizes", "sizes are fractions between 0 and 1; the full image is p's")
        if len(set(fractions)) < len(fractions):
            raise PydanticCustomError("sizes", "two sizes have the same fraction: merge them")
        if not self.sizes and self.p < 1:
            raise PydanticCustomError("sizes", f"p is {self.p:g} and there is no smaller size: add one or set p to 1")
        return self


class Noise(Section):
    """Training noise: ln(sigma) ~ N(mean, std^2) (EDM, Table 1)."""

    mean: float = -1.2
    std: Positive = 1.2


class Loss(Section):
    """How a crop's error becomes one number: `mean` over its pixels, or `sum` as the paper's code."""

    reduction: Literal["mean", "sum"] = "mean"


class Optimizer(Section):
    """Adam, with a linear ramp of the learning rate over the first images."""

    lr: Positive = 2e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    lr_rampup_images: Annotated[int, Field(ge=0)] = 10_000_000


class Average(Section):
    """A running average of the weights: EDM's, which forgets half in `halflife_images`, or EDM2's power function."""

    halflife_images: Positive = 500_000
    rampup_ratio: Positive = 0.05
    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)] | None = Field(
        None, description="A power-function average of this width relative to the run, in place of a half-life"
    )
    snapshot_every_images: Annotated[int, Field(ge=0)] = Field(
        0, description="Power functions: keep the average in RUN/ema, for `patchloom models average`; 0 keeps none"
    )

    @model_validator(mode="after")
    def _snapshots_are_of_power_functions(self) -> "Average":
        if self.snapshot_every_images and self.sigma_rel is None:
            raise PydanticCustomError(
                "snapshots", "snapshots are of power-function averages: set sigma_rel, or snapshot_every_images: 0"
            )
        return self


class Keep(Section):
    """Which checkpoints stay: the newest, one every so many images, and those of the lowest held-out loss."""

    last: Count = 2
    every_images: Annotated[int, Field(ge=0)] = 0
    best: Annotated[int, Field(ge=0)] = 0


class Train(Section):
    """How long, in counted images, and in which pieces."""

    images: Count
    init_from: str | None = Field(
        None, description="Begin with these weights: models:/NAME@ALIAS, a model folder, or an EDM snapshot (.pkl)"
    )
    batch_size: Count = 512
    block_size: Count = Field(8, description="Samples that share a random generator; divides the batch")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="Of the network's arithmetic; weights and averages stay fp32"
    )
    emulated_ranks: Count = Field(
        1, description="Groups of the batch that draw their own patch size (patches.draw: independent)"
    )
    checkpoint_every_images: Count = 1_000_000
    keep: Keep = Keep()
    log_every_images: Count = 50_000
    held_out_every_images: Annotated[int, Field(ge=0)] = Field(
        0, description="The loss on held-out images; 0 measures it with every preview and at the end"
    )

    @model_validator(mode="after")
    def _blocks_divide_the_batch(self) -> "Train":
        if self.batch_size % self.block_size:
            raise PydanticCustomError(
                "blocks", f"batch_size {self.batch_size} is not a multiple of block_size {self.block_size}"
            )
        return self


class Preview(Section):
    """Grids of samples from fixed seeds, and perhaps a distance, while it trains; `every_images: 0` makes none."""

    every_images: Annotated[int, Field(ge=0)] = 1_000_000
    count: Count = 16
    steps: Count = 12
    frechet_samples: Annotated[int, Field(ge=0)] = Field(
        0, description="Samples whose Fréchet distance to training rows is measured, on mean tile colours (not FID)"
    )


class Recipe(Section):
    """What a model is. Where it runs (workers, devices, addresses) never stands here."""

    format_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data = Data()
    model: Model = Model()
    patches: Patches = Patches()
    noise: Noise = Noise()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    ema: Annotated[tuple[Average, ...], Field(min_length=1)] = Field(
        (Average(),), description="The first is the one that is registered"
    )
    train: Train
    preview: Preview = Preview()

    @model_validator(mode="after")
    def _draws_fit_the_batch(self) -> "Recipe":
        batch, block, ranks = self.train.batch_size, self.train.block_size, self.train.emulated_ranks
        if self.patches.draw == "independent" and batch % (block * ranks):
            raise PydanticCustomError(
                "ranks",
                f"train.emulated_ranks: {ranks} ranks cannot share batch_size {batch} in whole blocks of {block}: "
                f"make the batch a multiple of {block * ranks}",
            )
        if self.patches.draw != "independent" and ranks > 1:
            raise PydanticCustomError(
                "ranks", "train.emulated_ranks draw their own sizes: set patches.draw: independent, or leave it at 1"
            )
        if self.patches.draw == "stratified":
            self._every_size_in_every_step()
        return self

    def _every_size_in_every_step(self) -> None:
        patches, blocks = self.patches, self.train.batch_size / self.train.block_size
        total = sum(size.weight for size in patches.sizes)
        shares = {
            size.fraction: (1 - patches.p) * size.weight / total * size.batch_multiplier for size in patches.sizes
        }
        for fraction, share in {1.0: patches.p, **shares}.items():
            if 0 < share * blocks < 1:
                raise PydanticCustomError(
                    "draw",
                    f"patches.draw: a stratified step would hold {share * blocks:.2g} blocks of size {fraction:g}, and "
                    "at least 1 was wanted: raise train.batch_size or lower train.block_size",
                )


def find_config(name: str) -> Path:
    """A YAML file by path, or by name among those shipped in tune_configs/."""
    for path in (Path(name).expanduser(), SHIPPED / name, SHIPPED / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*.yaml")))
    raise UserError(f"{name} is neither a file nor a shipped recipe: give a path, or one of {shipped}")


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: the path of a YAML file, or the name of a shipped recipe such as "demo_pixels".
        overrides: changes, such as ["patches.p=0.25", "train.images=10000"].

    Returns:
        The recipe, with every default filled in.

    Raises:
        UserError: there is no such recipe, or a key or value is wrong; the message names its path.

    Example:
        recipe = patchloom.load_recipe("demo_pixels", ["patches.p=0.25"])
        print(recipe.patches.p)
    """
    values = read_yaml(find_config(str(name)))
    if "space" in values:
        raise UserError(f"{name} is a search: run it with `patchloom tune`, or give a recipe")
    if overrides:
        values = _with_defaults(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override} has no '=': write --set patches.p=0.25")
        set_key(values, key, parse_value(text, key))
    return check_recipe(values)


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Every default written out, so that overrides reach into lists; what needs its overrides stays as it is."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def check_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values."""
    return checked(Recipe, values)


def with_values(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The same recipe with some keys changed, checked again."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        set_key(values, key, value)
    return check_recipe(values)


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def recipe_schema() -> str:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
