"""Your own networks: buffers are averaged, tied weights are saved, and what cannot be saved is refused early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_recipe
from safetensors.torch import load_file

from patchloom.errors import UserError
from patchloom.models.backbones import ALLOWED
from patchloom.models.checkpoints import load_model
from patchloom.pipelines.registry.convert import average_model
from patchloom.pipelines.train import train
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.platform.files.storage import read_json
from patchloom.platform.recipe import Recipe, check_recipe


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "own_network")


def recipe_of_tied_network(**options: Any) -> Recipe:
    values = tiny_recipe(preview__every_images=0).model_dump(mode="json")
    values["model"] = {"backbone": "own_network:TiedNetwork", "backbone_options": options}
    values["ema"] = [{"halflife_images": 200}, {"sigma_rel": 0.1, "snapshot_every_images": 200},
                     {"sigma_rel": 0.05, "snapshot_every_images": 200}]  # fmt: skip
    return check_recipe(values)


def test_tied_weights_and_buffers_are_in_the_model_and_in_later_averages(pixels: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe_of_tied_network(), str(pixels), str(run), workers=0)
    weights = load_file(run / "model" / "model.safetensors")
    assert torch.equal(weights["model.first.weight"], weights["model.second.weight"])
    assert read_json(run / "model" / "model.json")["tied"] == {"model.second.weight": "model.first.weight"}
    network: Any = load_model(run / "model").model
    assert network.first.weight is network.second.weight

    newest = newest_checkpoint(run)
    assert newest is not None
    trained = load_file(newest / "state.safetensors")
    wide: Any = load_model(average_model(str(run), str(tmp_path / "wide"), 0.15)).model
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        wanted = trained[f"denoiser/model.norm.{name}"]  # of the network itself, after its last step
        assert torch.equal(weights[f"model.norm.{name}"], wanted)
        assert torch.equal(getattr(wide.norm, name), wanted)
    assert trained["denoiser/model.norm.num_batches_tracked"] == 39
    assert wide.first.weight is wide.second.weight
    assert not torch.equal(wide.first.weight, network.first.weight)


def test_network_that_cannot_be_saved_is_refused_before_the_first_step(pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.backbone own_network:TiedNetwork: "):
        train(recipe_of_tied_network(saved=False), str(pixels), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run" / "run.json").exists()
