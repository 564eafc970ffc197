"""Samples with conditions: which file each seed follows, what is recorded, and what is refused."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import photograph, tiny_recipe
from mlflow.exceptions import MlflowException
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.cards import ConditionCard
from patchloom.models.checkpoints import load_sampling_model
from patchloom.models.conditions import depth_to_space
from patchloom.models.generate import Sampling, generate_padded
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.conditions import edges
from patchloom.pipelines.registry.describing import describe_model
from patchloom.pipelines.registry.pyfunc import SamplerModel
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample import sample
from patchloom.pipelines.sample.conditions import finished_condition
from patchloom.pipelines.sample.sampler import Sampler
from patchloom.pipelines.sample.sampling import describe_sampling
from patchloom.pipelines.train import train

OPTIONS: dict[str, Any] = {"steps": 2, "batch": 4, "workers": 0}
SEEDS = list(range(7))


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with edges, a run on it, and the edges of five photographs as PNG files."""
    folder = tmp_path_factory.mktemp("controlled")
    prepare(str(images), str(folder / "data"), resolution=16, condition="edges", workers=0)
    recipe = tiny_recipe(train__images=200, model__condition_dropout=0.1, train__checkpoint_every_images=1000)
    train(recipe, str(folder / "data"), str(folder / "run"), workers=0)
    (folder / "edges").mkdir()
    pixels = photograph("coffee.png")
    for number, name in enumerate("caebd"):
        top = 40 * number
        found = edges(np.ascontiguousarray(pixels[top : top + 128 : 8, top : top + 128 : 8]))
        Image.fromarray(found[:, :, 0]).save(folder / "edges" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def controls(folder: Path) -> np.ndarray:
    """(5, 1, 16, 16), the files in the order of their names."""
    files = sorted((folder / "edges").iterdir())
    return np.stack([np.asarray(Image.open(path))[None] for path in files])


@pytest.fixture(scope="module")
def samples(folder: Path) -> Path:
    sample(str(folder / "run"), str(folder / "samples"), SEEDS, conditions=str(folder / "edges"), **OPTIONS)
    return folder / "samples"


def png_pixels(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("[0-9]*/*.png"))
    return np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in files])


def test_seed_i_follows_file_i_modulo_their_number(folder: Path, samples: Path, controls: np.ndarray) -> None:
    model = load_sampling_model(folder / "run" / "model")
    shown = torch.from_numpy(controls[np.array(SEEDS) % 5])
    wanted = generate_padded(model, SEEDS, [seed % 2 for seed in SEEDS], 4, Sampling(steps=2), condition=shown)
    assert np.array_equal(png_pixels(samples), wanted.numpy())
    turned = generate_padded(model, SEEDS, [seed % 2 for seed in SEEDS], 4, Sampling(steps=2), condition=shown.flip(0))
    assert not torch.equal(turned, wanted)


def test_the_folder_records_each_condition(folder: Path, samples: Path, pixels: Path) -> None:
    content = (samples / "conditions.jsonl").read_bytes()
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["file"] for line in lines] == [f"{name}.png" for name in "abcde"]
    for line in lines:
        assert line["sha256"] == hashlib.sha256((folder / "edges" / line["file"]).read_bytes()).hexdigest()
    card = json.loads((samples / "sampling.json").read_text())
    assert card["conditions"] == {"count": 5, "sha256": hashlib.sha256(content).hexdigest()}
    measured = evaluate(str(samples), str(pixels), metrics=["fd"], features="colours")
    assert measured.identity["conditions"] == card["conditions"]  # results on other conditions are not compared


def test_missing_samples_are_made_again_and_others_are_added(folder: Path, samples: Path) -> None:
    before, again = png_pixels(samples), folder / "again"
    arguments = {"conditions": str(folder / "edges"), **OPTIONS}
    sample(str(folder / "run"), str(again), [5, 2], **arguments)
    sample(str(folder / "run"), str(again), SEEDS, **arguments)
    (again / "000000" / "000003.png").write_bytes(b"damaged")
    assert sample(str(folder / "run"), str(again), SEEDS, **arguments).made == 1
    assert np.array_equal(png_pixels(again), before)
    changed = folder / "changed"
    changed.mkdir()
    for path in (folder / "edges").iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    assert sample(str(folder / "run"), str(again), SEEDS, **{**arguments, "conditions": str(changed)}).made == 0
    Image.new("L", (16, 16)).save(changed / "b.png")
    with pytest.raises(UserError, match=r"conditions\.sha256"):
        sample(str(folder / "run"), str(again), SEEDS, **{**arguments, "conditions": str(changed)})


@pytest.mark.ray
def test_workers_give_the_same_bytes(folder: Path, samples: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "workers": 2, "conditions": str(folder / "edges")}
    sample(str(folder / "run"), str(tmp_path / "samples"), SEEDS, **options)
    assert np.array_equal(png_pixels(tmp_path / "samples"), png_pixels(samples))


def test_a_dataset_with_conditions_gives_those_of_its_rows(folder: Path, images: Path, tmp_path: Path) -> None:
    made = prepare(str(images), str(tmp_path / "data"), resolution=16, condition="edges", workers=0)
    sample(str(folder / "run"), str(tmp_path / "samples"), SEEDS, conditions=str(made.path), **OPTIONS)
    model = load_sampling_model(folder / "run" / "model")
    shown = torch.from_numpy(made.rows(SEEDS)["condition"])
    wanted = generate_padded(model, SEEDS, [seed % 2 for seed in SEEDS], 4, Sampling(steps=2), condition=shown)
    assert np.array_equal(png_pixels(tmp_path / "samples"), wanted.numpy())
    other = prepare(str(images), str(tmp_path / "other"), resolution=16, condition="low-res:2", workers=0)
    plain = prepare(str(images), str(tmp_path / "plain"), resolution=16, workers=0)
    for dataset in (other, plain):
        with pytest.raises(UserError, match="prepare it with --condition"):
            sample(str(folder / "run"), str(tmp_path / "new"), SEEDS, conditions=str(dataset.path), **OPTIONS)


def test_conditions_and_models_must_fit(folder: Path, champion: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="needs a condition"):
        sample(str(folder / "run"), out, SEEDS, **OPTIONS)
    with pytest.raises(UserError, match="without conditions"):
        sample(champion, out, SEEDS, conditions=str(folder / "edges"), **OPTIONS)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bad: a\.png"):
        sample(str(folder / "run"), out, SEEDS, conditions=str(tmp_path / "bad"), **OPTIONS)
    assert not Path(out).exists()
    plan = describe_sampling(str(folder / "run"), out, SEEDS, conditions=str(folder / "edges"), **OPTIONS)
    assert "network evaluations" in plan.text


def test_guidance_moves_away_from_the_sample_without_condition(folder: Path, samples: Path, tmp_path: Path) -> None:
    arguments = {"conditions": str(folder / "edges"), **OPTIONS}
    sample(str(folder / "run"), str(tmp_path / "guided"), SEEDS, guidance=2.0, **arguments)
    assert not np.array_equal(png_pixels(tmp_path / "guided"), png_pixels(samples))


def test_the_sampler_of_ray_data_takes_a_column_of_conditions(
    folder: Path, samples: Path, controls: np.ndarray
) -> None:
    sampler = Sampler(folder / "run", steps=2, batch=4, on_error="column")
    shown = controls[np.array(SEEDS) % 5]
    for column in (shown[:, 0], shown.transpose(0, 2, 3, 1)):
        rows = sampler({"seed": np.array(SEEDS), "condition": column})
        assert np.array_equal(rows["image"].transpose(0, 3, 1, 2), png_pixels(samples))
    mixed = np.empty(2, object)
    mixed[0], mixed[1] = np.zeros((8, 8), np.uint8), shown[1, 0]
    rows = sampler({"seed": np.array([0, 1]), "condition": mixed})
    assert rows["error"][0] and not rows["error"][1] and not rows["image"][0].any()
    assert np.array_equal(rows["image"][1].transpose(2, 0, 1), png_pixels(samples)[1])
    with pytest.raises(UserError, match="this column is missing"):
        sampler({"seed": np.array(SEEDS)})


@pytest.fixture
def served(folder: Path) -> Iterator[SamplerModel]:
    model = SamplerModel()
    context: Any = type("Context", (), {"artifacts": {"model": str(folder / "run" / "model")}})
    model.load_context(context)
    yield model


def test_a_registered_model_says_what_it_needs(folder: Path, served: SamplerModel) -> None:
    reference = register(str(folder / "run"), "controlled")
    described = describe_model(reference)
    assert described.condition == "edges, 1 channel of uint8" and "--conditions" in described.sample
    with pytest.raises(MlflowException, match="--conditions"):
        served.predict(None, pd.DataFrame({"seed": [0]}), {"steps": 2})


def test_latents_are_trained_and_sampled_with_conditions_at_full_detail(images: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (tmp_path / "ae").mkdir()
        save_autoencoder(new_autoencoder((8, 8, 8), 2), tmp_path / "ae")
    made = prepare(
        str(images),
        str(tmp_path / "data"),
        resolution=32,
        condition="edges",
        autoencoder=str(tmp_path / "ae"),
        workers=0,
    )
    recipe = tiny_recipe(train__images=100, data__whiten=True)
    run = train(recipe, str(made.path), str(tmp_path / "run"), workers=0)
    model = load_sampling_model(run.model)
    assert model.denoiser.condition_channels == 16 and model.card.condition is not None
    assert (model.card.condition.channels, model.card.condition.downscale) == (1, 4)
    shown = torch.from_numpy(depth_to_space(made.rows(SEEDS)["condition"], 4))
    labels = [seed % 2 for seed in SEEDS]
    wanted = generate_padded(model, SEEDS, labels, 4, Sampling(steps=2), condition=shown)
    sample(str(run.folder), str(tmp_path / "samples"), SEEDS, conditions=str(made.path), **OPTIONS)
    assert np.array_equal(png_pixels(tmp_path / "samples"), wanted.numpy()) and wanted.shape == (7, 3, 32, 32)
    (tmp_path / "files").mkdir()
    for number, picture in enumerate(shown[:, 0].numpy()):
        Image.fromarray(picture).save(tmp_path / "files" / f"{number}.png")
    sample(str(run.folder), str(tmp_path / "same"), SEEDS, conditions=str(tmp_path / "files"), **OPTIONS)
    assert np.array_equal(png_pixels(tmp_path / "same"), png_pixels(tmp_path / "samples"))


CARD = ConditionCard(
    kind="low-res", factor=4, channels=3, dtype="uint8", downscale=1, mean=(127.5,) * 3, scale=(1.0,) * 3,
    crop="center", resize="lanczos",
)  # fmt: skip


def encoded(path: Path, pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_a_low_resolution_image_is_enlarged_and_other_sizes_are_refused(tmp_path: Path) -> None:
    small = photograph("coffee.png")[:64:16, :64:16]
    found = finished_condition(encoded(tmp_path / "a.png", small), CARD, (16, 16))
    wanted = Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(found, np.asarray(wanted).transpose(2, 0, 1))
    whole = photograph("coffee.png")[:24, :32]
    assert np.array_equal(
        finished_condition(encoded(tmp_path / "b.png", whole), CARD, (24, 32)), whole.transpose(2, 0, 1)
    )
    with pytest.raises(ValueError, match="16x16, or 4x4"):
        finished_condition(encoded(tmp_path / "c.png", whole), CARD, (16, 16))


def test_edge_images_of_any_size_and_mode_become_edges(tmp_path: Path) -> None:
    card = replace(CARD, kind="edges", factor=None, channels=1)
    drawn = np.zeros((32, 48, 3), np.uint8)
    drawn[:, 22:26] = 255  # a line of two pixels after the reduction
    found = finished_condition(encoded(tmp_path / "a.png", drawn), card, (16, 16))
    assert found.shape == (1, 16, 16) and set(np.unique(found)) == {0, 255}
    assert (found[0, :, 7:9] == 255).all() and found.mean() == 255 * 2 / 16
    with pytest.raises(ValueError, match="must have 20x24"):
        finished_condition(encoded(tmp_path / "b.png", drawn), card, (24, 20))
