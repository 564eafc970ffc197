"""Options of a recipe: each one is trained, sampled from and stored in the model folder."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from helpers import SHARED_DATA, assert_equal_models, run_python, tiny_recipe
from safetensors.torch import load_file

from patchloom.errors import UserError
from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.backbones import ALLOWED
from patchloom.models.checkpoints import CheckpointError, load_edm_snapshot, load_model, load_sampling_model
from patchloom.models.denoiser import Denoiser
from patchloom.models.generate import Sampling, generate
from patchloom.models.metrics import colour_layout, frechet_distance
from patchloom.pipelines.cli.app import app
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.registry.convert import average_model
from patchloom.pipelines.train import train
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.storage import each_json_line, read_json
from patchloom.platform.recipe import Recipe, check_recipe, recipe_yaml

pytestmark = pytest.mark.ray
SHARED = SHARED_DATA.parent
SNAPSHOT = SHARED / "golden" / "edm_ddpmpp.pkl"
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
def test_option_is_trained_and_sampled(choice: str, pixels: Path, tmp_path: Path) -> None:
    result = train(tiny_recipe(**CHOICES[choice]), str(pixels), str(tmp_path / "run"), workers=0)
    lines = list(each_json_line(result.folder / "progress.jsonl"))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert set().union(*(line["loss_by_sigma"] for line in lines)) >= {"0-0.1", "0.1-0.3", "0.3-1", "1-3"}
    batch = 16 if choice != "by images" else 8
    multiplier = 1.9 if choice != "by images" else 1 / 0.7
    images = 600 if choice != "by images" else 640
    assert lines[-1]["updates"] == round(images / (batch * multiplier))
    if choice == "stratified":  # the number of crops is not random, up to rounding to blocks
        assert lines[-1]["images_seen"] == pytest.approx(lines[-1]["updates"] * batch * multiplier, abs=3 * 2)
    if choice == "by images":
        assert lines[-1]["full_size_images"] / lines[-1]["images_seen"] == pytest.approx(0.5, abs=0.02)
    made = generate(load_sampling_model(result.model), [1, 2], [0, 1], Sampling(steps=2, sampler="dpmpp-2m"))
    assert made.shape == (2, 3, 16, 16)


def test_average_of_any_width_is_made_after_the_run(pixels: Path, tmp_path: Path) -> None:
    kept = {"snapshot_every_images": 40}
    averages = [{"sigma_rel": 0.05, **kept}, {"sigma_rel": 0.10, **kept}, {"sigma_rel": 0.15}]
    recipe = tiny_recipe(ema=averages, data__held_out_fraction=0.1, preview__every_images=0)
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0).folder
    made = load_model(average_model(str(run), str(tmp_path / "wide"), 0.15))

    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    state = load_file(checkpoint / "state.safetensors")

    def distance(one: dict[str, torch.Tensor], other: str) -> float:
        squares = [(one[name] - state[f"{other}/{name}"]).square().sum() for name, _ in made.named_parameters()]
        return float(torch.stack(squares).sum().sqrt())

    nearest = distance({name: state[f"ema1/{name}"] for name in made.state_dict()}, "ema2")
    assert distance(made.state_dict(), "ema2") < 0.1 * nearest  # after 39 steps; longer runs are much closer
    card = read_json(tmp_path / "wide" / "model.json")
    assert card["average"]["sigma_rel"] == 0.15 and card["average"]["snapshots"] > 20
    with pytest.raises(UserError, match="sigma_rel"):
        average_model(str(run), str(tmp_path / "wider"), 0.5)
    with pytest.raises(UserError, match="wide"):
        average_model(str(run), str(tmp_path / "wide"), 0.1)


def own_recipe() -> Recipe:
    """The tiny recipe with a network from another package."""
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


def test_own_network_is_named_in_the_recipe(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "")  # restores the allowed packages after the test
    run, samples = tmp_path / "run", tmp_path / "samples"
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(own_recipe()))
    for command, made in (
        (("train", str(tmp_path / "recipe.yaml"), "--data", str(pixels), "--out", str(run), "--workers", "0"), run),
        (("sample", str(run / "model"), str(samples), "--seeds", "0-3", "--steps", "2"), samples),
    ):
        monkeypatch.delenv(ALLOWED)
        with pytest.raises((UserError, CheckpointError), match="--allow-backbone own_network"):
            command_line(*command)
        assert not made.exists()
        command_line(*command, "--allow-backbone", "own_network")
    assert (samples / "000000" / "000003.png").is_file()
    lines = list(each_json_line(run / "progress.jsonl"))
    assert lines[-1]["flops"] > 0 and math.isfinite(lines[-1]["loss"])


def command_line(*arguments: str) -> None:
    """Run `patchloom ARGUMENTS` in this process. Errors are raised instead of printed."""
    typer.main.get_command(app)(list(arguments), standalone_mode=False)


def test_frechet_distance_is_measured_during_training(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(preview__frechet_samples=12, train__images=300)
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    model, dataset = load_sampling_model(run.model), open_dataset(pixels)
    seeds = list(range(12))
    made = generate(model, seeds, [seed % 2 for seed in seeds], Sampling(steps=2))
    real = torch.from_numpy(dataset.rows(dataset.indices("train", 0.2))["image"])
    wanted = frechet_distance(colour_layout(made), colour_layout(real))
    assert run.last["preview_frechet_distance"] == pytest.approx(wanted, rel=1e-6)


def test_preview_that_cannot_be_measured_or_made_does_not_end_the_run(
    pixels: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = train(tiny_recipe(preview__frechet_samples=1), str(pixels), str(tmp_path / "one"), workers=0)
    assert one.last.preview is not None and (one.folder / one.last.preview).is_file()
    assert one.last.preview_frechet_distance is None and one.last.held_out_loss is not None
    assert_equal_models(one.folder, trained)
    assert "Fréchet" in capsys.readouterr().out

    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("patchloom.pipelines.train.hooks.previews.generate", fail)
    none = train(tiny_recipe(), str(pixels), str(tmp_path / "none"), workers=0)
    assert none.last.preview is None and none.last.held_out_loss == one.last.held_out_loss
    assert_equal_models(none.folder, trained)
    assert "out of memory" in capsys.readouterr().out


STILL = {"optimizer__lr": 1e-12, "train__images": 30, "ema": [{"halflife_images": 1e-3, "rampup_ratio": 1e-3}]}


def assert_same_weights(made: Denoiser, source: Denoiser, left: str = "") -> None:
    """Compare layers in order, because names may contain a resolution; skip names with `left` in them."""
    pairs = [(name, one) for name, one in made.named_parameters() if not left or left not in name]
    for (name, one), (_, other) in zip(pairs, source.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0, msg=name)


def test_init_from_a_registered_model(champion: str, trained: Path, pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__init_from=champion, **STILL)
    made = load_model(train(recipe, str(pixels), str(tmp_path / "run"), workers=0).model)
    assert_same_weights(made, load_model(trained / "model"))
    wider = tiny_recipe(train__init_from=str(trained / "model"), model__width=16)
    with pytest.raises(UserError, match=r"train\.init_from"):
        train(wider, str(pixels), str(tmp_path / "wider"), workers=0)
    assert not (tmp_path / "wider" / "run.json").exists()  # so that a corrected recipe can use the same folder
    nowhere = tiny_recipe(train__init_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="models:/NAME"):
        train(nowhere, str(pixels), str(tmp_path / "nothing"), workers=0)


def test_init_from_an_edm_snapshot_with_other_classes_and_resolution(
    pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not SNAPSHOT.is_file():
        pytest.skip(f"no reference snapshot at {SNAPSHOT}")
    source = load_edm_snapshot(SNAPSHOT)
    assert (source.resolution, source.classes) == (32, 0)
    network = {"model__width": 16, "model__width_multipliers": [1, 2, 2], "model__attention": [4]}
    recipe = tiny_recipe(train__init_from=str(SNAPSHOT), **network, **STILL)
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    assert "model.map_label.weight" in capsys.readouterr().out
    made = load_model(run.model)
    assert (made.resolution, made.classes) == (16, 2)
    assert_same_weights(made, source, left="map_label")


def test_resumed_run_uses_its_copy_of_the_initial_weights(trained: Path, pixels: Path, tmp_path: Path) -> None:
    source = shutil.copytree(trained / "model", tmp_path / "source")
    recipe = tiny_recipe(train__init_from=str(source), train__images=150)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(recipe, str(pixels), str(straight), workers=0)
    shutil.copytree(straight, stopped, ignore=shutil.ignore_patterns("checkpoints", "model", "progress.jsonl"))
    shutil.rmtree(source)  # the source is gone before the first checkpoint
    train(recipe, str(pixels), str(stopped), workers=0, resume=True)
    assert_equal_models(stopped, straight)


@pytest.mark.parametrize(("precision", "rounds"), [("bf16", True), ("fp16", True), ("tf32", True), ("fp32", False)])
def test_precision_applies_to_arithmetic_and_not_to_weights(
    pixels: Path, tmp_path: Path, precision: str, rounds: bool
) -> None:
    recipe = tiny_recipe(train__precision=precision, train__images=60, preview__every_images=0)
    run = train(recipe, str(pixels), str(tmp_path / "run"), workers=0).folder
    assert torch.backends.cudnn.allow_tf32 is rounds
    assert torch.get_float32_matmul_precision() == ("high" if rounds else "highest")
    lines = list(each_json_line(run / "progress.jsonl"))
    assert all(math.isfinite(line["loss"]) and not line["bad_crops"] for line in lines)
    assert {tensor.dtype for tensor in load_file(run / "model" / "model.safetensors").values()} == {torch.float32}


def test_latent_training_without_ray_starts_fast_and_loads_no_autoencoder(
    ray_cluster: None, pixels: Path, tmp_path: Path
) -> None:
    (tmp_path / "ae").mkdir()
    torch.manual_seed(0)
    save_autoencoder(new_autoencoder((8, 8), 4), tmp_path / "ae")
    prepare(str(pixels), str(tmp_path / "latents"), autoencoder=str(tmp_path / "ae"))
    changes = {"train__images": 60, "preview__every_images": 0, "model__attention": [4], "patches__sizes": [
        {"fraction": 0.5, "weight": 1.0, "batch_multiplier": 2}]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(**changes)))
    code = (
        "import os, sys, time\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from patchloom.pipelines.train.training import train\n"
        "from patchloom.platform.recipe.run_recipe import load_recipe\n"
        "began = []\n"
        "show = lambda line: began.append(time.process_time())\n"
        "train(load_recipe('recipe.yaml'), 'latents', 'run', workers=0, show=show)\n"
        "print(began[0], 'diffusers' in sys.modules, 'ray' in sys.modules)\n"
    )
    done = run_python(code)
    seconds, *imported = done.stdout.splitlines()[-1].split()
    assert imported == ["False", "False"], done.stdout + done.stderr
    assert float(seconds) < 10  # CPU time from the start of Python to the first line
    assert load_sampling_model(tmp_path / "run" / "model").autoencoder is not None


@pytest.mark.slow
def test_compiled_network_has_one_graph_per_patch_size_and_the_same_losses(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__images=200, preview__every_images=0, data__held_out_fraction=0.0, model__dropout=0.0)
    torch._dynamo.utils.counters.clear()
    runs = [
        train(recipe, str(pixels), str(tmp_path / name), workers=0, compile=name == "compiled").folder
        for name in ("eager", "compiled")
    ]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    eager, compiled = ([line["loss"] for line in each_json_line(run / "progress.jsonl")] for run in runs)
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_data_that_a_recipe_was_not_made_for_gives_a_warning(
    pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"train__images": 16, "preview__every_images": 0}
    train(tiny_recipe(**short, data__kind="pixels", data__resolution=16), str(pixels), str(tmp_path / "a"), workers=0)
    assert "warning" not in capsys.readouterr().out
    train(tiny_recipe(**short, data__kind="latents", data__resolution=32), str(pixels), str(tmp_path / "b"), workers=0)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "data.kind is latents" in warning and "data.resolution is 32" in warning and "16" in warning
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
