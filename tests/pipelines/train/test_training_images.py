"""Training on some of the images: exactly these are read, by any number of workers, and after a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_equal_models, dataset_card, tiny_recipe
from safetensors.numpy import load_file

from patchloom.errors import UserError
from patchloom.pipelines.train import train
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.pipelines.train.run import RowReader
from patchloom.platform.dataset.prepared import open_dataset, write_shard
from patchloom.platform.files.storage import write_json
from patchloom.platform.recipe import Recipe

ROWS, IMAGES = 96, 20


def write_images(folder: Path, rows: list[int]) -> Path:
    """A dataset of these of 96 images, in shards of 8; the key and the label of a row are its number."""
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 3, 16, 16), dtype=np.uint8)
    (folder / "shards").mkdir(parents=True)
    entries = []
    for number, first in enumerate(range(0, len(rows), 8)):
        part = rows[first : first + 8]
        path = folder / "shards" / f"part-{number:05d}.arrow"
        entries.append(write_shard(path, [f"{row:03d}" for row in part], part, {"image": images[part]}).to_dict())
    write_json(folder / "dataset.json", dataset_card(entries, resolution=16, mean=[127.5] * 3, std=[70.0] * 3))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "whole", list(range(ROWS)))


@pytest.fixture(scope="module")
def part(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the chosen images alone."""
    rows = open_dataset(whole).split("train", 0.2, IMAGES).indices().tolist()
    return write_images(tmp_path_factory.mktemp("data") / "part", rows)


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the chosen images."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(recipe_of(), str(whole), str(folder), workers=0)
    return folder


def recipe_of(**changes: Any) -> Recipe:
    without_classes = {"model__class_conditional": False, "model__label_dropout": 0, "preview__every_images": 0}
    return tiny_recipe(**without_classes, **{"data__images": IMAGES, "train__images": 300, **changes})


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_an_epoch_reads_each_chosen_image_once_and_no_other(whole: Path, order: str) -> None:
    dataset = open_dataset(whole)
    chosen, held_out = dataset.split("train", 0.2, IMAGES).indices(), dataset.indices("held_out", 0.2)
    assert len(chosen) == IMAGES and not set(chosen) & set(held_out)
    orders = []
    for seed in (0, 1):
        recipe = recipe_of(data__order=order, data__window_rows=8, seed=seed)
        reader = RowReader(dataset, recipe, torch.device("cpu"), 2)
        for epoch in range(3):
            labels = reader.rows(range(epoch * IMAGES, (epoch + 1) * IMAGES)).label.tolist()
            assert sorted(labels) == chosen.tolist()
            orders.append(labels)
        assert reader.held_out.indices().tolist() == held_out.tolist()
    assert len({tuple(labels) for labels in orders}) == len(orders)


def test_training_on_some_images_is_training_on_a_dataset_of_them(run: Path, part: Path, tmp_path: Path) -> None:
    train(recipe_of(data__images=None, data__held_out_fraction=0), str(part), str(tmp_path / "part"), workers=0)
    assert_equal_models(run, tmp_path / "part")


def test_a_resumed_run_trains_on_the_same_images(run: Path, whole: Path, tmp_path: Path) -> None:
    train(recipe_of(train__images=150), str(whole), str(tmp_path / "run"), workers=0)
    train(recipe_of(), str(whole), str(tmp_path / "run"), workers=0, resume=True)
    assert_equal_models(tmp_path / "run", run)
    with pytest.raises(UserError, match=r"data\.images"):
        train(recipe_of(data__images=None), str(whole), str(tmp_path / "run"), workers=0, resume=True)


@pytest.mark.ray
def test_two_workers_train_on_the_same_images(run: Path, whole: Path, tmp_path: Path) -> None:
    train(recipe_of(), str(whole), str(tmp_path / "two"), workers=2)
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "two"))
    assert all(np.allclose(one[name], two[name], rtol=0, atol=1e-5) for name in one)  # sums in another order


def test_more_images_than_there_are_are_refused_before_a_run_is_written(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.images: 97 images"):
        train(recipe_of(data__images=97), str(whole), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run").exists()


def test_dry_run_says_how_many_of_the_images_are_used(whole: Path) -> None:
    rows = len(open_dataset(whole).split("train", 0.2))
    some, every = (describe_plan(recipe_of(data__images=images), str(whole)) for images in (20, None))
    assert (some.train_rows, every.train_rows, some.split_rows) == (20, rows, rows)
    assert f"parameters, 20 of {rows} training rows" in some.text
    assert f"parameters, {rows} training rows" in every.text
