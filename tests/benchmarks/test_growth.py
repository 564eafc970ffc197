"""The growth benchmarks: their datasets, their store, and what they calculate; no test checks a timing."""

import json
import os
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from patchloom.benchmarks import growth, small_cache
from patchloom.benchmarks.datasets import NOISE_MEAN, NOISE_STD, write_dataset
from patchloom.benchmarks.findings import TINY, Finding, findings_table
from patchloom.benchmarks.growth_probe import BATCH, measure_opening
from patchloom.benchmarks.interleaved import Spread
from patchloom.benchmarks.plots import plot_results
from patchloom.benchmarks.slow_store import slow_store
from patchloom.benchmarks.startup import Workspace
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.run import ProgressLine


def test_a_dataset_of_noise_has_an_index_and_true_statistics(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", (2, 4, 4), [700, 41])
    dataset = open_dataset(tmp_path / "data")
    dataset.verify()
    assert len(dataset) == 741 and dataset.card.index is not None and dataset.card.index.rows == 741
    held_out = len(dataset.split("held_out", 0.5))
    assert held_out + len(dataset.split("train", 0.5)) == 741 and 300 < held_out < 440
    assert np.uint8(range(256)).mean() == NOISE_MEAN and np.arange(256).std() == pytest.approx(NOISE_STD, abs=0.01)


def test_a_slow_store_counts_and_delays_requests(tmp_path: Path) -> None:
    before = dict(os.environ)
    with slow_store(0.2) as store:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "file").write_bytes(b"content")
        address = growth.upload(tmp_path / "here", f"{store.address}/there")
        start, count = time.monotonic(), store.requests()
        assert Folder.at(address).read("file") == b"content"
        assert store.requests() > count and time.monotonic() - start >= 0.2
        count = store.requests()
        for _ in range(3):
            urllib.request.urlopen(store.endpoint).close()
        assert store.requests() == count + 3
    assert dict(os.environ) == before


def test_an_opening_reads_as_training_does(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", (growth.CHANNELS, growth.SIDE, growth.SIDE), [300, 300])
    recipe = Workspace(tmp_path).write_recipe("recipe", growth.order_recipe("windowed"))
    opening = measure_opening(recipe, str(tmp_path / "dataset"), 2)
    assert opening.held_out == len(open_dataset(tmp_path / "dataset").split("held_out"))
    parts = opening.open_s, opening.splits_s, opening.first_rows_s
    assert min(parts) > 0 and opening.to_first_rows_s == pytest.approx(sum(parts))
    assert 0 < opening.rows_per_second < 2 * BATCH / 1e-6


def test_a_cost_on_a_line_is_extrapolated_exactly() -> None:
    costs = {rows: 3 + 2 * rows / 1e6 for rows in (100_000, 1_000_000, 10_000_000)}
    slope, far = growth.extrapolated("cost", "s", costs)
    assert slope.measured.median == pytest.approx(2)
    assert far.rows == 100_000_000 and far.measured.median == pytest.approx(203)


def test_the_share_of_waiting_is_weighted_by_time() -> None:
    def line(images: int, rate: float, waiting: float) -> ProgressLine:
        return ProgressLine(step=images, images_seen=images, images_per_second=rate, data_wait_share=waiting)

    lines = [line(100, 10, 0.5), line(200, 100, 0.0), line(400, 100, 0.25)]  # 10 s, 1 s and 2 s
    assert small_cache.waiting_share(lines, 0) == pytest.approx(5.5 / 13)
    assert small_cache.waiting_share(lines, 100) == pytest.approx(0.5 / 3)


def test_costs_are_listed_and_plotted_by_rows(tmp_path: Path) -> None:
    listed = [Finding("disk: opening", Spread(1, 1, 2), "s", wanted=10, is_cost=True, rows=rows) for rows in (10, 100)]
    listed += growth.extrapolated("disk: opening", "s", {10: 1.0, 100: 1.0})
    assert [line.split("  ")[1] for line in findings_table(listed[:2]).splitlines()[1:]] == [
        "disk: opening, 10 rows", "disk: opening, 100 rows"
    ]  # fmt: skip
    machine = {"processor": "", "cpus": 1, "memory_gib": 1, "gpus": [], "cuda": None, "cudnn": None, "threads": 1,
               "python": "", "versions": {}, "words": "a machine"}  # fmt: skip
    subject = {"busy_share_before": 0.0, "seconds": 1.0, "findings": [vars(found) | {"measured": vars(found.measured)}
                                                                      for found in listed]}  # fmt: skip
    content = {"date": "2026-01-01", "machine": machine, "scale": {}, "subjects": {"scale.rows": subject}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert [path.name for path in plot_results(tmp_path / "results.json")] == ["results-growth.svg"]


@pytest.mark.slow
def test_growth_by_rows() -> None:
    found = growth.by_rows(TINY, lambda _: None)
    assert len({(one.what, one.rows) for one in found}) == len(found)
    measured = [one for one in found if one.rows in (600, 6000, 60_000)]
    assert len(measured) == 3 * (6 + 9 + 2)
    requests = [one.measured.median for one in measured if one.unit == "requests"]
    assert min(requests[:3]) > 0  # the first openings


@pytest.mark.slow
def test_two_epochs_from_a_small_cache() -> None:
    found = {one.what: one.measured.median for one in small_cache.two_epochs(TINY, lambda _: None)}
    assert 0 < found["largest size of the cache"] <= 100
    assert found["requests per shard and epoch"] >= 1
