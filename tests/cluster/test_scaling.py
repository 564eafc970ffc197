"""A cluster that starts without worker nodes: commands wait for the autoscaler, or say that no node type fits."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from helpers import tiny_recipe
from machines import RAY_PORT, Machine, Network, cpus

from patchloom.platform.recipe import recipe_yaml

HEAD_ID = "f" * 51 + "00000"  # the provider has fixed names for the head and its type
NODE_TYPES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
}
CLUSTER = {
    "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 10, "idle_timeout_minutes": 1, "auth": {},
    "provider": {"type": "fake_multinode", "launch_multiple": True, "head_node_id": HEAD_ID,
                 "disable_node_updaters": True, "disable_launch_config_check": True},
    "available_node_types": NODE_TYPES, "head_node_type": "ray.head.default",
    **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands",
                           "head_setup_commands", "worker_setup_commands", "initialization_commands",
                           "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts": {}, "file_mounts_sync_continuously": False,
}  # fmt: skip
VARIABLES = {
    "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}  # fmt: skip


@pytest.fixture
def growing(network: Network, store: str, tracking: object) -> Iterator[Machine]:
    """A head whose autoscaler starts nodes as processes on the same machine, up to two with one CPU each."""
    machine = network.boot(f"growing{len(network.machines)}")
    machine.environment |= VARIABLES
    # Ray's wheel lacks a file that its provider for tests reads
    package = Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
    overlay = f"mount -t overlay overlay -o lowerdir={package},upperdir=/tmp/upper,workdir=/tmp/work {package}"
    done = machine.run(["sh", "-c", f"mkdir /tmp/upper /tmp/work && {overlay}"])
    assert done.returncode == 0, done.stdout
    for path in ("/tmp/cluster.yaml", str(package / "example.yaml")):
        machine.write(path, json.dumps(CLUSTER))
    options = ["--head", "--num-cpus=0", f"--port={RAY_PORT}", "--autoscaling-config=/tmp/cluster.yaml"]
    machine.start_ray(*options)
    yield machine
    machine.kill()


def start(machine: Machine, *arguments: str) -> "tuple[int, str]":
    command = [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
    done = machine.run(command, 400, RAY_ADDRESS=f"{machine.address}:{RAY_PORT}")
    return done.returncode, done.stdout


def test_training_starts_the_nodes_that_it_needs(growing: Machine, dataset: str, store: str) -> None:
    growing.write("/tmp/recipe.yaml", recipe_yaml(tiny_recipe(train__images=200)))
    code, output = start(
        growing, "train", "/tmp/recipe.yaml", "--data", dataset, "--out", f"{store}/runs/grown", "--workers", "2"
    )
    assert code == 0, output
    assert "waiting since" in output and "2 worker" in output


def test_prepare_starts_the_nodes_that_it_needs(growing: Machine, archive: Path, store: str) -> None:
    code, output = start(growing, "prepare", f"{store}/source/images.npz", f"{store}/grown", "--resolution", "16")
    assert code == 0, output
    assert cpus(growing, f"{growing.address}:{RAY_PORT}") == 2


def test_workers_that_no_node_type_provides_are_refused_at_once(growing: Machine, dataset: str, store: str) -> None:
    growing.write("/tmp/recipe.yaml", recipe_yaml(tiny_recipe(train__images=200)))
    began = time.monotonic()
    run = f"{store}/runs/impossible"
    code, output = start(growing, "train", "/tmp/recipe.yaml", "--data", dataset, "--out", run, "--workers", "3")
    assert code == 2 and time.monotonic() - began < 120, output
    code, output = start(
        growing,
        "train",
        "/tmp/recipe.yaml",
        "--data",
        dataset,
        "--out",
        run,
        "--workers",
        "2",
        "--set",
        "train.images=64",
    )
    assert code == 0, output  # the refused call left nothing behind
