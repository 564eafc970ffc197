"""Downloaded datasets on Ray: workers read the same rows as one process does, each by its place."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from downloaded_datasets import CIFAR_LABELS, CIFAR_PIXELS, cifar_python, imagenet, lsun, mnist

from patchloom.errors import UserError
from patchloom.pipelines.prepare import prepare, preparing
from patchloom.pipelines.prepare.images import Transform
from patchloom.pipelines.prepare.planning import plan_images
from patchloom.pipelines.prepare.preparing import PrepareJob
from patchloom.platform.compute.jobs import run_job
from patchloom.platform.compute.resources import DEFAULT_RESOURCES
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.folder import Folder

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("write", [cifar_python, imagenet, lsun, mnist])
def test_bytes_do_not_depend_on_the_workers(write: Callable[[Path], Path], tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "source").mkdir()
    source = str(write(tmp_path / "source"))
    one, two = (
        prepare(source, str(tmp_path / f"{workers}"), resolution=4, workers=workers, shard_rows=2) for workers in (0, 2)
    )
    assert one.card == two.card and one.card.rows == one.card.inputs > 0


def test_killed_preparation_of_batches_continues(tmp_path: Path) -> None:
    source, folder = str(cifar_python(tmp_path)), tmp_path / "prepared"
    whole = prepare(source, str(tmp_path / "whole"), resolution=32, crop="none", split="all", workers=0, shard_rows=3)

    class StopError(Exception):
        pass

    kept = list[int]()

    def keep(self: preparing.PrepareJob, unit: preparing.PlannedShard, result: str) -> None:
        kept.append(unit.number)
        if len(kept) == 2:
            raise StopError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(preparing.PrepareJob, "keep", keep)
        prepare(source, str(folder), resolution=32, crop="none", split="all", workers=0, shard_rows=3)
    for split in (None, "test"):
        with pytest.raises(UserError, match="unfinished preparation"):
            prepare(source, str(folder), resolution=32, crop="none", split=split, workers=0, shard_rows=3)
    again = prepare(source, str(folder), resolution=32, crop="none", split="all", workers=0, shard_rows=3)
    assert again.card == whole.card
    rows = again.rows(range(len(again)))
    assert (rows["image"] == CIFAR_PIXELS).all() and rows["label"].tolist() == CIFAR_LABELS


@pytest.mark.parametrize("write", [cifar_python, lsun])
def test_inputs_are_not_skipped_where_their_file_cannot_be_opened(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    source, folder = str(write(tmp_path)), Folder(str(tmp_path / "prepared"))
    planned = plan_images(source, None, None, Transform(4), None, "fp32").with_shards(3)
    with (
        pytest.raises(UserError, match=r"PATCHLOOM_CACHE_GIB|patchloom\[lmdb\]"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PATCHLOOM_CACHE", str(tmp_path / "full"))
        patch.setenv("PATCHLOOM_CACHE_GIB", "1e-9")
        patch.setitem(sys.modules, "lmdb", None)
        run_job(PrepareJob(folder, planned), 0, DEFAULT_RESOURCES)
    run_job(PrepareJob(folder, planned), 0, DEFAULT_RESOURCES)
    card = open_dataset(folder.address).card
    assert card.rows == card.inputs == len(planned.inputs) and card.skipped.count == 0
