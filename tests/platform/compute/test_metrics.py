"""Metrics: off in a session on this machine; a cluster has the numbers of the progress lines at its metrics ports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_recipe

from patchloom.platform.compute.metrics import SWITCH, MetricRecorder, metrics_are_on
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.run import read_progress

# scrapes both nodes twice per second while commands run
SCRIPT = """
import json, os, sys, threading, time, urllib.request
import ray.cluster_utils
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
images, data, out, recipe = json.loads(sys.argv[1])
small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=small)
cluster.add_node(**small)
os.environ["RAY_ADDRESS"] = cluster.address
ray.init(log_to_driver=False)
ports = [node["MetricsExportPort"] for node in ray.nodes()]
ray.shutdown()
ended = threading.Event()

def scrape():
    while not ended.wait(0.5):
        for port in ports:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
            print("\\n".join(line for line in text.splitlines() if line.startswith("ray_patchloom")), flush=True)

scraper = threading.Thread(target=scrape)
scraper.start()
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.train import train
from patchloom.platform.recipe import check_recipe
prepare(images, data, resolution=16, shard_rows=8, workers=2)
time.sleep(3)
train(check_recipe(recipe), data, out, workers=2)
time.sleep(3)
ended.set()
scraper.join()
cluster.shutdown()
"""
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$")


def test_metrics_are_off_in_a_session_on_this_machine(ray_cluster: None) -> None:
    assert os.environ[SWITCH] == "0" and not metrics_are_on()


@pytest.mark.parametrize(
    "address", ["s3://bucket/run?access_key=KEY&secret_key=SECRET", "s3://KEY:SECRET@bucket/run", "s3://bucket/run"]
)
def test_labels_have_no_keys_of_the_address(address: str) -> None:
    labels = MetricRecorder("train", "tiny", Folder.at(address), "0").labels
    assert labels["run"] == "s3://bucket/run" and labels["rank"] == "0" and labels["name"] == "tiny"
    assert "KEY" not in "".join(labels.values()) and MetricRecorder("prepare").labels["run"] == ""


@pytest.mark.slow
def test_a_cluster_offers_the_numbers_of_the_progress_lines(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__images=4000, train__log_every_images=1000, preview__every_images=0)
    given = [str(images), str(tmp_path / "data"), str(tmp_path / "run"), recipe.model_dump(mode="json")]
    own = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(given)], capture_output=True, text=True, timeout=300,
        env=own | {"RAY_metrics_report_interval_ms": "500"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in (match.groups() for match in map(SAMPLE.match, done.stdout.splitlines()) if match):
        found.setdefault(name.removeprefix("ray_patchloom_"), []).append(
            (dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
        )

    def values(name: str) -> set[float]:
        return {value for _, value in found[name]}

    assert max(values("job_images")) == 49  # 48 images and a file that is none
    attempts = {
        (labels["host"], labels.get("WorkerId"), labels["attempt"]): value
        for labels, value in found["job_attempts_total"]
    }
    assert sum(attempts.values()) == 7 and {attempt for *_, attempt in attempts} == {"1"}  # shards of 8 inputs
    lines = {line.step: line for line in read_progress(tmp_path / "run")}
    assert values("train_images_seen") <= {line.images_seen for line in lines.values()}
    assert values("train_loss") <= {line.loss for line in lines.values()}
    assert max(values("train_images_seen")) == max(line.images_seen for line in lines.values())
    assert values("train_workers") == {2}
    assert {labels["rank"] for labels, _ in found["train_worker_images_per_second"]} == {"0", "1"}
    assert {labels["run"] for labels, _ in found["train_step"]} == {str(tmp_path / "run")}
