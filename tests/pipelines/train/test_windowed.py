"""Training on a remote dataset that is larger than the cache: every row once per epoch, and the same after a kill."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_equal_models, dataset_card, start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.pipelines.train import train
from patchloom.pipelines.train.checkpointer import whole_checkpoints
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.pipelines.train.run import RowReader
from patchloom.pipelines.train.shard_plan import unchecked_plan
from patchloom.platform.dataset.prepared import open_dataset, write_shard
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import Recipe, recipe_yaml
from patchloom.platform.records.run import read_progress

SHARDS, ROWS, CPU = 64, 8, torch.device("cpu")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 512 images in 64 shards; the label of a row is its number."""
    folder, shards = tmp_path_factory.mktemp("data") / "dataset", []
    (folder / "shards").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (SHARDS * ROWS, 3, 16, 16), dtype=np.uint8)
    for number in range(SHARDS):
        rows = range(number * ROWS, (number + 1) * ROWS)
        path = folder / "shards" / f"part-{number:05d}.arrow"
        entry = write_shard(path, [f"{row:04d}" for row in rows], rows, {"image": images[rows.start : rows.stop]})
        shards.append(entry.to_dict())
    card = dataset_card(shards, resolution=16, mean=[127.5] * 3, std=[70.0] * 3)
    Folder(str(folder)).write_json("dataset.json", card)
    return folder


@pytest.fixture(scope="module")
def remote(local: Path, s3: str) -> Folder:
    """The same dataset at a store."""
    folder = Folder.at(f"{s3}/windowed/dataset")
    for name in Folder(str(local)).files():
        folder.put(local / name, name)
    return folder


@pytest.fixture
def quarter(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """An empty cache for a quarter of the dataset, in bytes."""
    limit = sum(Folder(str(local)).files().values()) // 4
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHLOOM_CACHE_GIB", str(limit / 2**30))
    return limit


def windowed(**changes: Any) -> Recipe:
    """A recipe with windows of an eighth of the dataset, without classes."""
    return tiny_recipe(**{
        "data__order": "windowed", "data__window_rows": 32, "model__class_conditional": False,
        "model__label_dropout": 0, "preview__every_images": 0, **changes,
    })  # fmt: skip


@contextmanager
def watched(folder: Path) -> Iterator[Callable[[], int]]:
    """The largest size of a folder during the block."""
    largest, is_done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not is_done.is_set():
            largest = max(largest, sum(max(0, size) for size in Folder(str(folder)).files().values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: largest
    finally:
        is_done.set()
        watcher.join()


def test_two_epochs_visit_every_row_once_within_a_quarter_of_the_cache(
    local: Path, remote: Folder, quarter: int, tmp_path: Path
) -> None:
    here, far = (RowReader(open_dataset(place), windowed(), CPU, 2) for place in (local, str(remote)))
    rows = len(here.train)
    assert 380 < rows < 440
    with watched(tmp_path / "cache" / "datasets") as largest:
        for epoch in range(2):
            labels = []
            for first in range(epoch * rows, (epoch + 1) * rows, 12):
                crops = range(first, min(first + 12, (epoch + 1) * rows))
                found, wanted = far.rows(crops), here.rows(crops)
                assert torch.equal(found.image, wanted.image) and torch.equal(found.label, wanted.label)
                labels += found.label.tolist()
            assert sorted(labels) == here.train.indices().tolist()
    far.plan.close()
    assert 0.7 * quarter < largest() <= quarter


def test_windows_are_read_from_the_middle_and_by_several_workers(local: Path, remote: Folder, quarter: int) -> None:
    here = RowReader(open_dataset(local), windowed(), CPU, 2)
    readers = [RowReader(open_dataset(str(remote)), windowed(), CPU, 2) for _ in range(2)]

    def read(reader: RowReader, starts: range) -> None:
        for first in starts:
            assert torch.equal(reader.rows(range(first, first + 6)).label, here.rows(range(first, first + 6)).label)

    threads = [
        threading.Thread(target=read, args=(reader, range(333 + 6 * k, 600, 12))) for k, reader in enumerate(readers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for reader in readers:
        reader.plan.close()


def test_a_cache_that_is_too_small_is_refused_before_the_run_is_written(
    remote: Folder, quarter: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for recipe, advice in (
        (windowed(data__order="global"), r"all its rows need 0\.000\d+ GiB.*data\.order=windowed, which needs 0\.000"),
        (windowed(data__window_rows=400), r"two windows of 400 rows need 0\.000\d+ GiB.*smaller data\.window_rows"),
    ):
        with pytest.raises(UserError, match=advice) as refused:
            train(recipe, str(remote), str(out), workers=0)
        assert "\n" not in str(refused.value) and not out.exists()
        least = str(refused.value).partition("PATCHLOOM_CACHE_GIB=")[2].split()[0]
        os.environ["PATCHLOOM_CACHE_GIB"] = least  # monkeypatch restores it
        RowReader(open_dataset(str(remote)), recipe, CPU, 2)
        os.environ["PATCHLOOM_CACHE_GIB"] = str(quarter / 2**30)


def test_dry_run_says_what_is_read_and_kept(local: Path, remote: Folder, quarter: int, tmp_path: Path) -> None:
    text = describe_plan(windowed(), str(remote)).text
    assert "at most once per epoch, in 13 windows per epoch; the cache needs 0.000" in text
    assert f"here in {tmp_path / 'cache'}" in text
    in_place = unchecked_plan(open_dataset(local), windowed())
    assert in_place.describe(600) == f"data: read in place from {local}"
    whole = unchecked_plan(open_dataset(str(remote)), windowed(data__order="global"))
    assert "to its cache in the global order" in whole.describe(600)
    few = unchecked_plan(open_dataset(str(remote)), windowed(data__order="global", data__images=3))
    assert re.search(r"copies [123] of 64 shards", few.describe(600)) and few.cache_bytes(600) < quarter


def test_a_few_images_need_a_cache_for_their_shards_only(local: Path, remote: Folder, quarter: int) -> None:
    few = windowed(data__order="global", data__images=8)
    here, far = (RowReader(open_dataset(place), few, CPU, 2) for place in (local, str(remote)))
    wanted = here.train.indices().tolist()
    assert len(wanted) == 8
    for epoch in range(2):
        crops = range(8 * epoch, 8 * epoch + 8)
        assert torch.equal(far.rows(crops).image, here.rows(crops).image)
        assert sorted(far.rows(crops).label.tolist()) == wanted
    far.plan.close()


@pytest.mark.slow
def test_a_windowed_run_on_a_small_cache_killed_and_resumed_is_the_local_run(
    local: Path, remote: Folder, quarter: int, tmp_path: Path
) -> None:
    recipe = windowed(train__images=1200, train__checkpoint_every_images=400, data__held_out_fraction=0.1)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    run = tmp_path / "run"
    with watched(tmp_path / "cache" / "datasets") as largest:
        process = start_cli(
            "train", "recipe.yaml", "--data", str(remote), "--out", str(run), "--workers", "0", cwd=tmp_path
        )
        wait_until(lambda: whole_checkpoints(Folder(str(run))), process)
        process.kill()
        process.communicate()
        train(recipe, str(remote), str(run), workers=0, resume=True)
    train(recipe, str(local), str(tmp_path / "local"), workers=0)
    assert_equal_models(run, tmp_path / "local")
    assert largest() <= quarter and all(0 <= line.data_wait_share < 1 for line in read_progress(run))
