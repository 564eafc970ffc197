"""Classes and their labels from the source to samples: gaps in the numbers, classes named by numbers, and captions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_recipe
from PIL import Image

from patchloom import Sampler
from patchloom.errors import UserError
from patchloom.models.checkpoints import read_card
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.registry.pyfunc import input_example
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train import train
from patchloom.platform.dataset import open_dataset

OPTIONS = {"steps": 2, "workers": 0}


def labels_of(folder: Path) -> dict[int, int]:
    """The label of each seed in a manifest."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return {line["seed"]: line["label"] for line in lines}


def trained_on(place: Path, labels: dict[str, str | int]) -> Path:
    """A run on images with these labels, 16 x 16, 6 of each."""
    (place / "photos").mkdir(parents=True)
    rows = []
    for number, (name, label) in enumerate(labels.items()):
        for row in range(6):
            pixels = np.random.default_rng(10 * number + row).integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / f"{name}{row}.png")
            rows.append(json.dumps({"key": f"{name}{row}.png", "label": label}) + "\n")
    (place / "photos" / "labels.jsonl").write_text("".join(rows))
    prepare(str(place / "photos"), str(place / "pixels"), resolution=16, workers=0)
    recipe = tiny_recipe(train__images=32, preview__every_images=0)
    train(recipe, str(place / "pixels"), str(place / "run"), workers=0)
    return place / "run"


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six classes, of which 1 and 4 have images."""
    return trained_on(tmp_path_factory.mktemp("gaps"), {"a": 1, "b": 4, "c": 5})


@pytest.fixture(scope="module")
def numerals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the classes 01, 02, 1 and 10, which are names."""
    return trained_on(tmp_path_factory.mktemp("numerals"), {"a": "01", "b": "02", "c": "1", "d": "10"})


def test_only_classes_with_images_are_sampled_by_default(gaps: Path, tmp_path: Path) -> None:
    dataset = open_dataset(gaps.parent / "pixels")
    assert dataset.class_names == list("012345")
    assert [entry.rows for entry in dataset.card.classes] == [0, 6, 0, 0, 6, 6]
    card = read_card(gaps / "model")
    assert (card.empty_classes, card.sampled_classes) == ((0, 2, 3), [1, 4, 5])
    sample(str(gaps), str(tmp_path / "s"), "0-6", **OPTIONS)
    assert labels_of(tmp_path / "s") == {0: 1, 1: 4, 2: 5, 3: 1, 4: 4, 5: 5, 6: 1}
    sample(str(gaps), str(tmp_path / "one"), "0-1", label="0", **OPTIONS)  # by request
    assert labels_of(tmp_path / "one") == {0: 0, 1: 0}


def test_pyfunc_and_sampler_have_the_default_labels_of_sample(gaps: Path, tmp_path: Path) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(register(str(gaps), "gaps"))
    answer = model.predict(pd.DataFrame({"seed": [0, 1, 2, 3]}), params={"steps": 2})
    assert list(answer["label"]) == [1, 4, 5, 1]
    sample(str(gaps), str(tmp_path / "s"), "0-3", **OPTIONS)
    images = Sampler(gaps, steps=2)({"seed": np.arange(4)})["image"]
    for seed in range(4):
        assert np.array_equal(images[seed], np.asarray(Image.open(tmp_path / "s" / "000000" / f"{seed:06d}.png")))
    assert list(input_example(read_card(gaps / "model"))[0]["label"]) == ["1", "5"]


def test_labels_of_a_manifest_are_class_numbers(numerals: Path, tmp_path: Path) -> None:
    assert list(read_card(numerals / "model").class_names) == ["01", "02", "1", "10"]
    sample(str(numerals), str(tmp_path / "a"), "0-7", **OPTIONS)
    assert labels_of(tmp_path / "a") == {seed: seed % 4 for seed in range(8)}
    sample(str(numerals), str(tmp_path / "b"), "0-7", labels=str(tmp_path / "a" / "manifest.jsonl"), **OPTIONS)
    assert labels_of(tmp_path / "b") == labels_of(tmp_path / "a")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "txt"])
def test_text_in_a_labels_file_is_a_class_name(ending: str, numerals: Path, tmp_path: Path) -> None:
    table = pd.DataFrame({"seed": [0, 1, 2, 3], "label": ["01", "10", "1", "02"]})
    place = tmp_path / f"labels.{ending}"
    if ending == "csv":
        table.to_csv(place, index=False)
    elif ending == "jsonl":
        table.to_json(place, orient="records", lines=True)
    elif ending == "parquet":
        table.to_parquet(place)
    else:
        place.write_text("\n".join(table["label"]))
    sample(str(numerals), str(tmp_path / "s"), "0-3", labels=str(place), **OPTIONS)
    assert labels_of(tmp_path / "s") == {0: 0, 1: 3, 2: 2, 3: 1}
    shutil.rmtree(tmp_path / "s")
    place.unlink()
    (tmp_path / "numbers.csv").write_text("seed,label\n0,1\n1,3\n2,\n")  # every value is written plainly
    sample(str(numerals), str(tmp_path / "s"), "0-2", labels=str(tmp_path / "numbers.csv"), **OPTIONS)
    assert labels_of(tmp_path / "s") == {0: 1, 1: 3, 2: -1}


@pytest.mark.parametrize(("label", "number"), [("1", 2), ("01", 0), ("3", 3), ("0", 0), ("-1", -1)])
def test_a_label_option_is_a_name_before_it_is_a_number(
    label: str, number: int, numerals: Path, tmp_path: Path
) -> None:
    sample(str(numerals), str(tmp_path / "s"), "0", label=label, **OPTIONS)
    assert labels_of(tmp_path / "s") == {0: number}


@pytest.mark.parametrize("label", ["4", "001", "1.0", "²"])
def test_a_label_that_is_no_class_is_refused(label: str, numerals: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="01, 02, 1, 10"):
        sample(str(numerals), str(tmp_path / "s"), "0", label=label, **OPTIONS)


def test_rows_of_a_sampler_follow_the_same_rules(numerals: Path) -> None:
    sampler = Sampler(numerals, steps=2)
    images = sampler({"seed": np.array([5] * 3), "label": np.array([2, 2, 2])})["image"]
    for labels in (np.array(["1", "1", "1"]), np.array([2.0, 2.0, 2.0]), np.array(["1", 2, 2.0], dtype=object)):
        assert np.array_equal(sampler({"seed": np.array([5] * 3), "label": labels})["image"], images)
    with pytest.raises(UserError, match="seed 1"):
        sampler({"seed": np.array([0, 1]), "label": np.array([0.0, 0.5])})
