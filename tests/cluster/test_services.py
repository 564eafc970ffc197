"""Faults around a training on two machines: MLflow, the store, the driver, the head, and a second launcher."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from helpers import assert_equal_models, tiny_recipe
from machines import Network, RayCluster, TrackingServer, wait_for

from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.records.run import read_progress

RECIPE = tiny_recipe(train__images=3000)  # the run of `run_of_one_machine`


@pytest.fixture
def own_cluster(network: Network, store: str, tracking: TrackingServer) -> Iterator[RayCluster]:
    """A cluster that the test may destroy."""
    cluster = RayCluster(network)
    cluster.set_workers("one", "two")
    yield cluster
    cluster.end()


def start_training(cluster: RayCluster, dataset: str, run: Folder, *more: str) -> "subprocess.Popen[str]":
    cluster.head.write("/tmp/recipe.yaml", recipe_yaml(RECIPE))
    return cluster.start("train", "/tmp/recipe.yaml", "--data", dataset, "--out", str(run), "--workers", "2", *more)


def wait_for_checkpoint(run: Folder, process: "subprocess.Popen[str]") -> None:
    def is_there() -> bool:
        return any(name.endswith("/checkpoint.json") for name in run.files())

    wait_for(lambda: process.poll() is not None or is_there(), "a checkpoint", 300)
    assert process.poll() is None, process.communicate()[0]


def assert_finished(process: "subprocess.Popen[str]", run: Folder, expected: Path) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert_equal_models(local_copy(str(run)), expected)
    return output


def test_training_goes_on_while_mlflow_is_stopped(
    cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str, tracking: TrackingServer
) -> None:
    run = Folder.at(f"{store}/runs/mlflow-stopped")
    process = start_training(cluster, dataset, run)
    wait_for_checkpoint(run, process)
    tracking.stop()
    time.sleep(60)
    tracking.start()
    assert_finished(process, run, run_of_one_machine)
    cluster.run("train", "--resume", str(run), "--workers", "2")  # sends what is left, if MLflow came back too late
    import mlflow

    client = mlflow.MlflowClient(tracking.address)
    losses = client.get_metric_history(run.read_json("run.json")["run_id"], "loss")
    lines = read_progress(local_copy(str(run)))
    assert sorted(metric.step for metric in losses) == [line.step for line in lines]


@pytest.mark.parametrize("mode", ["503", "slow"])
def test_training_goes_on_while_the_store_fails(
    cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str, s3_proxy: FaultyProxy, mode: str
) -> None:
    run = Folder.at(f"{store}/runs/store-{mode}")
    process = start_training(cluster, dataset, run)
    wait_for_checkpoint(run, process)
    s3_proxy.set(mode)  # type: ignore[arg-type]
    time.sleep(40)
    s3_proxy.set("ok")
    assert_finished(process, run, run_of_one_machine)


def test_a_second_launcher_of_a_run_is_refused(
    cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str
) -> None:
    run = Folder.at(f"{store}/runs/twice")
    process = start_training(cluster, dataset, run)
    wait_for_checkpoint(run, process)
    second = cluster.start("train", "--resume", str(run), "--workers", "2", PATCHLOOM_CACHE="/tmp/other-cache")
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 2, output
    assert_finished(process, run, run_of_one_machine)


def test_a_killed_driver_is_continued_with_resume(
    cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str
) -> None:
    run = Folder.at(f"{store}/runs/driver-killed")
    process = start_training(cluster, dataset, run)
    wait_for_checkpoint(run, process)
    process.send_signal(signal.SIGKILL)  # nsenter; the driver itself is its child
    cluster.head.run(["pkill", "-9", "-f", "patchloom.pipelines.cli train"])
    process.communicate()
    again = start_training(cluster, dataset, run, "--resume")
    assert_finished(again, run, run_of_one_machine)


def test_a_run_of_a_lost_head_is_continued_on_another_cluster(
    own_cluster: RayCluster, cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str
) -> None:
    run = Folder.at(f"{store}/runs/head-lost")
    process = start_training(own_cluster, dataset, run)
    wait_for_checkpoint(run, process)
    own_cluster.end()
    process.communicate(timeout=60)
    again = start_training(cluster, dataset, run, "--resume")
    assert_finished(again, run, run_of_one_machine)


def test_training_goes_on_without_the_dashboard(
    own_cluster: RayCluster, dataset: str, run_of_one_machine: Path, store: str
) -> None:
    run = Folder.at(f"{store}/runs/dashboard-killed")
    process = start_training(own_cluster, dataset, run)
    wait_for_checkpoint(run, process)
    assert own_cluster.head.run(["pkill", "-9", "-f", "dashboard/dashboard.py"]).returncode == 0
    assert_finished(process, run, run_of_one_machine)
