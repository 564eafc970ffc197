"""The whole flow launched from a laptop: datasets and samples have the bytes of one machine, and models its weights."""

import json
import sys
from pathlib import Path

import pytest
from helpers import assert_equal_models, names_in, tiny_recipe
from machines import Machine, Network, RayCluster

from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train import train
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml

RECIPE = tiny_recipe(train__images=400)
SEARCH = {
    "name": "p", "recipe": "recipe.yaml", "space": {"patches.p": {"grid": [0.25, 1.0]}}, "budget": {"images": 200},
    "of_budget": {"train.held_out_every_images": 0.5},
}  # fmt: skip


@pytest.fixture(scope="session")
def laptop(network: Network) -> Machine:
    """A machine outside of the cluster, with the token and no Ray."""
    return network.boot("laptop")


def launch(laptop: Machine, cluster: RayCluster, *arguments: str, code: int = 0) -> str:
    """Launch a command from the laptop, which must end with an exit code; returns what it printed."""
    command = [sys.executable, "-m", "patchloom", "launch", "--address", cluster.job_address, *arguments]
    done = laptop.run(command, 400)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def on_one_machine(archive: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same flow here: pixels, a run of two workers, samples."""
    folder = tmp_path_factory.mktemp("one-machine")
    prepare(str(archive), str(folder / "pixels"), resolution=16)
    train(RECIPE, str(folder / "pixels"), str(folder / "run"), workers=2)
    sample(str(folder / "run"), str(folder / "samples"), "0-31", steps=4)
    return folder


def assert_same_files(there: Folder, here: Path, *endings: str) -> None:
    names = [name for name in names_in(here) if name.endswith(endings)]
    assert names
    for name in names:
        assert there.read(name) == (here / name).read_bytes(), name


def test_commands_launched_from_a_laptop_give_the_results_of_one_machine(
    cluster: RayCluster, laptop: Machine, on_one_machine: Path, archive: Path, store: str
) -> None:
    flow = Folder.at(f"{store}/flow")
    laptop.write("/tmp/home/recipe.yaml", recipe_yaml(RECIPE))
    laptop.write("/tmp/home/search.yaml", json.dumps(SEARCH))

    launch(laptop, cluster, "prepare", f"{store}/source/images.npz", f"{flow}/pixels", "--resolution", "16")
    assert_same_files(flow.folder("pixels"), on_one_machine / "pixels", "")

    launch(
        laptop, cluster, "train", "recipe.yaml", "--data", f"{flow}/pixels", "--out", f"{flow}/run", "--workers", "2"
    )
    assert_equal_models(local_copy(f"{flow}/run"), on_one_machine / "run")

    launch(laptop, cluster, "models", "register", f"{flow}/run", "flow", "--alias", "champion")
    launch(laptop, cluster, "sample", "models:/flow@champion", f"{flow}/samples", "--seeds", "0-31", "--steps", "4")
    assert_same_files(flow.folder("samples"), on_one_machine / "samples", ".png", ".jsonl")

    launch(laptop, cluster, "evaluate", f"{flow}/samples", "--reference", f"{flow}/pixels", "--features", "colours")
    assert "frechet_distance" in json.loads(flow.read("samples/metrics.json"))["metrics"]

    launch(laptop, cluster, "report", f"{flow}/run", f"{flow}/report.html")
    assert b"<html" in flow.read("report.html")


def test_an_autoencoder_and_a_search_on_the_cluster(
    cluster: RayCluster, laptop: Machine, dataset: str, store: str
) -> None:
    flow = Folder.at(f"{store}/flow")
    laptop.write("/tmp/home/recipe.yaml", recipe_yaml(RECIPE))
    laptop.write("/tmp/home/search.yaml", json.dumps(SEARCH))
    small = ["--widths", "8,8", "--images", "64", "--patch", "8", "--workers", "2"]
    launch(
        laptop, cluster, "autoencoder", "train", dataset, "--out", f"{flow}/autoencoder", *small, "--register", "vae"
    )
    launch(laptop, cluster, "prepare", dataset, f"{flow}/latents", "--autoencoder", "models:/vae/1")
    launch(laptop, cluster, "tune", "search.yaml", "--data", dataset, "--out", f"{flow}/search")
    rows = [json.loads(line) for line in flow.read("search/trials.jsonl").splitlines()]
    assert [row["status"] for row in rows] == ["finished"] * 2


def test_exit_codes_travel(cluster: RayCluster, laptop: Machine, store: str) -> None:
    output = launch(laptop, cluster, "inspect", f"{store}/nowhere", code=2)
    assert f"{store}/nowhere" in output.splitlines()[-1]


def test_the_doctor_checks_every_node(cluster: RayCluster, laptop: Machine, store: str) -> None:
    machines = [cluster.head, *cluster.workers.values()]
    output = launch(laptop, cluster, "doctor", "--cluster", "--store", f"{store}/doctor")
    assert all(machine.address in output for machine in machines)
