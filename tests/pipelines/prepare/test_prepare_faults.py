"""Killed preparations continue and give the same bytes, with any number of workers, local and remote."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers import shard_hashes, start_cli, wait_until

from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.pipelines.inspect import inspect
from patchloom.pipelines.prepare import prepare
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.folder import Folder

pytestmark = pytest.mark.ray
SLOW = pytest.mark.slow
IMAGES = 5_000


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An array of images, and an autoencoder that needs some seconds to encode them."""
    folder = tmp_path_factory.mktemp("work")
    pictures = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pictures, labels=np.arange(IMAGES) % 3)
    torch.manual_seed(0)
    (folder / "ae").mkdir()
    save_autoencoder(new_autoencoder((32, 64), 4), folder / "ae")
    return folder / "images.npz", folder / "ae"


@pytest.fixture(scope="module")
def whole(work: tuple[Path, Path], ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a preparation without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "latents"
    prepare(str(work[0]), str(folder), resolution=16, autoencoder=str(work[1]))
    return folder


def assert_equal_datasets(one: Path, other: Path) -> None:
    assert (one / "dataset.json").read_bytes() == (other / "dataset.json").read_bytes()
    assert shard_hashes(one) == shard_hashes(other)
    assert inspect(str(one)).card["rows"] == IMAGES


def finished(folder: Path) -> list[Path]:
    return list((folder / ".work" / "notes").glob("part-*.json"))


@pytest.mark.parametrize(
    "victim", [pytest.param("an actor", marks=SLOW), "the command", pytest.param("everything", marks=SLOW)]
)
def test_next_call_completes_a_killed_preparation(
    work: tuple[Path, Path], whole: Path, tmp_path: Path, victim: str
) -> None:
    arguments = ["prepare", str(work[0]), "latents", "--resolution", "16", "--autoencoder", str(work[1])]
    process = start_cli(*arguments, cwd=tmp_path)
    wait_until(lambda: finished(tmp_path / "latents"), process)
    if victim == "an actor":
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if any("MapWorker" in part for part in child.cmdline())]
        workers[0].kill()
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    else:
        killed = os.killpg if victim == "everything" else os.kill
        killed(process.pid, signal.SIGKILL)
        process.communicate()
        kept = {path.name: path.stat().st_mtime_ns for path in finished(tmp_path / "latents")}
        assert 0 < len(kept) < len(shard_hashes(whole))
        prepare(str(work[0]), str(tmp_path / "latents"), resolution=16, autoencoder=str(work[1]))
    assert_equal_datasets(tmp_path / "latents", whole)


def test_four_workers_and_one_write_equal_datasets(work: tuple[Path, Path], ray_cluster: None, tmp_path: Path) -> None:
    for workers in (1, 4):
        prepare(str(work[0]), str(tmp_path / str(workers)), resolution=16, workers=workers, shard_rows=700)
    assert_equal_datasets(tmp_path / "4", tmp_path / "1")


@SLOW
def test_remote_dataset_equals_local_dataset(
    s3: str, work: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source and shards are remote; reading the dataset uses a verified local copy."""
    there = Folder.at(f"{s3}/prepared")
    there.put(work[0], "source/images.npz")
    prepare(f"{there}/source/images.npz", f"{there}/latents", resolution=16, autoencoder=str(work[1]))
    names = there.folder("latents").files()
    for name in ("dataset.json", *(f"shards/{name}" for name in shard_hashes(whole))):
        assert there.read(f"latents/{name}") == (whole / name).read_bytes()
    assert not [name for name in names if name.startswith(".")]
    assert inspect(f"{there}/latents").contact_sheet == f"{there}/latents/contact_sheet.png"
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path))
    far, near = open_dataset(f"{there}/latents"), open_dataset(whole)
    assert far.fingerprint == near.fingerprint
    np.testing.assert_array_equal(far.rows([4321, 0])["mean"], near.rows([4321, 0])["mean"])


CLUSTER = """
import json, sys, threading, time
from pathlib import Path
import ray.cluster_utils
from patchloom.platform.compute.session import quiet_environment
quiet_environment()
source, encoder, out = json.loads(sys.argv[1])
small = {"object_store_memory": 100 * 2**20}
cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
import os
os.environ["RAY_ADDRESS"] = cluster.address
from patchloom.pipelines.prepare import prepare
options = {"resolution": 16, "autoencoder": encoder}
preparing = threading.Thread(target=prepare, args=(source, out), kwargs=options)
preparing.start()
notes = Path(out) / ".work" / "notes"
while preparing.is_alive() and not list(notes.glob("part-*.json")):
    time.sleep(0.02)
if preparing.is_alive():
    cluster.remove_node(nodes[1], allow_graceful=False)
    print("LOST A NODE")
preparing.join()
if not (Path(out) / "dataset.json").is_file():
    print("CALLED AGAIN")
    prepare(source, out, **options)
cluster.shutdown()
"""


@pytest.mark.slow
def test_preparation_survives_a_lost_node(work: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    arguments = [str(work[0]), str(work[1]), str(tmp_path / "latents")]
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=420,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LOST A NODE" in done.stdout
    assert_equal_datasets(tmp_path / "latents", whole)
