"""An elastic run on a cluster that grows: it goes on with more workers, almost where it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_recipe

# a worker takes the only CPU of its node; the second node comes when the first worker trains
SCRIPT = """
import json, os, sys
import ray.cluster_utils
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
recipe, data, out = json.loads(sys.argv[1])
small = {"object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
cluster.add_node(num_cpus=1, **small)
os.environ["RAY_ADDRESS"] = cluster.address
import threading, time
from pathlib import Path
from patchloom.errors import Stopped
from patchloom.pipelines.train import train
from patchloom.pipelines.train.control import ask_to_stop, newest_step
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import check_recipe
from patchloom.platform.records.run import read_progress

def run():
    try:
        train(check_recipe(recipe), data, out, workers=2, min_workers=1, show=lambda line: None)
    except Stopped as stopped:
        print("STOPPED", stopped)

training, progress, last = threading.Thread(target=run), Path(out) / "progress.jsonl", 0
training.start()
while training.is_alive() and not read_progress(Path(out)):
    time.sleep(0.1)
first = progress.stat().st_ino
cluster.add_node(num_cpus=1, **small)
while training.is_alive() and progress.stat().st_ino == first:
    last = max([last, *(line.step for line in read_progress(Path(out))[-1:])])
    time.sleep(0.2)
print("WENT BACK", json.dumps([last, newest_step(Folder.at(out))]), flush=True)
ask_to_stop(Folder.at(out))
training.join()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_growth_of_an_elastic_run_loses_few_steps(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train__images=10_000_000, train__log_every_images=160, train__checkpoint_every_images=5_000_000,
        preview__every_images=0,
    )  # fmt: skip
    arguments = [recipe.model_dump(mode="json"), str(pixels), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)], capture_output=True, text=True, timeout=420, cwd=tmp_path
    )
    assert done.returncode == 0 and "STOPPED" in done.stdout, done.stdout + done.stderr
    assert "1 of 2 workers" in done.stdout + done.stderr and "2 of 2 workers" in done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("WENT BACK"))
    print(line)
    before, after = json.loads(line.removeprefix("WENT BACK"))
    assert after >= 0.8 * before  # all steps but those of the last seconds
