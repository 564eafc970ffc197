"""Variants: recipes with a `base`, chains of them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny_recipe

from patchloom.errors import UserError
from patchloom.platform.recipe.files import SHIPPED
from patchloom.platform.recipe.run_recipe import load_recipe, recipe_schema, recipe_yaml, with_values
from patchloom.platform.recipe.search import load_search

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML file below the temporary folder."""

    def write_file(name: str, /, **values: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(values))
        return path

    return write_file


def test_a_variant_is_its_base_with_other_keys(write: Write) -> None:
    base = tiny_recipe()
    write("base.yaml", **yaml.safe_load(recipe_yaml(base)))
    sizes = [{"fraction": 0.5, "weight": 1, "batch_multiplier": 3}]
    path = write("mine.yaml", base="base.yaml", name="mine", model={"dropout": 0.3}, patches={"p": 1, "sizes": sizes})
    expected = {"name": "mine", "model.dropout": 0.3, "patches.p": 1, "patches.sizes": sizes}
    assert load_recipe(path) == with_values(base, expected)
    assert load_recipe(path, ["model.dropout=0", "patches.sizes.0.weight=2"]) == with_values(
        base, expected | {"model.dropout": 0, "patches.sizes": [sizes[0] | {"weight": 2}]}
    )
    assert "base" not in yaml.safe_load(recipe_yaml(load_recipe(path)))  # a run keeps the result


def test_bases_form_chains_across_folders_and_shipped_recipes(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write("elsewhere/middle.yaml", name="not this one").parent)  # not relative to here
    write("middle.yaml", base="celeba64", name="middle", patches={"p": 0.25}, train={"images": 1000})
    path = write("inner/last.yaml", base="../middle.yaml", name="last", patches={"schedule": "progressive"})
    shipped = load_recipe("celeba64")
    assert load_recipe(path) == with_values(
        shipped, {"name": "last", "patches.p": 0.25, "patches.schedule": "progressive", "train.images": 1000}
    )
    write("celeba64.yaml", base="celeba64", name="of-the-same-name")  # a file next to it comes before a shipped one
    assert load_recipe(tmp_path / "celeba64.yaml").train == shipped.train


def test_each_recipe_has_a_name(write: Write) -> None:
    with pytest.raises(UserError, match=r"^name: "):
        load_recipe(write("mine.yaml", base="celeba64", patches={"p": 1}))


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("celeba46.yaml", ["a.yaml", "celeba46.yaml", "celeba64"]),
        ("a.yaml", ["a.yaml -> a.yaml"]),
        ("b.yaml", ["a.yaml -> b.yaml -> c.yaml -> b.yaml"]),
        ("wrong.yaml", ["wrong.yaml: patches.pp"]),
        ("p_search", ["p_search.yaml"]),
        ("p_search.yaml", ["p_search.yaml"]),
        (["celeba64"], ["base", "celeba64"]),
        (5, ["base", "5"]),
        ("", ["base", "''"]),
    ],
)
def test_a_base_that_is_missing_wrong_or_circular_is_refused(base: object, named: list[str], write: Write) -> None:
    path = write("a.yaml", base=base, name="a")
    write("b.yaml", base="c.yaml", name="b")
    write("c.yaml", base="b.yaml", name="c")
    write("wrong.yaml", name="wrong", train={"images": 5}, patches={"pp": 1})
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert all(text in str(error.value) for text in named), error.value
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_variant_names_its_key(write: Write) -> None:
    with pytest.raises(UserError, match=r"^patches\.p: 1\.4 .*train\.image: "):
        load_recipe(write("mine.yaml", base="celeba64", name="a", patches={"p": 1.4}, train={"image": 5}))


def test_a_search_can_vary_a_variant(write: Write) -> None:
    write("mine.yaml", base="demo_pixels", name="mine", model={"width": 16})
    path = write("search.yaml", name="s", recipe="mine.yaml", budget={"images": 5}, space={"seed": {"grid": [1, 2]}})
    assert load_search(path)[1] == with_values(load_recipe("demo_pixels"), {"name": "mine", "model.width": 16})
    write("mine.yaml", base="mine.yaml", name="mine")
    with pytest.raises(UserError, match=r"mine\.yaml -> mine\.yaml"):
        load_search(path)


def test_schema_asks_for_the_length_of_recipes_without_a_base() -> None:
    schema = json.loads(recipe_schema())
    assert schema["properties"]["base"]["type"] == "string"
    assert schema["required"] == ["name"] and schema["if"] == {"required": ["base"]}
    assert schema["else"] == {"required": ["train"], "properties": {"train": {"required": ["images"]}}}
    shipped = [yaml.safe_load(path.read_text()) for path in SHIPPED.glob("*.yaml")]
    for values in (one for one in shipped if "space" not in one):
        assert values.keys() <= schema["properties"].keys()
        assert "name" in values and ("base" in values or "images" in values["train"])
