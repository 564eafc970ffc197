"""What each command reserves on nodes whose GPUs exist for Ray only. The processes compute on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, start_cli, tiny_recipe

from patchloom.errors import UserError
from patchloom.pipelines.cli.options import chosen_resources
from patchloom.platform.recipe.run_recipe import recipe_yaml

# a head without CPUs, a node with two GPUs, and one with one of another type and a label
SCRIPT = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import ray.cluster_utils
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
folder = Path(sys.argv[1])
small = {"object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **small})
two = cluster.add_node(num_cpus=4, num_gpus=2, resources={"accelerator_type:A100": 1}, labels={"zone": "a"}, **small)
one = cluster.add_node(num_cpus=4, num_gpus=1, resources={"accelerator_type:T4": 1}, labels={"zone": "b"}, **small)
os.environ["RAY_ADDRESS"] = cluster.address
from patchloom.errors import UserError
from patchloom.platform.compute.actors import map_on_actors, room_for_pool
from patchloom.platform.compute.resources import Resources
from patchloom.platform.compute.session import ray_session
from patchloom.platform.compute.shared_paths import NO_PATHS
from patchloom.platform.compute.stopping import RunControl
from patchloom.platform.compute.tuner import TuneResources, room_for_trials, run_on_tune
from patchloom.platform.compute.workers import room_for_workers, run_workers, train_worker_shape
from patchloom.platform.files.folder import Folder

def reserved():
    import ray
    context = ray.get_runtime_context()
    zone = next(node["Labels"].get("zone") for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {"gpus": context.get_assigned_resources().get("GPU", 0), "zone": zone}

class Actor:
    def __init__(self, argument):
        pass
    def __call__(self, item, report):
        return reserved()

def trial(path):
    bundle = train_worker_shape(1, Resources())[0].bundle
    Path(path).write_text(json.dumps(reserved() | {"worker": bundle}))

def loop(worker, config):
    return worker.gather(reserved() | {"device": str(worker.device)})

def refused(function):
    try:
        with function():
            return "NOT REFUSED"
    except UserError as error:
        return str(error)

none = lambda *_: None
control = RunControl(none, none, lambda: False, none, lambda: 0)
found = {}
def pool(name, **given):
    found[name] = [result for _, result in map_on_actors(Actor, 0, range(4), 2, True, resources=Resources(**given))]
def trials(name, workers, **given):
    paths = [str(folder / f"{name}-{number}.json") for number in range(2)]
    run_on_tune(trial, paths, Folder.at(folder / name), TuneResources(None, workers, Resources(**given)), lambda _: 0)
    found[name] = [json.loads(Path(path).read_text()) for path in paths]

with ray_session():
    pool("sample")
    pool("sample on T4", accelerator="T4", gpus_per_worker=0.5)
    pool("sample on CPUs", gpus_per_worker=0, labels={"zone": "a"})
    trials("tune", 0)
    trials("tune on zone b", 0, gpus_per_worker=0.5, labels={"zone": "b"})
    with room_for_workers(3, None, Resources(), NO_PATHS) as chosen:
        found["three workers"] = chosen.gpus_per_worker
    with room_for_trials(TuneResources(None, 2), NO_PATHS) as chosen:
        gpus, bundle = chosen.nodes.gpus_per_worker, chosen.shape().bundle
        found["trials of two workers"] = [gpus, bundle, chosen.parallel_trials(3)]
    found["four workers"] = refused(lambda: room_for_workers(4, None, Resources(), NO_PATHS))
    found["two on T4"] = refused(lambda: room_for_workers(2, None, Resources(accelerator="T4"), NO_PATHS))
    found["half a GPU"] = refused(lambda: room_for_workers(2, None, Resources(gpus_per_worker=0.5), NO_PATHS))
    found["no such zone"] = refused(lambda: room_for_pool(1, True, Resources(labels={"zone": "c"}, gpus_per_worker=1)))
    found["train"] = run_workers(loop, None, 2, folder / "train", "train", control, resources=Resources())
print(json.dumps(found))
cluster.shutdown()
"""


@pytest.mark.slow
def test_commands_reserve_what_is_documented(tmp_path: Path) -> None:
    with environment(PATCHLOOM_DEVICE="cpu"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=500, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one["gpus"] for one in found["sample"]] == [1] * 4
    assert found["sample on T4"] == [{"gpus": 0.5, "zone": "b"}] * 4
    assert found["sample on CPUs"] == [{"gpus": 0, "zone": "a"}] * 4
    assert [one["gpus"] for one in found["tune"]] == [1, 1]
    worker = {"CPU": 0.99, "GPU": 1}
    assert found["tune on zone b"] == [{"gpus": 0.5, "zone": "b", "worker": worker}] * 2
    assert found["three workers"] == 1
    assert found["trials of two workers"] == [1, worker, 1]
    assert "3 of 4 workers" in found["four workers"] and "--gpus 0" in found["four workers"]
    assert "1 of 2 workers" in found["two on T4"] and "0.5" in found["half a GPU"]
    assert "0 of 1 worker" in found["no such zone"]
    assert [one["gpus"] for one in found["train"]] == [1, 1]
    assert [one["device"] for one in found["train"]] == ["cpu", "cpu"]


@pytest.mark.slow
def test_gpus_that_this_machine_lacks_end_a_command_before_it_writes(pixels: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(recipe_yaml(tiny_recipe()))
    with environment(RAY_OVERRIDE_RESOURCES='{"CPU": 2, "GPU": 1}', PATCHLOOM_DEVICE="cpu"):
        command = ["train", "tiny.yaml", "--data", str(pixels), "--out", "run", "--gpus", "1", "--workers", "2"]
        ended = start_cli(*command, cwd=tmp_path)
        output, _ = ended.communicate(timeout=300)
    assert ended.returncode == 2, output
    assert "1 of 2 workers" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_gpus_without_workers_are_a_mistake() -> None:
    assert chosen_resources(None, None, None, 0.5).gpus_per_worker == 0.5
    assert chosen_resources(["gpus_per_worker=0.5"], None, 0, None).workers == 0
    assert chosen_resources(None, None, 0, 0.5, for_trials=True).gpus_per_worker == 0.5
    with pytest.raises(UserError, match="--workers 0"):
        chosen_resources(None, None, 0, 0.5)
    with pytest.raises(UserError, match="gpus_per_worker"):
        chosen_resources(["gpus_per_worker=2"], None, None, None)
