"""Checkpoints and models on disk: they come back bit for bit, and a changed byte is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_step import SPACE, make_method, make_rows, make_state

from patchloom.models.autoencoder import load_autoencoder, new_autoencoder, save_autoencoder
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import (
    CheckpointError,
    SamplingModel,
    load_checkpoint,
    load_model,
    load_sampling_model,
    save_checkpoint,
    save_model,
)
from patchloom.models.generate import Sampling, generate, generate_padded
from patchloom.models.step import TrainingState, training_step
from patchloom.models.step_plan import plan_step

CARD = ModelCard(
    denoiser=DenoiserConfig(
        network="song",
        network_options={"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.0},
        resolution=8, channels=2, classes=3, coordinates="linear", sigma_data=0.5,
    ),
    normalisation=SPACE,
    class_names=("a", "b", "c"),
)  # fmt: skip


def advance(state: TrainingState, steps: int) -> None:
    method = make_method(0.5)
    for _ in range(steps):
        plan = plan_step(method, state.step, state.images_seen)
        work = [(group, make_rows(plan.crops)) for group in plan.share()]
        training_step(state, method, plan, work, SPACE, None)


def test_a_run_continues_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    straight, stopped = make_state(make_method(0.5)), make_state(make_method(0.5))
    advance(straight, 5)
    advance(stopped, 2)
    save_checkpoint(tmp_path, stopped, recipe="x")
    resumed = make_state(make_method(0.5))
    load_checkpoint(tmp_path, resumed)
    assert (resumed.step, resumed.crops_by_size) == (stopped.step, stopped.crops_by_size)
    advance(resumed, 3)
    assert resumed.crops_by_size == straight.crops_by_size
    for one, other in ((straight.denoiser, resumed.denoiser), (straight.emas[0].module, resumed.emas[0].module)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    state = make_state(make_method(0.5))
    save_checkpoint(tmp_path, state)
    flip_last_byte(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(tmp_path, state)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "autoencoder").mkdir(parents=True)
    torch.manual_seed(0)
    save_autoencoder(new_autoencoder((8, 16), 2), folder / "autoencoder")
    state = make_state(make_method(0.5))
    advance(state, 2)
    save_model(folder, state.denoiser, CARD)
    return folder


def test_a_model_is_restored_bit_for_bit(model_folder: Path) -> None:
    state = make_state(make_method(0.5))
    advance(state, 2)
    x, labels = torch.randn(2, 2, 8, 8), torch.eye(3)[:2]
    assert torch.equal(load_model(model_folder)(x, 0.3, labels=labels), state.denoiser.eval()(x, 0.3, labels=labels))


def test_a_model_that_differs_from_its_card_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_model(tmp_path)
    card = json.loads((model_folder / "model.json").read_text())
    (model_folder / "model.json").write_text(json.dumps(card | {"format_version": 99}))
    with pytest.raises(CheckpointError, match=r"99.* 2\b"):
        load_model(model_folder)
    (model_folder / "model.json").write_text(json.dumps(card))
    flip_last_byte(model_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):
        load_model(model_folder)
    with pytest.raises(CheckpointError, match=r"autoencoder.*denoiser"):
        load_model(model_folder / "autoencoder")


def test_an_autoencoder_is_restored_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = new_autoencoder((8, 16, 16), 4).eval()
    save_autoencoder(network, tmp_path)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    autoencoder = load_autoencoder(tmp_path)
    mean, std = autoencoder.encode(images)
    assert autoencoder.downscale == 4 and mean.shape == std.shape == (2, 4, 4, 4)
    assert autoencoder.decode(mean).shape == images.shape
    with torch.no_grad():
        assert torch.equal(mean, network.encode(images / 127.5 - 1).latent_dist.mean)
    flip_last_byte(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="sha256"):
        load_autoencoder(tmp_path)


def test_an_image_does_not_depend_on_its_neighbours(model_folder: Path) -> None:
    model: SamplingModel = load_sampling_model(model_folder)
    together = generate(model, [4, 1, 7, 9], [0, 1, 2, -1], Sampling(steps=2))
    assert together.shape == (4, 3, 16, 16) and together.dtype == torch.uint8
    turned = generate(model, [9, 7, 1, 4], [-1, 2, 1, 0], Sampling(steps=2))
    assert torch.equal(together, turned.flip(0))
    padded = generate_padded(model, [7], [2], 4, Sampling(steps=2))
    assert torch.equal(padded[0], together[2])
    assert not torch.equal(generate(model, [7], [0], Sampling(steps=2))[0], together[2])


def test_a_sampling_model_agrees_with_the_trained_network(model_folder: Path) -> None:
    sampled, trained = load_sampling_model(model_folder).denoiser, load_model(model_folder)
    x, sigma = torch.randn(2, sampled.channels, 16, 16), torch.tensor([0.1, 5.0])
    with torch.no_grad():
        without_gradients = sampled(x, sigma)
    torch.testing.assert_close(without_gradients, trained(x, sigma).detach(), atol=1e-5, rtol=1e-5)
    first = next(weight for weight in sampled.parameters() if weight.dim() == 4)
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_the_models_import_without_ray_mlflow_or_pydantic() -> None:
    code = (
        "import importlib, pkgutil, sys, patchloom.models as models\n"
        "for module in pkgutil.iter_modules(models.__path__):\n"
        "    importlib.import_module(f'patchloom.models.{module.name}')\n"
        "print([name for name in ('ray', 'mlflow', 'pydantic', 'diffusers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
