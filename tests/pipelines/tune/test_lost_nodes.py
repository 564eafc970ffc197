"""A search on a cluster whose nodes are lost: trials continue from their checkpoints on other nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import tiny_recipe

from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.records.search import read_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# The node of the trial is lost three times, each time after a new checkpoint, and another one comes.
SCRIPT = """
import json, os, sys, threading, time
import ray.cluster_utils
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
search, data, out = json.loads(sys.argv[1])
small = {"object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
node = cluster.add_node(num_cpus=1, **small)
os.environ["RAY_ADDRESS"] = cluster.address
from patchloom.pipelines.train.checkpointer import whole_checkpoints
from patchloom.pipelines.tune import tune
from patchloom.platform.files.folder import Folder
searching = threading.Thread(target=tune, args=(search, data, out))
searching.start()
trial, seen, lost = Folder.at(out + "/trials/000"), None, 0
while searching.is_alive() and lost < 3:
    time.sleep(0.05)
    newest = (whole_checkpoints(trial) or [None])[-1]
    if newest != seen:
        seen, lost = newest, lost + 1
        cluster.remove_node(node, allow_graceful=False)
        node = cluster.add_node(num_cpus=1, **small)
        print("LOST A NODE AT", newest, flush=True)
searching.join()
cluster.shutdown()
"""


def test_a_trial_whose_node_is_lost_continues_elsewhere(pixels: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(recipe_yaml(tiny_recipe()))
    search = {
        "name": "lost",
        "recipe": "base.yaml",
        "space": {"patches.p": {"grid": [0.5]}},
        "set": {"preview.every_images": 0},
        "budget": {"updates": 400},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    arguments = json.dumps([str(tmp_path / "search.yaml"), str(pixels), str(tmp_path / "search")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout.count("LOST A NODE") == 3, done.stdout + done.stderr
    (row,) = read_trials(Folder.at(tmp_path / "search"))
    assert (row.status, row.updates) == ("finished", 400), done.stdout + done.stderr
