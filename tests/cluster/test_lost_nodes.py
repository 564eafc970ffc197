"""A node is lost in the middle of each command. The command ends as it would have ended with all nodes."""

import subprocess
from pathlib import Path

import pytest
from helpers import assert_equal_models, names_in, tiny_recipe
from machines import RayCluster, wait_for

from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.sample import sample
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml

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


def start_training(cluster: RayCluster, dataset: str, run: Folder, *more: str) -> "subprocess.Popen[str]":
    """Start a training on two nodes, and wait for its first checkpoint."""
    cluster.head.write("/tmp/recipe.yaml", recipe_yaml(RECIPE))
    options = ["--data", dataset, "--out", str(run), "--workers", "2", *more]
    process = cluster.start("train", "/tmp/recipe.yaml", *options)
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
