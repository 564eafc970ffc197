"""The small base: a folder that `model.base` takes, and a noise error that falls with training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from patchloom.benchmarks.small_base import LATENT, WIDTH, train_small_base, write_texts
from patchloom.errors import UserError
from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.checkpoints import read_card
from patchloom.models.controlnet import describe_base
from patchloom.models.known_bases import SCHEDULE, SMALL_TOKENS, planned_base
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.train import train
from patchloom.platform.dataset import Dataset, open_dataset
from patchloom.platform.recipe import load_recipe

RUNS = {"one": 2, "again": 2, "longer": 20}  # names and steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels of two classes with edges and texts, and their latents (4, 16, 16)."""
    folder, random = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (folder / "autoencoder").mkdir()
        save_autoencoder(new_autoencoder((8, 8, 8), 4), folder / "autoencoder")
    coarse = random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=coarse.repeat(8, 1).repeat(8, 2), labels=np.arange(40) % 2)
    pixels = prepare(str(folder / "images.npz"), str(folder / "pixels"), crop="none", condition="edges", workers=0)
    write_texts(pixels, folder / "texts.npz")
    prepare(str(folder / "pixels"), str(folder / "latents"), autoencoder=str(folder / "autoencoder"),
            text=str(folder / "texts.npz"), workers=0)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def latents(folder: Path) -> Dataset:
    return open_dataset(folder / "latents")


def test_texts_are_equal_within_a_class_only(latents: Dataset) -> None:
    assert (latents.card.channels, latents.card.resolution, latents.card.resolution) == LATENT
    rows = latents.rows(range(len(latents)))
    assert rows["text"].shape == (40, SMALL_TOKENS, WIDTH)
    assert len(np.unique(rows["text"].reshape(40, -1), axis=0)) == 2
    for label in (0, 1):
        assert len(np.unique(rows["text"][rows["label"] == label].reshape(20, -1), axis=0)) == 1
    assert not (latents.no_text() == rows["text"]).all((1, 2)).any()


def test_training_lowers_the_error_and_depends_on_the_seed_only(latents: Dataset, tmp_path: Path) -> None:
    errors = {name: train_small_base(latents, tmp_path / name, steps) for name, steps in RUNS.items()}
    assert errors["one"] == errors["again"] and errors["longer"] < 0.95 * errors["one"]
    digest = {name: describe_base(str(tmp_path / name))["base_sha256"] for name in RUNS}
    assert digest["one"] == digest["again"] != digest["longer"]


def test_a_controlnet_of_the_base_is_trained(latents: Dataset, folder: Path, tmp_path: Path) -> None:
    train_small_base(latents, tmp_path / "base", 1)
    found, known = describe_base(str(tmp_path / "base")), planned_base("./small_base").options
    assert found["schedule"] == SCHEDULE and known["schedule"] == SCHEDULE
    assert {key: found["unet"][key] for key in known["unet"]} == known["unet"]
    changes = [f"model.base={tmp_path / 'base'}", "preview.count=2", "train.batch_size=8", "train.held_out_images=8",
               "train.images=30"]  # fmt: skip
    run = train(load_recipe("controlnet_small", changes), str(folder / "latents"), str(tmp_path / "run"), workers=0)
    assert read_card(Path(run.address) / "model").denoiser.network_options["base_sha256"] == found["base_sha256"]


def test_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pixels"):
        train_small_base(open_dataset(folder / "pixels"), tmp_path / "base", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(UserError):
        train_small_base(open_dataset(folder / "latents"), tmp_path / "mine", 1)
