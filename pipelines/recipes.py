"""Shipped recipes: which ones there are, what they cost, and which system of the paper each one trains."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from patchloom.pipelines.train.data_shape import DataShape
from patchloom.pipelines.train.dry_run import STATED_RATE, RunCounts, count_run, gpu_hours
from patchloom.platform.progress import clock, with_descriptions
from patchloom.platform.recipe.files import SHIPPED
from patchloom.platform.recipe.run_recipe import Recipe, check_recipe, load_recipe
from patchloom.platform.recipe.search import load_search
from patchloom.platform.recipe.sections import read_yaml

TWO_CORES_RATE = 1e11  # FLOP/s of the small recipes (docs/LOG.md: steps reach 53 to 73 GFLOP/s per core)
LEAST_GPU_HOURS = 0.1  # a cost below it is given as time of two cores
CHANNELS = {"pixels": 3, "latents": 4}  # of data that a recipe does not say more about
ANY_CLASSES = 10
EDGE_CHANNELS = 1
SMALL = "_small"
COSTS = SHIPPED / "recipe_costs.json"
V100S = 16  # of each run in Tables 1 and 4 and Figure 2 of the paper


@dataclass(frozen=True)
class PaperSystem:
    """A system of the paper (Wang et al. 2023), and the shipped recipe that trains it.

    Args:
        recipe: name of the recipe.
        data: name of the data.
        shape: shape of the data.
        source: where the paper has it.
        fid: FID in the paper, as text; empty if there is none to expect.
        hours: hours of training on 16 V100 in the paper; None if it does not state GPUs.
    """

    recipe: str
    data: str
    shape: DataShape
    source: str
    fid: str = ""
    hours: float | None = None


PIXELS_64, LATENTS_32 = DataShape("pixels", 64, 3), DataShape("latents", 32, 4)
CONTROLLED_64 = DataShape("latents", 64, 4, condition_channels=EDGE_CHANNELS)
PAPER = (
    PaperSystem("celeba64", "CelebA", PIXELS_64, "Table 1, Figure 2", "1.77", 24.6),
    PaperSystem("celeba64_edm", "CelebA", PIXELS_64, "Table 1, Figure 2", "1.66", 48.5),
    PaperSystem("ffhq64", "FFHQ", PIXELS_64, "Table 1", "3.11", 24),
    PaperSystem("ffhq64_edm", "FFHQ", PIXELS_64, "Table 1", "2.60", 48),
    PaperSystem("lsun_bedroom256", "LSUN-Bedroom", LATENTS_32, "Table 2", "2.75"),
    PaperSystem("lsun_bedroom256_ldm", "LSUN-Bedroom", LATENTS_32, "Table 2", "4.32"),
    PaperSystem("lsun_church256", "LSUN-Church", LATENTS_32, "Table 2", "2.66"),
    PaperSystem("lsun_church256_ldm", "LSUN-Church", LATENTS_32, "Table 2", "4.66"),
    PaperSystem(
        "imagenet256", "ImageNet", DataShape("latents", 32, 4, 1000), "Table 3", "7.64; 2.72 with guidance 1.3"
    ),
    PaperSystem("imagenet256_ldm", "ImageNet", DataShape("latents", 32, 4, 1000), "not measured"),
    PaperSystem("adm256", "ImageNet", DataShape("pixels", 256, 3, 1000), "Table 3, for its cost"),
    PaperSystem("afhq64_cat", "AFHQv2-Cat", PIXELS_64, "Table 4", "3.11", 9),
    PaperSystem("afhq64_cat_edm", "AFHQv2-Cat", PIXELS_64, "Table 4", "4.60", 18),
    PaperSystem("afhq64_dog", "AFHQv2-Dog", PIXELS_64, "Table 4", "4.80", 9),
    PaperSystem("afhq64_dog_edm", "AFHQv2-Dog", PIXELS_64, "Table 4", "4.94", 18),
    PaperSystem("afhq64_wild", "AFHQv2-Wild", PIXELS_64, "Table 4", "1.93", 9),
    PaperSystem("afhq64_wild_edm", "AFHQv2-Wild", PIXELS_64, "Table 4", "2.59", 18),
    PaperSystem("controlnet", "HED maps", CONTROLLED_64, "section 4.3"),
    PaperSystem("controlnet_full", "HED maps", CONTROLLED_64, "section 4.3"),
)


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe or search that ships with Patchloom.

    Args:
        name: what `patchloom train` or `patchloom tune` takes.
        title: what it is, in one line.
        data: the data that it was made for; for a search, the recipe that it varies.
        cost: what it costs, with its unit.
        is_search: whether it is a search.
    """

    name: str
    title: str
    data: str
    cost: str
    is_search: bool

    def to_json(self) -> dict[str, Any]:
        """It as JSON values."""
        return asdict(self)


def shipped_recipes() -> list[ShippedRecipe]:
    """All recipes and searches that ship with Patchloom: those of the paper in its order, then the others by name."""
    names = {path.stem: "space" in read_yaml(path) for path in sorted(SHIPPED.glob("*.yaml"))}
    systems, twins = [system.recipe for system in PAPER], {small_twin(name) for name in names}
    order = systems + [name for name in names if name not in systems and name not in twins]
    order += [name for name in map(small_twin, order) if name in names]
    return [_shipped_search(name) if names[name] else _shipped_recipe(name) for name in order]


def small_twin(name: str) -> str:
    """The name of the recipe that makes the same comparison in an hour or two on two cores."""
    return f"{name}{SMALL}"


def _shipped_recipe(name: str) -> ShippedRecipe:
    recipe = load_recipe(name)
    shape = shipped_shape(name, recipe)
    more = {"classes": shape.classes, "conditions": shape.condition_channels}
    data = ", ".join([_sides(shape), *(name for name, count in more.items() if count)])
    return ShippedRecipe(name, _title(name), data, _cost(_flops_of_shipped()[name]), False)


@cache
def _flops_of_shipped() -> dict[str, int]:
    """FLOPs of the training of each shipped recipe, as `recipe_costs` counted them: counting takes half a minute."""
    found: dict[str, int] = json.loads(COSTS.read_text())
    return found


def recipe_costs() -> str:
    """The content of `recipe_costs.json`: FLOPs of the training of each shipped recipe."""
    names = [path.stem for path in sorted(SHIPPED.glob("*.yaml")) if "space" not in read_yaml(path)]
    costs = {
        name: counted(recipe, shipped_shape(name, recipe)).flops for name in names if (recipe := load_recipe(name))
    }
    return f"{json.dumps(costs, indent=2)}\n"


def shipped_shape(name: str, recipe: Recipe) -> DataShape:
    """The shape of the data that a shipped recipe was made for."""
    system = next((system for system in PAPER if system.recipe == name), None)
    return system.shape if system else shape_of_recipe(recipe)


def _sides(shape: DataShape) -> str:
    return str(replace(shape, classes=0, condition_channels=0))


def _shipped_search(name: str) -> ShippedRecipe:
    search, _ = load_search(name)
    others = [unit for unit in search.equal_costs if getattr(search.budget, unit) is None]
    shorter = " and shorter ones" if others else ""
    trials = search.trials if search.is_adaptive else len(search.settings()) * search.repeats
    return ShippedRecipe(name, _title(name), search.recipe, f"{trials} trials of {search.budget.words}{shorter}", True)


def _title(name: str) -> str:
    """The first comment of a file that is not for editors."""
    lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
    first = next(line for line in lines if line.startswith("#") and "$schema" not in line)
    return first.lstrip("# ").rstrip(".")


def shape_of_recipe(recipe: Recipe) -> DataShape:
    """The shape of the data that a recipe was made for, with usual numbers of channels and any number of classes."""
    kind, classes = recipe.data.kind or "pixels", ANY_CLASSES if recipe.model.class_conditional else 0
    conditions = EDGE_CHANNELS if recipe.model.condition_dropout or recipe.model.base else 0
    return DataShape(kind, recipe.data.resolution or 64, CHANNELS[kind], classes, conditions)


def counted(recipe: Recipe, shape: DataShape) -> RunCounts:
    """What a recipe does with data of a shape; counted once for recipes that differ in their names only."""
    return _counted(recipe.model_copy(update={"name": "any"}).model_dump_json(), shape)


@cache
def _counted(recipe: str, shape: DataShape) -> RunCounts:
    return count_run(check_recipe(json.loads(recipe)), shape)


def _cost(flops: float) -> str:
    hours = gpu_hours(flops)
    if hours < LEAST_GPU_HOURS:
        return f"{clock(flops / TWO_CORES_RATE)} on 2 cores"
    return f"{hours:,.1f} GPU-hours"


def recipes_text(recipes: Sequence[ShippedRecipe]) -> str:
    """The text of `patchloom recipes`."""
    rates = f"GPU-hours at {STATED_RATE / 1e12:g} TFLOP/s, two CPU cores at {TWO_CORES_RATE / 1e9:g} GFLOP/s"
    titles = {False: f"Recipes, for `patchloom train` ({rates})", True: "Searches, for `patchloom tune`"}
    parts = []
    for is_search, title in titles.items():
        rows = [[f"  {one.name}", one.cost, one.data, one.title] for one in recipes if one.is_search == is_search]
        parts.append(f"{title}\n{with_descriptions(rows)}")
    return "\n\n".join(parts)


def paper_table() -> str:
    """The systems of the paper as a Markdown table, with costs that are counted."""
    rows = []
    for system in PAPER:
        counts = counted(load_recipe(system.recipe), system.shape)
        rows.append([
            f"`{system.recipe}`", system.data, _sides(system.shape),
            f"{counts.parameters / 1e6:.1f} M", f"{counts.evaluation_flops / 1e9:,.1f}",
            f"{gpu_hours(counts.flops):,.1f}", f"{V100S * system.hours:,.0f}" if system.hours else "not stated",
            system.fid or "none", system.source,
        ])  # fmt: skip
    return _markdown(
        ["recipe", "data", "shape", "parameters", "GFLOP", "GPU-hours", "V100-hours", "FID", "in the paper"], rows
    )


def small_table() -> str:
    """The small twins of the systems as a Markdown table."""
    rows = []
    for system in PAPER:
        recipe = load_recipe(small_twin(system.recipe))
        shape = shape_of_recipe(recipe)
        counts = counted(recipe, shape)
        rows.append([
            f"`{small_twin(system.recipe)}`", _sides(shape), f"{counts.parameters / 1e6:.1f} M",
            f"{counts.evaluation_flops / 1e9:.2f}", f"{recipe.train.images:,}", clock(counts.flops / TWO_CORES_RATE),
        ])  # fmt: skip
    return _markdown(["recipe", "shape", "parameters", "GFLOP", "counted images", "time on 2 cores"], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(recipe_costs() if "--costs" in sys.argv else f"{paper_table()}\n\n{small_table()}\n", end="")
