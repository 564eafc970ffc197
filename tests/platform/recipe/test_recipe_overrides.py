"""Any key of a recipe can be overridden, and whatever is wrong is said in one line at its path."""

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
    """The shortest recipe: all else is left to the defaults."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: short\ntrain: {images: 100}\n")
    return path


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        check_recipe(values)
    return str(error.value)


def test_a_ratio_above_1_is_refused_in_exactly_these_words() -> None:
    values = {"name": "x", "train": {"images": 1}, "patches": {"p": 1.4}}
    assert refusal(values) == "patches.p: 1.4 is not within 0 and 1"


def test_a_missing_section_is_named() -> None:
    assert refusal({"name": "x"}) == "train: is missing and has no default"


@pytest.mark.parametrize("p", [float("nan"), float("inf"), -0.001])
def test_a_ratio_that_is_no_ratio_is_refused(p: float) -> None:
    assert refusal({"name": "x", "train": {"images": 1}, "patches": {"p": p}}).startswith("patches.p: ")


def test_an_unknown_key_that_resembles_none_gets_the_known_ones() -> None:
    message = refusal({"name": "x", "train": {"images": 1}, "noise": {"workers": 4}})
    assert message == "noise.workers: unknown key; known here: mean, std"


def test_where_it_runs_never_enters_a_recipe() -> None:
    for key in ("workers", "gpus", "compile", "storage", "microbatch"):
        assert f"{key}: unknown key" in refusal({"name": "x", "train": {"images": 1}, key: 1})
        assert f"train.{key}: unknown key" in refusal({"name": "x", "train": {"images": 1, key: 1}})


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
def test_an_override_reaches_any_key_also_one_left_to_its_default(recipe_file: Path, override: str, found: Any) -> None:
    assert found(load_recipe(recipe_file, [override]))


def test_the_last_of_two_overrides_holds(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("patches.p", "has no '='"),
        ("patches.p=2", "patches.p: 2 is not within 0 and 1"),
        ("patches.pp=0.5", "patches.pp: unknown key; did you mean p?"),
        ("name.first=x", "name.first: first is inside a single value"),
        ("seed=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_refused_in_words(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, [override])
    assert message in str(error.value)


def test_changed_values_are_checked_and_the_recipe_stays(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    changed = with_values(recipe, {"patches.sizes.0.batch_multiplier": 3})
    assert [size.batch_multiplier for size in changed.patches.sizes] == [3, 4]
    assert [size.batch_multiplier for size in recipe.patches.sizes] == [2, 4]
    with pytest.raises(UserError, match=r"patches\.p: 7 is not within 0 and 1"):
        with_values(recipe, {"patches.p": 7})


def test_every_section_is_frozen(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    for section, key in ((recipe, "name"), (recipe.patches, "p"), (recipe.ema[0], "halflife_images")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_the_defaults_are_the_papers(recipe_file: Path) -> None:
    recipe: Recipe = load_recipe(recipe_file)
    assert recipe.patches.p == 0.5
    assert [(s.fraction, s.weight, s.batch_multiplier) for s in recipe.patches.sizes] == [(0.5, 0.6, 2), (0.25, 0.4, 4)]
    assert (recipe.noise.mean, recipe.noise.std, recipe.model.sigma_data) == (-1.2, 1.2, 0.5)
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (recipe.loss.reduction, recipe.train.block_size) == ("mean", 8)


def load_changed(folder: Path, **changes: Any) -> Any:
    (folder / "search.yaml").write_text(yaml.safe_dump(SEARCH | changes))
    return load_search(folder / "search.yaml")


def test_a_searchs_recipe_lies_beside_it(recipe_file: Path) -> None:
    search, recipe = load_changed(recipe_file.parent)
    assert recipe.name == "short"
    assert search.settings() == [{"patches.p": 0.25}, {"patches.p": 0.5}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {}}, "budget: give exactly one of images, updates, flops, seconds, not 0"),
        ({"budget": {"images": 1, "flops": 1.0}}, "budget: give exactly one of images, updates, flops, seconds, not 2"),
        ({"budget": {"hours": 1}}, "budget.hours: unknown key"),
        ({"space": {"patches.p": {"grid": []}}}, "space.patches.p.grid: "),
        ({"space": {"patches.p": {"gird": [1]}}}, "space.patches.p.gird: unknown key; did you mean grid?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_search_is_refused_at_its_path(recipe_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_changed(recipe_file.parent, **changes)
    assert message in str(error.value)
