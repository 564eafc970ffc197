"""A node is lost in the middle of each command. The command ends as it would have ended with all nodes."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_equal_models, names_in, tiny_recipe
from machines import RayCluster, wait_for
from safetensors.torch import load_file

from patchloom.models.autoencoder import WEIGHTS
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder
from patchloom.pipelines.tune import tune
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.records.search import read_trials

RECIPE = tiny_recipe(train__images=3000)
SEEDS = "0-399"


@pytest.fixture(scope="session")
def whole(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as one machine makes it."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    prepare(str(archive), str(folder), resolution=16, workers=0)
    return folder


def notes(folder: Folder) -> int:
    return sum(name.startswith(".work/notes/") for name in folder.files())


@pytest.mark.parametrize("fate", ["killed", "cut off"])
def test_prepare_makes_the_shards_of_a_lost_node_again(
    cluster: RayCluster, archive: Path, whole: Path, store: str, fate: str
) -> None:
    there = Folder.at(f"{store}/lost-{fate[:3]}")
    process = cluster.start("prepare", f"{store}/source/images.npz", str(there), "--resolution", "16", "--workers", "2")
    wait_for(lambda: notes(there) > 1 or process.poll() is not None, "a finished shard")
    assert process.poll() is None, process.communicate()[0]
    if fate == "killed":
        cluster.kill("two")
    else:
        cluster.workers["two"].cut_off()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for name in names_in(whole):
        assert there.read(name) == (whole / name).read_bytes(), name
    if fate == "cut off":
        cluster.workers["two"].reconnect()
        cluster.kill("two")


def has_checkpoint(run: Folder) -> bool:
    return any(name.endswith("/checkpoint.json") for name in run.files())


def start_training(
    cluster: RayCluster, dataset: str, run: Folder, *more: str, **environment: str
) -> "subprocess.Popen[str]":
    """Start a training on two nodes, and wait for its first checkpoint."""
    cluster.head.write("/tmp/recipe.yaml", recipe_yaml(RECIPE))
    options = ["--data", dataset, "--out", str(run), "--workers", "2", *more]
    process = cluster.start("train", "/tmp/recipe.yaml", *options, **environment)
    wait_for(lambda: has_checkpoint(run) or process.poll() is not None, "a checkpoint", 300)
    assert process.poll() is None, process.communicate()[0]
    return process


@pytest.mark.parametrize("fate", ["node killed", "agent killed"])
def test_training_ends_with_the_weights_of_one_machine(
    cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str, fate: str
) -> None:
    run = Folder.at(f"{store}/runs/{fate.replace(' ', '-')}")
    process = start_training(cluster, dataset, run)
    if fate == "node killed":
        cluster.kill("two")
    else:  # Ray's processes on its node end too
        cluster.workers["two"].run(["pkill", "-9", "-f", "DashboardAgent"])
    cluster.add("three")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert_equal_models(local_copy(str(run)), run_of_one_machine)
    if fate == "agent killed":
        cluster.kill("two")  # the machine runs, and is no node any more


def test_training_ends_where_a_lost_node_does_not_return(cluster: RayCluster, dataset: str, store: str) -> None:
    run = Folder.at(f"{store}/runs/never-returned")
    process = start_training(cluster, dataset, run, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10")
    cluster.kill("two")
    lost_at = time.monotonic()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1 and "--resume" in output.splitlines()[-1], output
    assert time.monotonic() - lost_at > 8 * 10  # docs/faults.md: eight attempts


def test_sample_makes_the_shards_of_a_lost_node_again(
    cluster: RayCluster, run_of_one_machine: Path, store: str, tmp_path: Path
) -> None:
    there = Folder.at(f"{store}/models/tiny")
    for name in names_in(run_of_one_machine / "model"):
        there.put(run_of_one_machine / "model" / name, name)
    cluster.run("models", "register", str(there), "lost-nodes")
    whole = tmp_path / "whole"
    sample(str(run_of_one_machine), str(whole), SEEDS, steps=18, workers=0)
    there = Folder.at(f"{store}/samples-lost")
    process = cluster.start("sample", "models:/lost-nodes/1", str(there), "--seeds", SEEDS, "--workers", "2")
    wait_for(lambda: notes(there) > 1 or process.poll() is not None, "a finished shard")
    assert process.poll() is None, process.communicate()[0]
    cluster.kill("two")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    images = [name for name in names_in(whole) if name.endswith(".png") or name == "manifest.jsonl"]
    assert len(images) > 400
    for name in images:
        assert there.read(name) == (whole / name).read_bytes(), name


def test_an_autoencoder_ends_with_the_weights_of_one_machine(
    cluster: RayCluster, dataset: str, pixels: Path, ray_cluster: None, store: str, tmp_path: Path
) -> None:
    settings = AutoencoderSettings(widths=(8, 8), images=12_000, batch_size=4, patch=8)
    whole = train_autoencoder(str(pixels), str(tmp_path / "whole"), settings, workers=2)
    run = Folder.at(f"{store}/runs/autoencoder-lost")
    options = ["--widths", "8,8", "--images", "12000", "--batch-size", "4", "--patch", "8", "--workers", "2"]
    process = cluster.start("autoencoder", "train", dataset, "--out", str(run), *options)
    wait_for(lambda: has_checkpoint(run) or process.poll() is not None, "a checkpoint", 300)
    assert process.poll() is None, process.communicate()[0]
    cluster.kill("two")
    cluster.add("three")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    found, expected = load_file(local_copy(str(run)) / "model" / WEIGHTS), load_file(whole.model / WEIGHTS)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_search_makes_the_trials_of_one_machine(
    cluster: RayCluster, dataset: str, pixels: Path, ray_cluster: None, store: str, tmp_path: Path
) -> None:
    search = {
        "name": "p", "recipe": "recipe.yaml", "space": {"patches.p": {"grid": [0.25, 1.0]}},
        "budget": {"images": 3000}, "set": {"preview.every_images": 0},
        "of_budget": {"train.held_out_every_images": 0.5},
    }  # fmt: skip
    texts = {"recipe.yaml": recipe_yaml(RECIPE), "search.yaml": yaml.safe_dump(search)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        cluster.head.write(f"/tmp/home/{name}", text)
    tune(str(tmp_path / "search.yaml"), str(pixels), str(tmp_path / "whole"))
    there = Folder.at(f"{store}/search-lost")
    process = cluster.start("tune", "search.yaml", "--data", dataset, "--out", str(there))
    trials = [there.folder(f"trials/{name}") for name in ("000", "001")]
    wait_for(lambda: all(map(has_checkpoint, trials)) or process.poll() is not None, "checkpoints", 300)
    assert process.poll() is None, process.communicate()[0]
    cluster.kill("two")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    rows, whole = (read_trials(folder) for folder in (there, Folder.at(tmp_path / "whole")))
    assert [row.status for row in rows] == ["finished"] * 2
    assert {row.name: row.held_out_loss for row in rows} == {row.name: row.held_out_loss for row in whole}


class SlowFeatures(torch.nn.Module):
    """A network that takes milliseconds per image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 128, 3, padding=1), torch.nn.Conv2d(128, 128, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(images.float() / 255).relu()).mean((2, 3))[:, :4]


def test_evaluate_computes_the_features_of_a_lost_node_again(
    cluster: RayCluster, whole: Path, store: str, pixels: Path, dataset: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    torch.jit.script(SlowFeatures()).save(tmp_path / "slow.pt")
    Folder.at(f"{store}/networks").put(tmp_path / "slow.pt", "slow.pt")
    there = Folder.at(f"{store}/evaluated")
    for name in names_in(whole):
        there.put(whole / name, name)
    options = ["--features", f"{store}/networks/slow.pt", "--workers", "2"]
    process = cluster.start("evaluate", str(there), "--reference", dataset, *options, "--out", f"{store}/metrics.json")

    def features() -> int:
        return sum(name.endswith(".npy") for name in there.folder(".features").files())

    wait_for(lambda: features() > 2 or process.poll() is not None, "features")
    assert process.poll() is None, process.communicate()[0]
    cluster.kill("two")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    found = json.loads(Folder.at(store).read("metrics.json"))["metrics"]
    expected = evaluate(str(whole), str(pixels), features=str(tmp_path / "slow.pt"), workers=0)["metrics"]
    assert found["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-6)
