"""Resources of workers: read from YAML and options, counted per node, and waited for on a cluster that grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, WorkerShape, load_resources, worker_shape


def test_later_settings_override_files_and_earlier_settings(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("workers: 8\nmin_workers: 2\nlabels: {zone: a}\naccelerator: A100\n")
    found = load_resources([str(tmp_path / "cluster.yaml"), "workers=4", "placement=spread", "labels.disk=nvme"])
    assert (found.workers, found.min_workers, found.placement, found.accelerator) == (4, 2, "spread", "A100")
    assert found.labels == {"zone": "a", "disk": "nvme"}
    assert load_resources([]) == DEFAULT_RESOURCES


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["worker=4"], "workers"),
        (["workers=-1"], "workers"),
        (["placement=near"], "near"),
        (["workers=2", "min_workers=3"], "3"),
        (["cpus_per_worker=0"], "cpus_per_worker"),
        (["wait_minutes=-1"], "wait_minutes"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_resources(settings)


def test_addresses_are_set_unless_they_are_set_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine:5000")
    load_resources(["address=10.0.0.1:6379", "mlflow=http://other:5000"]).set_environment()
    import os

    assert os.environ.pop("RAY_ADDRESS") == "10.0.0.1:6379"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://mine:5000"


def test_workers_per_node_are_counted_by_the_scarcest_resource() -> None:
    shape = WorkerShape({"CPU": 4, "GPU": 1}, {})
    assert shape.fits({"CPU": 16, "GPU": 2}) == 2
    assert shape.fits({"CPU": 7, "GPU": 2}) == 1
    assert shape.fits({"CPU": 16}) == 0
    typed = worker_shape(load_resources(["accelerator=A100"]), cpus=1, gpus=1)
    assert typed.fits({"CPU": 8, "GPU": 4, "accelerator_type:A100": 1}) == 4
    assert typed.fits({"CPU": 8, "GPU": 4, "accelerator_type:T4": 1}) == 0


# A head without CPUs, as on a cluster; nodes come while the command waits, or never.
SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path
import ray.cluster_utils
from patchloom.errors import UserError
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
recipe, images, data, out = json.loads(sys.argv[1])
small = {"object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
os.environ["RAY_ADDRESS"] = cluster.address
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.train import train
from patchloom.platform.compute.resources import load_resources
from patchloom.platform.recipe import check_recipe
recipe = check_recipe(recipe)
for wait in ([], ["wait_minutes=0.05"]):  # the cluster is fixed, or its owner is slow
    try:
        train(recipe, data, out, workers=2, resources=load_resources(wait))
        print("TRAINED WITHOUT CPUS")
    except UserError as error:
        print("REFUSED", error)
assert not os.path.exists(out)
def run_waiting():
    train(recipe, data, out, workers=2, resources=load_resources(["wait_minutes=5"]), show=lambda line: None)
    print("TRAINED", ray.is_initialized())
training = threading.Thread(target=run_waiting)
training.start()
time.sleep(4)
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
training.join()
preparing = threading.Thread(target=prepare, args=(images, out + "-pixels"), kwargs={"resolution": 16, "shard_rows": 4})
preparing.start()
while preparing.is_alive() and not list(Path(out + "-pixels", ".work", "notes").glob("part-*.json")):
    time.sleep(0.02)
cluster.remove_node(nodes[0], allow_graceful=False)
preparing.join()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_commands_wait_for_nodes_and_survive_their_loss(images: Path, pixels: Path, tmp_path: Path) -> None:
    from helpers import tiny_recipe

    from patchloom.platform.dataset import open_dataset

    recipe = tiny_recipe(train__images=64).model_dump(mode="json")
    arguments = [recipe, str(images), str(pixels), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("REFUSED") == 2, done.stdout
    assert "waiting since" in done.stdout and "TRAINED False" in done.stdout
    assert (tmp_path / "run" / "model" / "model.json").is_file()
    assert len(open_dataset(tmp_path / "run-pixels")) == 48
