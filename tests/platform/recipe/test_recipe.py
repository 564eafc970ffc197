"""Recipes: errors name the path, every shipped file is valid, and a recipe cannot be changed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny_recipe
from pydantic import ValidationError

from patchloom.errors import UserError
from patchloom.platform.recipe.files import SHIPPED
from patchloom.platform.recipe.run_recipe import check_recipe, load_recipe, recipe_yaml
from patchloom.platform.recipe.search import Search, load_search

MINIMAL: dict[str, Any] = {"name": "x", "train": {"images": 100}}


@pytest.mark.parametrize(
    ("values", "path", "named"),
    [
        ({"patches": {"p": 1.4}}, "patches.p", ["1.4", "0", "1"]),
        ({"patches": {"pp": 0.5}}, "patches.pp", ["p?"]),
        ({"optimiser": {}}, "optimiser", ["optimizer"]),
        ({"ema": [{"halflife": 5}]}, "ema.0.halflife", ["halflife_images"]),
        ({"train": {}}, "train.images", []),
        ({"train": {"images": 0}}, "train.images", ["0"]),
        ({"train": {"images": "many"}}, "train.images", ["'many'"]),
        ({"train": {"images": 9, "batch_size": 12}}, "train", ["batch_size 12", "block_size 8"]),
        ({"model": {"network": "vit"}}, "model.network", ["'vit'", "'ddpmpp', 'ncsnpp', 'adm' or 'controlnet'"]),
        ({"patches": {"sizes": []}}, "patches", ["p", "0.5"]),
        ({"patches": {"sizes": [{"fraction": 1, "weight": 1, "batch_multiplier": 1}]}}, "patches", ["fraction"]),
    ],
)
def test_an_error_names_the_path_and_the_value(values: dict[str, Any], path: str, named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_recipe({**MINIMAL, **values})
    found, _, problem = str(error.value).partition(": ")
    assert found == path
    assert all(name in problem for name in named)


def test_one_error_names_all_wrong_keys() -> None:
    with pytest.raises(UserError, match=r"patches\.p: .*; train\.block_size: "):
        check_recipe({"name": "x", "patches": {"p": -1}, "train": {"images": 5, "block_size": 0}})


def test_overrides_reach_into_lists_and_are_checked(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe_yaml(tiny_recipe()))
    recipe = load_recipe(tmp_path / "r.yaml", ["patches.p=0.25", "patches.sizes.1.batch_multiplier=8", "seed=7"])
    assert (recipe.patches.p, recipe.patches.sizes[1].batch_multiplier, recipe.seed) == (0.25, 8, 7)
    assert recipe.patches.sizes[0] == tiny_recipe().patches.sizes[0]
    for override, named in (
        ("seed", "--set seed"),
        ("ema.5.halflife_images=1", r"ema\.5\.halflife_images"),
        ("seed.a=1", r"seed\.a"),
    ):
        with pytest.raises(UserError, match=named):
            load_recipe(tmp_path / "r.yaml", [override])


def test_a_recipe_is_frozen_and_the_same_after_writing_and_reading_yaml() -> None:
    recipe = tiny_recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 4  # type: ignore[misc]
    assert check_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    if "space" in values:
        search, base = load_search(path.stem)
        assert len(search.settings()) > 1
        assert base.name
    else:
        assert load_recipe(path.stem).train.images > 0


def test_a_search_tries_the_product_of_its_grids() -> None:
    search = Search.model_validate({
        "name": "s", "recipe": "r", "budget": {"images": 5},
        "space": {"patches.p": {"grid": [0.5, 1]}, "seed": {"grid": [1, 2]}},
    })  # fmt: skip
    assert search.settings() == [{"patches.p": p, "seed": seed} for p in (0.5, 1) for seed in (1, 2)]
    with pytest.raises(ValidationError, match=r"images, updates, flops, seconds.* 2"):
        Search.model_validate({**search.model_dump(), "budget": {"images": 5, "updates": 5}})


def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"list\.yaml"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match=r"demo_latents\b"):
        load_recipe("demo_latent")
    with pytest.raises(UserError, match="patchloom recipes"):
        load_recipe("nonesuch")


def test_stratified_block_may_be_below_1_by_rounding_only() -> None:
    smaller = [{"fraction": 0.5, "weight": 1.0, "batch_multiplier": 1}]
    patches = {"p": 0.9, "draw": "stratified", "sizes": smaller}  # (1 - 0.9) * 10 is 0.9999999999999998
    values = {**MINIMAL, "patches": patches, "train": {"images": 100, "batch_size": 80, "block_size": 8}}
    assert check_recipe(values).patches.p == 0.9
    with pytest.raises(UserError, match=r"0\.5"):
        check_recipe({**values, "patches": {**patches, "p": 0.95}})
