"""Training with condition images: rows, losses, previews, and runs that do not use them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_equal_models, tiny_recipe
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.checkpoints import load_model, load_sampling_model, read_card
from patchloom.models.normalisation import pixel_normalisation
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.train import train
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.pipelines.train.model_card import new_model_card
from patchloom.pipelines.train.run import RowReader
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe import Recipe, check_recipe

CPU = torch.device("cpu")


def recipe(**changes: Any) -> Recipe:
    given = {"model__class_conditional": False, "model__label_dropout": 0.0, "model__dropout": 0.0,
             "optimizer__lr": 1e-2, "ema__0__halflife_images": 20, **changes}  # fmt: skip
    return tiny_recipe(**given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise: one dataset whose conditions are the images themselves, and one without conditions."""
    folder = tmp_path_factory.mktemp("conditioned")
    images = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=images)
    for name, condition in (("with", str(folder / "noise.npz")), ("without", None)):
        prepare(str(folder / "noise.npz"), str(folder / name), crop="none", condition=condition, workers=0)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    train(recipe(), str(folder / "with"), str(folder / "run"), workers=0)
    return folder / "run"


def test_every_batch_has_the_condition_of_each_row(folder: Path) -> None:
    dataset = open_dataset(folder / "with")
    card = new_model_card(recipe(), dataset)
    reader = RowReader(dataset, recipe(), CPU, 2, card.condition)
    for first in range(0, 200, 40):
        rows = reader.rows(range(first, first + 40))
        assert rows.condition is not None
        assert torch.equal(rows.condition, pixel_normalisation().normalise(rows.image))
    assert RowReader(dataset, recipe(), CPU, 2).rows(range(8)).condition is None


def test_a_network_with_the_answer_as_its_condition_has_a_far_smaller_loss(folder: Path, run: Path) -> None:
    train(recipe(model__condition=False), str(folder / "with"), str(folder / "unused"), workers=0)
    losses = [
        json.loads((path / "progress.jsonl").read_text().splitlines()[-1])["held_out_loss"]
        for path in (run, folder / "unused")
    ]
    assert losses[0] < 0.8 * losses[1]
    train(recipe(), str(folder / "without"), str(folder / "plain"), workers=0)
    assert_equal_models(folder / "unused", folder / "plain")
    card = json.loads((folder / "plain" / "model" / "model.json").read_text())
    assert card["format_version"] == 1 and "condition" not in card and "condition_channels" not in card["denoiser"]


def test_a_run_that_continues_ends_with_the_same_weights(folder: Path, run: Path) -> None:
    shorter = str(folder / "shorter")
    train(recipe(train__images=300), str(folder / "with"), shorter, workers=0)
    train(recipe(), str(folder / "with"), shorter, workers=0, resume=True)
    assert_equal_models(run, folder / "shorter")


def test_the_model_knows_its_condition(folder: Path, run: Path) -> None:
    card = read_card(run / "model")
    assert card.format_version == 2 and card.denoiser.condition_channels == 3 and card.condition is not None
    assert (card.condition.kind, card.condition.channels, card.condition.dtype) == ("images", 3, "uint8")
    assert load_sampling_model(run / "model").denoiser.condition_channels == 3


def test_previews_show_held_out_conditions_next_to_their_samples(folder: Path, run: Path) -> None:
    dataset = open_dataset(folder / "with")
    held_out = dataset.rows(dataset.split("held_out", 0.2).spread(4))["condition"]
    (picture, *_) = sorted((run / "previews").glob("*.png"))
    pixels = np.asarray(Image.open(picture)).transpose(2, 0, 1)
    assert pixels.shape == (3, 16, 8 * 16 + 7 * 2)
    for number, condition in enumerate(held_out):
        assert np.array_equal(pixels[:, :, 36 * number : 36 * number + 16], condition)


def test_float_conditions_reach_the_network_with_unit_variance(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fields").mkdir()
    random, fields = np.random.default_rng(0), []
    for number in range(96):
        fields.append(random.normal([280.0, 1e5, 3.0], [10.0, 500.0, 0.0], (16, 16, 3)).astype(np.float32))
        np.save(tmp_path / "fields" / f"{number:02d}.npy", fields[-1])
    source = str(folder / "noise.npz")
    made = prepare(source, str(tmp_path / "data"), crop="none", condition=str(tmp_path / "fields"), workers=0)
    card = new_model_card(recipe(data__held_out_fraction=0.0), made).condition
    rows = RowReader(made, recipe(data__held_out_fraction=0.0), CPU, 2, card).at(np.arange(96))
    assert rows.condition is not None
    torch.testing.assert_close(rows.condition.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    wanted = torch.tensor([1.0, 1.0, 0.0])  # a constant stays constant
    torch.testing.assert_close(rows.condition.std((0, 2, 3)), wanted, atol=1e-3, rtol=0)


def test_the_dry_run_includes_the_condition(folder: Path) -> None:
    with_condition, without = (describe_plan(recipe(), str(folder / name)) for name in ("with", "without"))
    assert with_condition.parameters - without.parameters == 3 * 8 * 9
    assert with_condition.flops > without.flops
    assert with_condition.step_bytes is not None and without.step_bytes is not None
    assert with_condition.step_bytes > without.step_bytes
    describe_plan(recipe(), str(folder / "with"), measure=True)


def test_dropped_conditions_need_conditions(folder: Path) -> None:
    with pytest.raises(UserError, match="--condition"):
        new_model_card(recipe(model__condition_dropout=0.1), open_dataset(folder / "without"))
    values = recipe().model_dump(mode="json")
    values["model"] |= {"condition": False, "condition_dropout": 0.1}
    with pytest.raises(UserError, match="condition"):
        check_recipe(values)


def test_a_model_without_a_condition_is_where_a_run_with_one_begins(folder: Path, tmp_path: Path) -> None:
    unconditional = recipe(model__condition=False, train__images=100)
    first = train(unconditional, str(folder / "with"), str(tmp_path / "first"), workers=0)
    still = recipe(
        train__images=8, train__init_from=str(first.model), optimizer__lr_rampup_images=10**9, patches__p=1.0
    )
    second = train(still, str(folder / "with"), str(tmp_path / "second"), workers=0)
    x, sigma = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 1.0])
    shown = torch.ones(2, 3, 16, 16)
    with torch.no_grad():  # one step of a learning rate that has hardly begun to grow
        found = load_model(second.model)(x, sigma, condition=shown)
        torch.testing.assert_close(found, load_model(first.model)(x, sigma), atol=1e-4, rtol=1e-3)
