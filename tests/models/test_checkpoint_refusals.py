"""A checkpoint that is not whole, or is newer than this version, is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_model,
    load_sampling_model,
    save_checkpoint,
    save_model,
)
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StepSettings, TrainingState, new_state

METHOD = StepSettings(0, patch_schedule(16, 0.5), 5, 8, 8, lr=1e-3, lr_rampup_images=0)


@pytest.fixture
def state(tiny_denoiser: Callable[..., Denoiser]) -> TrainingState:
    denoiser = tiny_denoiser()
    return new_state(denoiser, [HalfLifeEMA(denoiser, 10)], METHOD, (0.9, 0.999), 1e-8)


def model_card(config: DenoiserConfig) -> ModelCard:
    return ModelCard(denoiser=config, normalisation=pixel_normalisation())


def change_card(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_a_newer_format_is_refused(state: TrainingState, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state)
    change_card(tmp_path / "checkpoint.json", format_version=99)
    with pytest.raises(CheckpointError, match="99"):
        load_checkpoint(tmp_path, state)


def test_a_checkpoint_without_its_tensors_is_refused(state: TrainingState, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state)
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path, state)


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_byte_anywhere_in_the_weights_is_refused(
    tiny_denoiser: Callable[..., Denoiser], tiny_config: Callable[..., DenoiserConfig], tmp_path: Path, place: int
) -> None:
    save_model(tmp_path, tiny_denoiser(), model_card(tiny_config()))
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[place] ^= 0x40
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_a_model_without_weights_or_with_a_broken_card_is_refused(
    tiny_denoiser: Callable[..., Denoiser], tiny_config: Callable[..., DenoiserConfig], tmp_path: Path
) -> None:
    save_model(tmp_path, tiny_denoiser(), model_card(tiny_config()))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_model(tmp_path)


def test_the_whole_model_brings_its_space_and_every_tensor(
    tiny_denoiser: Callable[..., Denoiser], tiny_config: Callable[..., DenoiserConfig], tmp_path: Path
) -> None:
    denoiser = tiny_denoiser(classes=2)
    save_model(tmp_path, denoiser, model_card(tiny_config(classes=2)))
    model = load_sampling_model(tmp_path)
    assert model.normalisation == pixel_normalisation()
    assert model.autoencoder is None
    loaded = model.denoiser.state_dict()
    assert loaded.keys() == denoiser.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in denoiser.state_dict().items())
    assert not model.denoiser.training
