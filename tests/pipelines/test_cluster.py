"""Several nodes: two train the model of one; one that is lost, with notice or without, is replaced or done without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe
from safetensors.torch import load_file

from patchloom.pipelines.train import train

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPE = tiny_recipe(train__images=1500)

# Ray's own cluster of several raylets on one machine; a worker takes the only CPU of its node, so two need both.
SCRIPT = """
import json, os, sys, threading, time
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.2"
import ray.cluster_utils
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
recipe, data, out, fate = json.loads(sys.argv[1])
small = {"object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
os.environ["RAY_ADDRESS"] = cluster.address
from pathlib import Path
from patchloom.pipelines.train import train
from patchloom.platform.recipe import check_recipe
training = threading.Thread(
    target=train, args=(check_recipe(recipe), data, out),
    kwargs={"workers": 2, "min_workers": 1 if fate == "gone" else None, "show": lambda line: None},
)
training.start()
while fate == "noticed" and training.is_alive() and not os.path.exists(out + "/progress.jsonl"):
    time.sleep(0.1)
if fate == "noticed":  # as a spot instance is: told first, taken away then
    client, deadline_ms = GcsClient(address=cluster.gcs_address), round((time.time() + 60) * 1000)
    client.drain_node(nodes[1].node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms)
while fate != "spared" and training.is_alive():
    time.sleep(0.1)
    if newest_checkpoint(Path(out)) is not None:
        cluster.remove_node(nodes[1], allow_graceful=False)
        time.sleep(60 if fate == "replaced late" else 0)
        if fate in ("replaced", "replaced late", "noticed"):
            cluster.add_node(num_cpus=1, **small)
        print("LOST A NODE")
        break
training.join()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def one_node(ray_cluster: None, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two workers on one node."""
    folder = tmp_path_factory.mktemp("one")
    return train(RECIPE, str(pixels), str(folder / "run"), workers=2).folder


@pytest.mark.parametrize("fate", ["spared", "replaced", "replaced late", "noticed", "gone"])
def test_two_nodes_train_the_model_of_one(one_node: Path, pixels: Path, tmp_path: Path, fate: str) -> None:
    recipe = RECIPE  # whose only checkpoint before the end is that of the notice, where there is one
    if fate == "noticed":
        recipe = tiny_recipe(train__images=RECIPE.train.images, train__checkpoint_every_images=10_000)
    arguments = [recipe.model_dump(mode="json"), str(pixels), str(tmp_path / "two"), fate]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)], capture_output=True, text=True, timeout=420, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("LOST A NODE" in done.stdout) is (fate != "spared")
    assert ("waiting since" in done.stdout + done.stderr) is (fate == "replaced late")
    one, two = (load_file(run / "model" / "model.safetensors") for run in (one_node, tmp_path / "two"))
    for name in one:
        if fate == "gone":  # one worker adds up in another order than two
            torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3, msg=name)
        else:
            assert torch.equal(one[name], two[name])
