"""Large sets: features in files give the numbers of features in memory, and memory does not grow with the images."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_python
from large_samples import write_dataset, write_samples

from patchloom.models.metrics import Moments, inception_score, kernel_distance
from patchloom.models.neighbours import neighbourhood
from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.evaluate.features import StoredFeatures
from patchloom.pipelines.evaluate.image_sets import open_images
from patchloom.pipelines.inspect import inspect
from patchloom.pipelines.sample.sampling import sample

FEW, MANY = 20_000, 1_000_000
GROWTH_KIB = 100 << 10
# in KiB, of this process alone: ru_maxrss of a child begins with the memory of its parent
MEASURE = "{}\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
SAMPLE = """
from patchloom.pipelines.sample.sampling import sample
assert sample({model!r}, {samples!r}, "0-{last}", format="zip", steps=1, workers=0).made == 0
"""
EVALUATE = """
from patchloom.pipelines.evaluate.evaluation import evaluate
evaluate({samples!r}, {dataset!r}, features="colours", metrics=("fd", "kid"), workers=0)
"""
INSPECT = """
from patchloom.pipelines.inspect import inspect
inspect({dataset!r})
"""


def cloud(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def stored(rows: torch.Tensor) -> StoredFeatures:
    return StoredFeatures(part.numpy() for part in rows.split(13))


def test_features_of_more_bytes_than_one_read_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchloom.pipelines.evaluate.features.MOST_READ_BYTES", 100)  # a row has 24
    rows = cloud(50)
    in_file = stored(rows)
    assert torch.equal(in_file[3:47], rows[3:47]) and torch.equal(in_file[torch.tensor([9, 0])], rows[[9, 0]])


def test_features_in_a_file_give_the_numbers_of_features_in_memory() -> None:
    a, b = cloud(500), cloud(300, seed=1) * 0.8
    in_file = stored(a)
    assert len(in_file) == 500 and torch.equal(in_file[490:600], a[490:])
    chosen = torch.tensor([3, 499, 3])
    assert torch.equal(in_file[chosen], a[chosen]) and torch.equal(in_file[chosen.numpy()], a[chosen])
    assert in_file[7:7].shape == (0, 6)
    assert kernel_distance(in_file, stored(b), subsets=5) == kernel_distance(a, b, subsets=5)
    found, wanted = neighbourhood(in_file, stored(b), block=64), neighbourhood(a, b, block=64)
    assert (found.precision, found.recall) == (wanted.precision, wanted.recall)
    assert torch.equal(found.nearest_distance, wanted.nearest_distance) and torch.equal(found.nearest, wanted.nearest)
    assert torch.equal(found.authentic, wanted.authentic) and torch.equal(found.density, wanted.density)


def test_blocks_of_rows_give_the_numbers_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, real, samples = cloud(700, 9), cloud(400), cloud(300, seed=1)
    whole = inception_score(logits), neighbourhood(real, samples)
    for module in ("metrics", "neighbours"):
        monkeypatch.setattr(f"patchloom.models.{module}.BLOCK_ROWS", 16)
    assert inception_score(logits) == pytest.approx(whole[0], rel=1e-12)
    found = neighbourhood(real, samples)
    assert (found.precision, found.recall) == (whole[1].precision, whole[1].recall)
    bad = real.clone()
    bad[[50, 399]] = torch.nan
    with pytest.raises(ValueError, match=r"2 rows .* the first is row 50"):
        kernel_distance(bad, samples)


def test_moments_of_the_other_rows_of_a_large_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchloom.pipelines.evaluate.metrics import _moments_at

    rows, chosen = cloud(1000), np.random.default_rng(0).permutation(1000)[:600]
    whole = Moments.of(rows[chosen])
    monkeypatch.setattr("patchloom.pipelines.evaluate.metrics.BLOCK_ROWS", 64)
    monkeypatch.setattr("patchloom.models.metrics.BLOCK_ROWS", 64)
    found = _moments_at(stored(rows), chosen)
    assert found.count == 600 and torch.allclose(found.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(found.scatter, whole.scatter, rtol=1e-11)


def test_ranges_of_rows_are_those_of_the_shards_and_the_manifest(trained: Path, pixels: Path, tmp_path: Path) -> None:
    dataset = write_dataset(pixels, tmp_path / "data", 8192 + 300)
    images, card = open_images(str(dataset)), json.loads((dataset / "dataset.json").read_text())
    ranges = list(images.ranges)
    assert [(one.start, one.stop) for one in ranges[-3:]] == [(8192, 8320), (8320, 8448), (8448, 8492)]
    assert len(ranges) == len(images.ranges) == 64 + 3 and images.ranges[-1] == ranges[-1]
    for number, shard, rows in ((0, 0, "0-128"), (63, 0, "8064-8192"), (66, 1, "256-300")):
        named = f"{card['shards'][shard]['sha256']}\n{rows}"
        assert ranges[number].sha256 == hashlib.sha256(named.encode()).hexdigest()
    folder = write_samples(trained, tmp_path / "samples", 1300)
    samples, lines = open_images(str(folder)), (folder / "manifest.jsonl").read_text().splitlines()
    digests = [json.loads(line)["sha256"] for line in lines]
    wanted = [hashlib.sha256("\n".join(digests[at : at + 128]).encode()).hexdigest() for at in range(0, 1300, 128)]
    assert [one.sha256 for one in samples.ranges] == wanted and len(samples) == 1300
    assert samples.fingerprint == hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    assert samples.name_of(1234) == "seed 1234"
    assert np.array_equal(samples.read(995, 1005), open_images(str(dataset)).read(995, 1005))  # the same 64 in turn


def test_many_images_are_not_compared_with_each_other_by_default(
    trained: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from patchloom.pipelines.evaluate.metrics import METRICS

    for name in ("precision", "recall"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], most_images=100))
    arguments = (
        str(write_samples(trained, tmp_path / "samples", 64)),
        str(write_dataset(pixels, tmp_path / "data", 128)),
    )
    found = evaluate(*arguments, features="colours").metrics
    assert "kid" in found and "precision" not in found
    assert "precision and recall of 128 images" in capsys.readouterr().out
    assert "recall" in evaluate(*arguments, features="colours", metrics=("recall",)).metrics


def test_large_folder_is_complete_and_can_be_inspected(trained: Path, pixels: Path, tmp_path: Path) -> None:
    """What the test of memory relies on."""
    folder = write_samples(trained, tmp_path / "samples", 1300)
    before = (folder / "manifest.jsonl").read_bytes()
    assert sample(str(trained), str(folder), "0-1299", format="zip", steps=1, workers=0).made == 0
    assert (folder / "manifest.jsonl").read_bytes() == before
    assert inspect(str(write_dataset(pixels, tmp_path / "data", 9000))).card["rows"] == 9000


@pytest.mark.slow
@pytest.mark.parametrize("code", [SAMPLE, INSPECT, EVALUATE], ids=["sample", "inspect", "evaluate"])
def test_memory_does_not_grow_with_the_images(code: str, trained: Path, pixels: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (FEW, MANY):
        samples = tmp_path / f"samples-{count}"
        dataset = tmp_path / f"data-{count}"
        if "samples!r" in code:
            write_samples(trained, samples, count)
        if "dataset!r" in code:
            write_dataset(pixels, dataset, count)
        names = {"model": str(trained), "samples": str(samples), "dataset": str(dataset), "last": count - 1}
        done = run_python(MEASURE.format(code.format(**names)))
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    print(f"peak of {FEW:,} and {MANY:,} images: {peaks[0] >> 10} and {peaks[1] >> 10} MiB")
    assert peaks[1] - peaks[0] < GROWTH_KIB
