"""Dry runs without a dataset: the same counts and costs as with one of this shape."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_recipe

from patchloom.errors import UserError
from patchloom.pipelines.train.data_shape import DataShape
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.pipelines.tune.dry_run import describe_search
from patchloom.platform.dataset import open_dataset


def test_estimate_for_a_shape_is_that_of_a_dataset_of_the_shape(pixels: Path) -> None:
    shape = DataShape.of(open_dataset(pixels))
    assert shape == DataShape.parse(f"16x16x{shape.channels}", len(open_dataset(pixels).class_names))
    estimate, known = describe_plan(tiny_recipe(), shape), describe_plan(tiny_recipe(), str(pixels))
    assert estimate == replace(known, train_rows=None, split_rows=None, data=estimate.data)
    assert known.train_rows and str(shape) in estimate.data


def test_latents_are_what_the_recipe_says() -> None:
    shape = DataShape.parse("32x32x4", kind="latents")
    assert shape == DataShape("latents", 32, 4)
    recipe = tiny_recipe(model__class_conditional=False, data__mirror=True)
    describe_plan(recipe, replace(shape, kind="pixels"))
    with pytest.raises(UserError, match=r"data\.mirror"):
        describe_plan(recipe, shape)


def test_classes_are_needed_by_conditional_recipes_only() -> None:
    with pytest.raises(UserError, match="--like-classes"):
        describe_plan(tiny_recipe(), DataShape("pixels", 16, 3))
    unconditional = tiny_recipe(model__class_conditional=False)
    parameters = [describe_plan(unconditional, DataShape("pixels", 16, 3, classes)).parameters for classes in (0, 7)]
    assert parameters[0] == parameters[1]
    conditional = [describe_plan(tiny_recipe(), DataShape("pixels", 16, 3, classes)).parameters for classes in (5, 7)]
    assert conditional[1] - conditional[0] == 2 * 8  # a row of the embedding, as wide as that of the noise, per class


def test_conditions_are_further_channels_of_the_input() -> None:
    recipe = tiny_recipe(model__class_conditional=False)
    plain, edges = (describe_plan(recipe, DataShape.parse("16x16x3", conditions=count)) for count in (0, 1))
    assert edges.parameters - plain.parameters == 3 * 3 * 8  # a 3 x 3 convolution of width 8
    with pytest.raises(UserError, match="--like-condition"):
        describe_plan(
            tiny_recipe(model__class_conditional=False, model__condition_dropout=0.1), DataShape("pixels", 16, 3)
        )


@pytest.mark.parametrize("text", ["", "64", "64x64", "64x64x3x10", "64x32x3", "0x0x3", "64x64x0", "axbxc", "-4x-4x3"])
def test_another_text_is_no_shape(text: str) -> None:
    with pytest.raises(UserError, match=f"--like {text}"):
        DataShape.parse(text)


def test_an_evaluation_costs_a_third_of_a_training_step_on_a_full_image() -> None:
    plan = describe_plan(tiny_recipe(), DataShape("pixels", 16, 3, 2))
    assert plan.evaluation_flops * 3 == plan.sizes[0].flops_per_crop
    assert f"{plan.evaluation_flops / 1e9:.4g} GFLOP" in plan.text


def test_a_search_is_planned_for_a_shape_without_measuring() -> None:
    # its steps, of 512 to 2048 crops, need more memory than a laptop has
    first, *trials, total = describe_search("schedule_search", DataShape("pixels", 64, 3)).text.splitlines()
    assert "8 trials" in first and len(trials) == 4  # each with two seeds, for 2e18 FLOPs
    assert all(re.search(r"\b(1,999|2,000),\d{3}\.\d+ TFLOP", line) for line in trials)
    assert "44.4 GPU-hours at 100 TFLOP/s" in total  # 8 x 2e18 / 1e14 / 3600
