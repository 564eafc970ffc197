"""A node is lost in the middle of each command. The command ends as it would have ended with all nodes."""

from pathlib import Path

import numpy as np
import pytest
from machines import RayCluster, wait_for

from patchloom.pipelines.prepare import prepare
from patchloom.platform.files.folder import Folder

IMAGES = 40_000


@pytest.fixture(scope="session")
def archive(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, also in the store."""
    folder = tmp_path_factory.mktemp("archive")
    pictures = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pictures, labels=np.arange(IMAGES) % 3)
    Folder.at(f"{store}/source").put(folder / "images.npz", "images.npz")
    return folder / "images.npz"


@pytest.fixture(scope="session")
def whole(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as one machine makes it."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    prepare(str(archive), str(folder), resolution=16, workers=0)
    return folder


def notes(folder: Folder) -> int:
    return sum(name.startswith(".work/notes/") for name in folder.files())


@pytest.mark.parametrize("fate", ["killed", "cut off"])
def test_prepare_makes_the_shards_of_a_lost_node_again(
    cluster: RayCluster, archive: Path, whole: Path, store: str, fate: str
) -> None:
    there = Folder.at(f"{store}/lost-{fate[:3]}")
    process = cluster.start("prepare", f"{store}/source/images.npz", str(there), "--resolution", "16", "--workers", "2")
    wait_for(lambda: notes(there) > 1 or process.poll() is not None, "a finished shard")
    assert process.poll() is None, process.communicate()[0]
    if fate == "killed":
        cluster.kill("two")
    else:
        cluster.workers["two"].cut_off()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for name in Folder(str(whole)).files():
        assert there.read(name) == (whole / name).read_bytes(), name
    if fate == "cut off":
        cluster.workers["two"].reconnect()
        cluster.kill("two")
