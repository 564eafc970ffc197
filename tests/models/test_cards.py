"""Cards: JSON of version 0.1.0 is read, and written again byte for byte."""

import json
from typing import Any

import pytest

from patchloom.models.cards import AutoencoderCard, CheckpointCard, DenoiserConfig, ModelCard
from patchloom.models.normalisation import Normalisation

SONG = """{
    "network": "song",
    "network_options": {
      "width": 8,
      "width_multipliers": [
        1,
        2
      ],
      "dropout": 0.1
    },
    "resolution": 16,
    "channels": 4,
    "classes": 2,
    "coordinates": "linear",
    "patch_size": false,
    "sigma_data": 0.5
  }"""
AUTOENCODER = """{
    "class": "AutoencoderKL",
    "weights_sha256": "aa",
    "downscale": 4,
    "latent_channels": 4,
    "scale": 0.18215,
    "shift": 0.0,
    "reference": "models:/tiny/1",
    "precision": "fp32"
  }"""
SPACE = """{
    "kind": "latents",
    "mean": [
      0.1,
      0.0
    ],
    "scale": [
      2.0,
      0.5
    ]
  }"""
TRAINED = f"""{{
  "format_version": 1,
  "kind": "denoiser",
  "name": "tiny",
  "denoiser": {SONG},
  "space": {SPACE},
  "autoencoder": {AUTOENCODER},
  "class_names": [
    "chelsea",
    "coffee"
  ],
  "label_dropout": 0.1,
  "patches": {{
    "p": 0.5,
    "schedule": "stochastic",
    "sizes": [
      {{
        "fraction": 0.5,
        "weight": 0.6,
        "batch_multiplier": 2
      }}
    ],
    "draw": "shared",
    "shares_of": "updates"
  }},
  "dataset_fingerprint": "bb",
  "code_version": "0.1.0",
  "images_seen": 640,
  "updates": 42,
  "average": {{
    "sigma_rel": 0.1,
    "snapshots": 3
  }},
  "weights_sha256": "cc"
}}"""
IMPORTED = f"""{{
  "format_version": 1,
  "kind": "denoiser",
  "name": "network-snapshot-1000",
  "denoiser": {SONG.replace('    "patch_size": false,' + chr(10), "")},
  "space": {SPACE},
  "class_names": [],
  "label_dropout": 0.0,
  "imported_from": {{
    "file": "network-snapshot-1000.pkl",
    "sha256": "dd"
  }},
  "code_version": "0.1.0",
  "weights_sha256": "cc"
}}"""


@pytest.mark.parametrize("text", [TRAINED, IMPORTED], ids=["trained", "imported"])
def test_model_json_is_written_as_it_was_read(text: str) -> None:
    card = ModelCard.from_json(json.loads(text))
    assert json.dumps(card.to_json(), indent=2) == text


def test_a_model_card_holds_typed_values() -> None:
    card = ModelCard.from_json(json.loads(TRAINED))
    assert card.normalisation == Normalisation("latents", (0.1, 0.0), (2.0, 0.5))
    assert card.class_names == ("chelsea", "coffee")
    assert card.autoencoder is not None and card.autoencoder.class_name == "AutoencoderKL"
    assert card.patches is not None and (card.patches.p, card.patches.schedule) == (0.5, "stochastic")
    assert card.average is not None and card.average.snapshots == 3
    imported = ModelCard.from_json(json.loads(IMPORTED))
    assert imported.images_seen is imported.patches is imported.autoencoder is imported.denoiser.patch_size is None


def test_unknown_keys_are_kept_at_every_level() -> None:
    content = json.loads(TRAINED)
    content["license"] = "MIT"
    content["denoiser"]["flavour"] = "vanilla"
    assert ModelCard.from_json(content).to_json() == content


@pytest.mark.parametrize(("flag", "encoding"), [(True, "linear"), (False, "none")])
def test_booleans_of_early_models_are_coordinate_encodings(flag: bool, encoding: str) -> None:
    assert DenoiserConfig.from_json(json.loads(SONG) | {"coordinates": flag}).coordinates == encoding


@pytest.mark.parametrize("key", ["network", "resolution", "sigma_data"])
def test_a_missing_key_is_named(key: str) -> None:
    content: dict[str, Any] = json.loads(SONG)
    del content[key]
    with pytest.raises(ValueError, match=key):
        DenoiserConfig.from_json(content)


@pytest.mark.parametrize("content", [None, 3, [1], "denoiser"])
def test_a_value_that_is_not_an_object_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match=type(content).__name__):
        AutoencoderCard.from_json(content)


def test_checkpoints_of_version_0_1_0_are_read() -> None:
    content = {"format_version": 1, "step": 3, "images_seen": 24, "crops_by_size": [8, 16], "grad_scaler": {},
               "recipe": "tiny", "held_out_loss": None, "state_sha256": "ee"}  # fmt: skip
    card = CheckpointCard.from_json(content)
    assert (card.step, card.crops_by_size, card.held_out_loss, card.state_sha256) == (3, (8, 16), None, "ee")
