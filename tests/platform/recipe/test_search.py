"""Searches: every combination once, draws that depend on the seed alone, conditions, and errors with their path."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchloom.errors import UserError
from patchloom.platform.recipe.files import SHIPPED
from patchloom.platform.recipe.run_recipe import with_values
from patchloom.platform.recipe.search import BUDGET_SHARE, Search, load_search
from patchloom.platform.recipe.sections import checked


def search(**changes: Any) -> Search:
    values = {"name": "s", "recipe": "r.yaml", "space": {"patches.p": {"grid": [0.5, 1.0]}}, "budget": {"updates": 5}}
    return checked(Search, {**values, **changes})


def test_a_grid_gives_every_combination_once_in_order() -> None:
    space = {"patches.p": {"grid": [0.25, 0.5]}, "patches.draw": {"grid": ["shared", "stratified"]}}
    assert [tuple(setting.values()) for setting in search(space=space).settings()] == [
        (0.25, "shared"), (0.25, "stratified"), (0.5, "shared"), (0.5, "stratified"),
    ]  # fmt: skip


def test_a_conditional_key_is_present_only_with_its_condition() -> None:
    space = {
        "patches.schedule": {"grid": ["stochastic", "progressive"]},
        "patches.draw": {"grid": ["shared", "stratified"], "when": {"patches.schedule": "stochastic"}},
        "patches.shares_of": {"grid": ["images"], "when": {"patches.schedule": ["progressive"]}},
    }
    assert [tuple(setting.values()) for setting in search(space=space).settings()] == [
        ("stochastic", "shared"), ("stochastic", "stratified"), ("progressive", "images"),
    ]  # fmt: skip


def test_draws_depend_on_the_seed_alone_and_stay_in_their_range() -> None:
    space = {
        "patches.p": {"uniform": [0.1, 0.9]},
        "optimizer.lr": {"loguniform": [1e-5, 1e-1]},
        "model.blocks": {"randint": [1, 3]},
        "loss.reduction": {"choice": ["mean", "sum"]},
    }
    found = search(space=space, trials=400, seed=4).settings()
    assert found == search(space=space, trials=400, seed=4).settings() != search(space=space, trials=400).settings()
    assert len(found) == 400 and all(0.1 <= setting["patches.p"] <= 0.9 for setting in found)
    assert {setting["model.blocks"] for setting in found} == {1, 2, 3}
    assert {setting["loss.reduction"] for setting in found} == {"mean", "sum"}
    # uniform in the logarithm: a half lies below the geometric mean
    below = sum(setting["optimizer.lr"] < 1e-3 for setting in found) / 400
    assert abs(below - 0.5) < 4 * math.sqrt(0.25 / 400)
    middle = sum(setting["patches.p"] for setting in found) / 400
    assert abs(middle - 0.5) < 4 * 0.8 / math.sqrt(12 * 400)


def test_each_draw_is_combined_with_every_grid() -> None:
    space = {"optimizer.lr": {"loguniform": [1e-5, 1e-1]}, "patches.p": {"grid": [0.5, 1.0]}}
    found = search(space=space, trials=3).settings()
    assert [setting["patches.p"] for setting in found] == [0.5, 1.0] * 3
    assert found[0]["optimizer.lr"] == found[1]["optimizer.lr"] != found[2]["optimizer.lr"]


@pytest.mark.parametrize(
    ("changes", "path", "named"),
    [
        ({"space": {"patches.p": {}}}, "space.patches.p", "grid, choice"),
        ({"space": {"patches.p": {"grid": [1], "choice": [1]}}}, "space.patches.p", "2"),
        ({"space": {"patches.p": {"uniform": [0.9, 0.1]}}}, "space.patches.p", "uniform: 0.9 to 0.1"),
        ({"space": {"optimizer.lr": {"loguniform": [0, 1]}}}, "space.optimizer.lr.loguniform.0", "0"),
        ({"space": {"patches.p": {"grid": [1], "when": {"seed": 1}}}}, "space.patches.p.when", "seed"),
        ({"trials": 3}, "trials", "3"),
        ({"budget": {}}, "budget", "images, updates, flops, seconds"),
        ({"budget": {"seconds": 3, "images": 4}}, "budget", "2"),
        ({"of_budget": {"patches.p": 0.5}}, "of_budget.patches.p", "space"),
        ({"of_budget": {"optimizer.lr_rampup_images": 1.5}}, "of_budget.optimizer.lr_rampup_images", "1.5"),
        ({"repeat": 3}, "repeat", "repeats?"),
        ({"searcher": "tpe", "repeats": 2}, "repeats", "tpe"),
        ({"searcher": "tpe", "also": [{"seed": 1}]}, "also", "tpe"),
        ({"searcher": "frontier", "scheduler": {"kind": "asha"}}, "scheduler", "asha"),
        ({"space": {"budget.share": {"grid": [0.5, 1]}}, "scheduler": {"kind": "asha"}}, "scheduler", "budget.share"),
        ({"metric": "final_distance"}, "metric", "final:"),
        ({"metric": "final_distance", "final": {}, "searcher": "tpe"}, "metric", "final_distance"),
        ({"scheduler": {"kind": "asha", "grace": 1.0}}, "scheduler.grace", "1"),
        ({"metric": "fid"}, "metric", "'fid' is not one of 'held_out_loss'"),
    ],
)
def test_the_error_of_a_wrong_search_names_the_path(changes: dict[str, Any], path: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        search(**changes)
    found, _, problem = str(error.value).partition(": ")
    assert found == path and named in problem


def test_further_settings_come_after_the_space_without_duplicates() -> None:
    also = [{"patches.p": 0.5, "patches.schedule": "progressive"}, {"patches.p": 0.5}]
    assert search(also=also).settings() == [{"patches.p": 0.5}, {"patches.p": 1.0}, also[0]]


def test_asha_is_refused_for_progressive_schedules_with_different_patches(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: short\ntrain: {images: 100}\n")
    values = {
        "name": "s", "recipe": "recipe.yaml", "budget": {"images": 100}, "scheduler": {"kind": "asha"},
        "space": {"patches.p": {"grid": [0.25, 0.5]}, "patches.schedule": {"grid": ["stochastic", "progressive"]}},
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"^scheduler\.kind: .*patches\.p"):
        load_search(tmp_path / "search.yaml")
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values | {"scheduler": {"kind": "none"}}))
    load_search(tmp_path / "search.yaml")


class LastChoice:
    """Acts as an Optuna trial that suggests the last choice and the upper end."""

    def suggest_categorical(self, _: str, choices: list[int]) -> int:
        return choices[-1]

    def suggest_float(self, _: str, low: float, high: float, log: bool) -> float:
        return high if not log else low * high

    def suggest_int(self, _: str, low: int, high: int) -> int:
        return high


def test_optuna_suggests_every_kind_of_value_only_where_it_applies() -> None:
    space = {
        "patches.schedule": {"choice": ["stochastic", "progressive"]},
        "patches.draw": {"grid": ["shared", "stratified"], "when": {"patches.schedule": "stochastic"}},
        "patches.sizes": {"choice": [[], [{"fraction": 0.5}]]},
        "patches.p": {"uniform": [0.1, 0.9]},
        "optimizer.lr": {"loguniform": [2.0, 3.0]},
        "model.blocks": {"randint": [1, 4]},
    }
    assert search(space=space, searcher="tpe", trials=5).suggest(LastChoice()) == {
        "patches.schedule": "progressive", "patches.sizes": [{"fraction": 0.5}], "patches.p": 0.9, "optimizer.lr": 6.0,
        "model.blocks": 4,
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*_search*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_search_is_valid(path: Path) -> None:
    found, base = load_search(path.stem)
    settings = found.settings() if not found.is_adaptive else [found.draw(random.Random(n)) for n in range(20)]
    assert len(settings) > 1
    for setting in settings:
        values = {key: value for key, value in setting.items() if key != BUDGET_SHARE}
        recipe = with_values(base, {**found.set, **values, **dict.fromkeys(found.of_budget, 1)})
        assert recipe != base
