"""Every key of a recipe can be overridden, and an error names the path of the key in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from patchloom.errors import UserError
from patchloom.platform.recipe import Recipe, check_recipe, load_recipe, with_values
from patchloom.platform.recipe.search import load_search

SEARCH: dict[str, Any] = {
    "name": "s",
    "recipe": "recipe.yaml",
    "space": {"patches.p": {"grid": [0.25, 0.5]}},
    "budget": {"images": 100},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """The shortest recipe: all other keys have their defaults."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: short\ntrain: {images: 100}\n")
    return path


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        check_recipe(values)
    return str(error.value)


def test_a_p_above_1_is_refused_with_its_path_and_value() -> None:
    values = {"name": "x", "train": {"images": 1}, "patches": {"p": 1.4}}
    message = error_of(values)
    assert message.startswith("patches.p: 1.4 ") and "0" in message and message.endswith("1") and "\n" not in message


def test_a_missing_section_is_named() -> None:
    assert error_of({"name": "x"}).startswith("train: ")


@pytest.mark.parametrize("p", [float("nan"), float("inf"), -0.001])
def test_a_p_that_is_not_a_fraction_is_refused(p: float) -> None:
    assert error_of({"name": "x", "train": {"images": 1}, "patches": {"p": p}}).startswith("patches.p: ")


def test_an_unknown_key_without_a_similar_one_lists_the_known_keys() -> None:
    message = error_of({"name": "x", "train": {"images": 1}, "noise": {"workers": 4}})
    assert message.startswith("noise.workers: ") and message.endswith("mean, std")


def test_a_recipe_has_no_keys_for_where_it_runs() -> None:
    for key in ("workers", "gpus", "compile", "storage", "microbatch"):
        assert f"{key}: " in error_of({"name": "x", "train": {"images": 1}, key: 1})
        assert f"train.{key}: " in error_of({"name": "x", "train": {"images": 1, key: 1}})


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("patches.p=0.25", lambda recipe: recipe.patches.p == 0.25),
        ("optimizer.lr=1e-3", lambda recipe: recipe.optimizer.lr == 0.001),
        ("model.class_conditional=true", lambda recipe: recipe.model.class_conditional is True),
        ("model.width_multipliers=[1, 2]", lambda recipe: recipe.model.width_multipliers == (1, 2)),
        ("name=a=b", lambda recipe: recipe.name == "a=b"),
        ("patches.sizes.1.weight=0.9", lambda recipe: [s.weight for s in recipe.patches.sizes] == [0.6, 0.9]),
        ("ema.0.halflife_images=9", lambda recipe: recipe.ema[0].halflife_images == 9),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_override_reaches_every_key_also_one_with_its_default(recipe_file: Path, override: str, found: Any) -> None:
    assert found(load_recipe(recipe_file, [override]))


def test_the_last_of_two_overrides_applies(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "start", "named"),
    [
        ("patches.p", "--set patches.p ", "="),
        ("patches.p=2", "patches.p: 2 ", "1"),
        ("patches.pp=0.5", "patches.pp: ", "p?"),
        ("name.first=x", "name.first: ", "first"),
        ("seed=[1", "--set seed=[1: ", "YAML"),
    ],
)
def test_the_error_of_a_wrong_override_names_it(recipe_file: Path, override: str, start: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, [override])
    assert str(error.value).startswith(start) and named in str(error.value)


def test_changed_values_are_checked_and_the_original_is_unchanged(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    changed = with_values(recipe, {"patches.sizes.0.batch_multiplier": 3})
    assert [size.batch_multiplier for size in changed.patches.sizes] == [3, 4]
    assert [size.batch_multiplier for size in recipe.patches.sizes] == [2, 4]
    with pytest.raises(UserError, match=r"patches\.p: 7 "):
        with_values(recipe, {"patches.p": 7})


def test_every_section_is_frozen(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    for section, key in ((recipe, "name"), (recipe.patches, "p"), (recipe.ema[0], "halflife_images")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_the_defaults_are_those_of_the_paper(recipe_file: Path) -> None:
    recipe: Recipe = load_recipe(recipe_file)
    assert recipe.patches.p == 0.5
    assert [(s.fraction, s.weight, s.batch_multiplier) for s in recipe.patches.sizes] == [(0.5, 0.6, 2), (0.25, 0.4, 4)]
    assert (recipe.noise.mean, recipe.noise.std, recipe.model.sigma_data) == (-1.2, 1.2, 0.5)
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (recipe.loss.reduction, recipe.train.block_size) == ("mean", 8)


def load_changed(folder: Path, **changes: Any) -> Any:
    (folder / "search.yaml").write_text(yaml.safe_dump(SEARCH | changes))
    return load_search(folder / "search.yaml")


def test_the_recipe_of_a_search_is_found_in_the_same_folder(recipe_file: Path) -> None:
    search, recipe = load_changed(recipe_file.parent)
    assert recipe.name == "short"
    assert search.settings() == [{"patches.p": 0.25}, {"patches.p": 0.5}]


@pytest.mark.parametrize(
    ("changes", "path", "named"),
    [
        ({"budget": {}}, "budget", "0"),
        ({"budget": {"images": 1, "flops": 1.0}}, "budget", "2"),
        ({"budget": {"hours": 1}}, "budget.hours", "seconds"),
        ({"space": {"patches.p": {"grid": []}}}, "space.patches.p.grid", ""),
        ({"space": {"patches.p": {"gird": [1]}}}, "space.patches.p.gird", "grid?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_of_a_wrong_search_names_the_path(
    recipe_file: Path, changes: dict[str, Any], path: str, named: str
) -> None:
    with pytest.raises(UserError) as error:
        load_changed(recipe_file.parent, **changes)
    assert f"{path}: " in str(error.value) and named in str(error.value)
