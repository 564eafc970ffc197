"""Recipes: one YAML file that says what a model is, read into frozen values with every error at its path."""

import difflib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from patchloom.platform.errors import UserError

Number = TypeVar("Number", int, float)
SHOWN_PROBLEMS = 4
SHIPPED = Path(__file__).parent.parent / "tune_configs"


def _fraction(value: float) -> float:
    if not 0 <= value <= 1:
        raise PydanticCustomError("within", f"{value:g} is not within 0 and 1")
    return value


def _above_zero(value: Number) -> Number:
    if not value > 0:
        raise PydanticCustomError("above_zero", f"{value:g} is not above 0")
    return value


Fraction = Annotated[float, AfterValidator(_fraction), Field(json_schema_extra={"minimum": 0, "maximum": 1})]
Positive = Annotated[float, AfterValidator(_above_zero), Field(json_schema_extra={"exclusiveMinimum": 0})]
Count = Annotated[int, AfterValidator(_above_zero), Field(json_schema_extra={"minimum": 1})]


class Section(BaseModel):
    """Frozen, and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


class Data(Section):
    """What of the dataset is seen, and how."""

    held_out_fraction: Fraction = 0.05
    whiten: bool = Field(True, description="Latents: per channel to mean 0 and std sigma_data, from the dataset's card")
    mirror: bool = Field(False, description="Pixels: mirror half of the images")


class Model(Section):
    """The network. DDPM++ and NCSN++ are EDM's SongUNet, ADM its DhariwalUNet."""

    network: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    width: Count = 128
    width_multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2, 2)
    blocks: Count = 4
    attention: tuple[Count, ...] = Field((16,), description="Resolutions of the full-size image that attend")
    dropout: Fraction = 0.0
    coordinates: bool = True
    class_conditional: bool = False
    label_dropout: Fraction = Field(0.0, description="Share of labels left out, for guidance; the paper uses 0.1")
    sigma_data: Positive = 0.5


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
    draw: Literal["shared"] = Field("shared", description="One size per optimisation step for all workers")

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
    """One running average of the weights; the first of the list is the one that is registered."""

    halflife_images: Positive = 500_000
    rampup_ratio: Positive = 0.05


class Train(Section):
    """How long, in counted images, and in which pieces."""

    images: Count
    batch_size: Count = 512
    block_size: Count = Field(8, description="Samples that share a random generator; divides the batch")
    checkpoint_every_images: Count = 1_000_000
    log_every_images: Count = 50_000

    @model_validator(mode="after")
    def _blocks_divide_the_batch(self) -> "Train":
        if self.batch_size % self.block_size:
            raise PydanticCustomError(
                "blocks", f"batch_size {self.batch_size} is not a multiple of block_size {self.block_size}"
            )
        return self


class Preview(Section):
    """Grids of samples from fixed seeds while it trains; `every_images: 0` makes none."""

    every_images: Annotated[int, Field(ge=0)] = 1_000_000
    count: Count = 16
    steps: Count = 12


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
    ema: Annotated[tuple[Average, ...], Field(min_length=1)] = (Average(),)
    train: Train
    preview: Preview = Preview()


class Values(Section):
    """The values that a key of a search takes."""

    grid: Annotated[tuple[Any, ...], Field(min_length=1)]


class Budget(Section):
    """What every trial may spend, in exactly one of these."""

    images: Count | None = None
    updates: Count | None = None
    flops: Positive | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Budget":
        given = [name for name in ("images", "updates", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError("budget", f"give exactly one of images, updates and flops, not {len(given)}")
        return self


class Search(Section):
    """Many runs of one recipe: a grid over its keys at an equal budget, compared on the held-out loss."""

    format_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    recipe: str
    set: dict[str, Any] = Field({}, description="Recipe keys that only the trials have, such as shorter ramps")
    space: Annotated[dict[str, Values], Field(min_length=1)]
    budget: Budget

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the space's values, in order: one trial each."""
        grids = [[(key, value) for value in values.grid] for key, values in self.space.items()]
        return [dict(combination) for combination in itertools.product(*grids)]


def find_config(name: str) -> Path:
    """A YAML file by path, or by name among those shipped in tune_configs/."""
    for path in (Path(name).expanduser(), SHIPPED / name, SHIPPED / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*.yaml")))
    raise UserError(f"{name} is neither a file nor a shipped recipe: give a path, or one of {shipped}")


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `a.b=value` overrides; raises UserError at the path of what is wrong."""
    values = _read_yaml(find_config(str(name)))
    if "space" in values:
        raise UserError(f"{name} is a search: run it with `patchloom tune`, or give a recipe")
    if overrides:
        values = _with_defaults(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override} has no '=': write --set patches.p=0.25")
        set_key(values, key, _parse_value(text, key))
    return check_recipe(values)


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Every default written out, so that overrides reach into lists; what needs its overrides stays as it is."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def check_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values."""
    return _checked(Recipe, values)


def load_search(name: str | Path) -> tuple[Search, Recipe]:
    """Read a search and the recipe that it starts from, which lies beside it or is a shipped one."""
    path = find_config(str(name))
    values = _read_yaml(path)
    if "space" not in values and "train" in values:
        raise UserError(f"{name} is a recipe: train it with `patchloom train`, or give a search (with a `space`)")
    search = _checked(Search, values)
    beside = path.parent / search.recipe
    return search, load_recipe(beside if beside.is_file() else search.recipe)


def with_values(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The same recipe with some keys changed, checked again."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        set_key(values, key, value)
    return check_recipe(values)


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.0.c` in nested dictionaries and lists."""
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        if isinstance(place, list):
            place = place[_list_index(place, part, key)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise UserError(f"{key}: {part} is inside a single value: check the key")
    if isinstance(place, list):
        place[_list_index(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(f"{key}: {last} is inside a single value: check the key")


def _list_index(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"{key}: {part} is no position of a list of {len(place)}: count from 0")
    return int(part)


def _parse_value(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {key}={text}: the value is not YAML: quote it") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = str(error).replace("\n", " ")
        raise UserError(f"{path} is not YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: a recipe starts with `name:`")
    return values


def _checked(kind: type[SectionType], values: dict[str, Any]) -> SectionType:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, item) for item in error.errors(include_url=False)]
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise UserError("; ".join(problems[:SHOWN_PROBLEMS] + more)) from None


def _problem(kind: type[Section], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(kind, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: is missing and has no default"
    message = item["msg"]
    if item["type"] == "literal_error":
        message = f"{item['input']!r} is not one of {item['ctx']['expected']}"
    elif "valid" in message.lower():
        message = f"{item['input']!r} is wrong: {message[0].lower()}{message[1:]}"
    return f"{path}: {message}" if path else message


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The known keys of the section that a path leads to, through lists and dictionaries of sections."""
    current: type[BaseModel] = kind
    for part in location:
        if part not in current.model_fields:
            continue  # a position in a list, or a key of a dictionary
        annotation = current.model_fields[part].annotation
        sections = [inner for inner in (annotation, *get_args(annotation)) if _is_section(inner)]
        if not sections:
            break
        current = sections[0]
    return list(current.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def recipe_schema() -> str:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(recipe_schema(), end="")
