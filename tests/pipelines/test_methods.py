"""Every choice that a recipe has is trained, sampled from and told to the next who reads the model folder."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python, start_cli, tiny_recipe

from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.backbones import ALLOWED
from patchloom.models.checkpoints import load_model, load_whole_model
from patchloom.models.generate import Sampling, generate
from patchloom.models.metrics import colour_layout, frechet_distance
from patchloom.pipelines.checkpointer import newest_checkpoint
from patchloom.pipelines.convert import average_model
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.train import train
from patchloom.platform.dataset import open_dataset
from patchloom.platform.errors import UserError
from patchloom.platform.recipe import Recipe, check_recipe, recipe_yaml
from patchloom.platform.storage import read_json, read_json_lines

pytestmark = pytest.mark.ray
SMALL_BATCHES = {"train__batch_size": 16, "train__block_size": 2}
CHOICES: dict[str, dict[str, Any]] = {
    "stratified": {
        "patches__draw": "stratified", "model__coordinates": "periodic", "model__patch_size_condition": True,
        **SMALL_BATCHES,
    },
    "independent": {
        "patches__draw": "independent", "train__emulated_ranks": 4, "data__augment": 0.3,
        "model__coordinates": "implicit", **SMALL_BATCHES,
    },
    "by images": {
        "patches__schedule": "progressive", "patches__shares_of": "images", "model__coordinates": "none",
        "model__network": "adm", "model__patch_size_condition": True, "data__mirror": True, "train__images": 640,
    },
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_trained_and_sampled(choice: str, pixels: Path, tmp_path: Path) -> None:
    result = train(tiny_recipe(**CHOICES[choice]), str(pixels), str(tmp_path / "run"), workers=0)
    lines = read_json_lines(result.folder / "progress.jsonl")
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert set().union(*(line["loss_by_sigma"] for line in lines)) >= {"0-0.1", "0.1-0.3", "0.3-1", "1-3"}
    batch = 16 if choice != "by images" else 8
    multiplier = 1.9 if choice != "by images" else 1 / 0.7
    images = 600 if choice != "by images" else 640
    assert lines[-1]["updates"] == round(images / (batch * multiplier))
    if choice == "stratified":  # no luck in how many crops there are, but for the rounding to blocks
        assert lines[-1]["images_seen"] == pytest.approx(lines[-1]["updates"] * batch * multiplier, abs=3 * 2)
    if choice == "by images":
        assert lines[-1]["full_size_images"] / lines[-1]["images_seen"] == pytest.approx(0.5, abs=0.02)
    made = generate(load_whole_model(result.model), [1, 2], [0, 1], Sampling(steps=2, sampler="dpmpp-2m"))
    assert made.shape == (2, 3, 16, 16)


def test_any_length_of_average_is_made_after_the_run(pixels: Path, tmp_path: Path) -> None:
    kept = {"snapshot_every_images": 40}
    averages = [{"sigma_rel": 0.05, **kept}, {"sigma_rel": 0.10, **kept}, {"sigma_rel": 0.15}]
    recipe = tiny_recipe(ema=averages, data__held_out_fraction=0.1, preview__every_images=0)
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0).folder
    made = load_model(average_model(str(run), str(tmp_path / "wide"), 0.15))

    from safetensors.torch import load_file

    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    state = load_file(checkpoint / "state.safetensors")

    def distance(one: dict[str, torch.Tensor], other: str) -> float:
        squares = [(one[name] - state[f"{other}/{name}"]).square().sum() for name, _ in made.named_parameters()]
        return float(torch.stack(squares).sum().sqrt())

    nearest = distance({name: state[f"ema1/{name}"] for name in made.state_dict()}, "ema2")
    assert distance(made.state_dict(), "ema2") < 0.1 * nearest  # in 39 steps; longer runs come far closer
    card = read_json(tmp_path / "wide" / "model.json")
    assert card["average"]["sigma_rel"] == 0.15 and card["average"]["snapshots"] > 20
    with pytest.raises(UserError, match="a width lies between 0 and 0"):
        average_model(str(run), str(tmp_path / "wider"), 0.5)
    with pytest.raises(UserError, match="is not empty"):
        average_model(str(run), str(tmp_path / "wide"), 0.1)


def own_recipe() -> Recipe:
    """The tiny recipe with a network from outside."""
    values = tiny_recipe().model_dump(mode="json")
    model = {key: values["model"][key] for key in ("class_conditional", "label_dropout")}
    model |= {
        "backbone": "own_network:DiffusersUNet",
        "backbone_options": {
            "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.1,
            "class_embed_type": "identity",
        },
    }  # fmt: skip
    return check_recipe(values | {"model": model})


def test_a_network_of_ones_own_is_one_line_of_a_recipe(
    pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOWED, raising=False)
    with pytest.raises(UserError, match="--allow-backbone own_network"):
        train(own_recipe(), str(pixels), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(own_recipe()))
    for command in (
        ("train", "recipe.yaml", "--data", str(pixels), "--out", "run", "--workers", "0"),
        ("sample", "run/model", "samples", "--seeds", "0-3", "--steps", "2"),
    ):
        refused = start_cli(*command, cwd=tmp_path)
        words, _ = refused.communicate(timeout=120)
        assert refused.returncode == 2 and "--allow-backbone own_network" in words, words
        allowed = start_cli(*command, "--allow-backbone", "own_network", cwd=tmp_path)
        words, _ = allowed.communicate(timeout=240)
        assert allowed.returncode == 0, words
    assert (tmp_path / "samples" / "000000" / "000003.png").is_file()
    lines = read_json_lines(tmp_path / "run" / "progress.jsonl")
    assert lines[-1]["flops"] > 0 and math.isfinite(lines[-1]["loss"])


def test_a_distance_is_measured_while_it_trains(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(preview__frechet_samples=12, train__images=300)
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    model, dataset = load_whole_model(run.model), open_dataset(pixels)
    seeds = list(range(12))
    made = generate(model, seeds, [seed % 2 for seed in seeds], Sampling(steps=2))
    real = torch.from_numpy(dataset.rows(dataset.indices("train", 0.2))["image"])
    wanted = frechet_distance(colour_layout(made), colour_layout(real))
    assert run.last["preview_frechet_distance"] == pytest.approx(wanted, rel=1e-6)


def test_a_run_begins_with_the_weights_of_another(trained: Path, pixels: Path, tmp_path: Path) -> None:
    still = {"optimizer__lr": 1e-12, "train__images": 30, "ema": [{"halflife_images": 1e-3, "rampup_ratio": 1e-3}]}
    recipe = tiny_recipe(train__init_from=str(trained / "model"), **still)
    made = load_model(train(recipe, str(pixels), str(tmp_path / "run"), workers=0).model)
    source = load_model(trained / "model")
    for (name, one), (_, other) in zip(made.named_parameters(), source.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0, msg=name)
    wider = tiny_recipe(train__init_from=str(trained / "model"), model__width=16)
    with pytest.raises(UserError, match="the networks differ"):
        train(wider, str(pixels), str(tmp_path / "wider"), workers=0)
    nowhere = tiny_recipe(train__init_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is no model"):
        train(nowhere, str(pixels), str(tmp_path / "nothing"), workers=0)


def test_latent_training_never_touches_the_autoencoder(ray_cluster: None, pixels: Path, tmp_path: Path) -> None:
    (tmp_path / "ae").mkdir()
    torch.manual_seed(0)
    save_autoencoder(new_autoencoder((8, 8), 4), tmp_path / "ae")
    prepare(str(pixels), str(tmp_path / "latents"), autoencoder=str(tmp_path / "ae"))
    changes = {"train__images": 60, "preview__every_images": 0, "model__attention": [4], "patches__sizes": [
        {"fraction": 0.5, "weight": 1.0, "batch_multiplier": 2}]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(**changes)))
    code = (
        "import os, sys\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from patchloom.pipelines.train import train\n"
        "from patchloom.platform.recipe import load_recipe\n"
        "train(load_recipe('recipe.yaml'), 'latents', 'run', workers=0)\n"
        "print('diffusers' in sys.modules)\n"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr
    assert load_whole_model(tmp_path / "run" / "model").autoencoder is not None
