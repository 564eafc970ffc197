"""Shards hold latents as well as pixels, depend on their rows alone, and split by keys far more numerous than ten."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import dataset_card
from scipy import stats

from patchloom.errors import UserError
from patchloom.platform.dataset.prepared import Dataset, is_dataset, open_dataset, write_shard
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import write_json

KEYS = [f"folder/ø{index:04d}.png" for index in range(900)]
MEANS = np.random.default_rng(0).normal(size=(900, 2, 4, 4)).astype(np.float16)
STDS = np.abs(MEANS) / 8


@pytest.fixture
def latents(tmp_path: Path) -> Callable[..., Dataset]:
    """Writes 900 latents in shards of 400, 400 and 100, and their card."""

    def write(keys: list[str] = KEYS, split_by: str = "key") -> Dataset:
        shards = []
        for start in (0, 400, 800):
            rows = slice(start, min(start + 400, 900))
            path = tmp_path / f"part-{start}.arrow"
            write_shard(path, keys[rows], [-1] * len(keys[rows]), {"mean": MEANS[rows], "std": STDS[rows]})
            content = path.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            shards.append({"file": path.name, "rows": len(keys[rows]), "bytes": len(content), "sha256": sha256})
        card = dataset_card(shards, kind="latents", channels=2, dtype="float16", split_by=split_by)
        write_json(tmp_path / "dataset.json", card)
        return open_dataset(tmp_path)

    return write


def test_moments_keep_their_half_precision_and_rows_their_order(latents: Callable[..., Dataset]) -> None:
    dataset = latents()
    wanted = np.random.default_rng(1).permutation(900)
    rows = dataset.rows(wanted)
    assert sorted(rows) == ["key", "label", "mean", "std"]
    assert rows["mean"].dtype == rows["std"].dtype == np.float16
    np.testing.assert_array_equal(rows["mean"], MEANS[wanted])
    np.testing.assert_array_equal(rows["std"], STDS[wanted])
    assert rows["key"].tolist() == [KEYS[index] for index in wanted]
    assert set(rows["label"]) == {-1}


def test_tensors_are_read_in_place_and_cannot_be_written(latents: Callable[..., Dataset]) -> None:
    dataset = latents()
    before = pa.total_allocated_bytes()
    values = dataset.reader.mapped(0).tensor("mean")
    assert pa.total_allocated_bytes() - before < values.nbytes
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0, 0, 0] = 1


def test_reading_changes_nothing_on_disk(latents: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = latents()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rows = dataset.rows([0, 850])
    rows["mean"][:] = 0  # what was gathered is the caller's own
    dataset.indices("train")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    np.testing.assert_array_equal(dataset.rows([850])["mean"][0], MEANS[850])


def test_the_bytes_of_a_shard_depend_only_on_its_rows(tmp_path: Path) -> None:
    for name, change in (("a", 0), ("b", 0), ("c", 1)):
        write_shard(tmp_path / name, KEYS[:5], [change, 0, 0, 0, 0], {"mean": MEANS[:5]})
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("indices", [[-1], [900], [0, 899, 900]])
def test_positions_outside_the_dataset_are_refused(latents: Callable[..., Dataset], indices: list[int]) -> None:
    with pytest.raises(IndexError, match="899"):
        latents().rows(indices)


def test_the_held_out_rows_have_the_given_fraction_and_include_those_of_a_smaller_one(
    latents: Callable[..., Dataset],
) -> None:
    dataset = latents()
    hashes = [int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256 for key in KEYS]
    before: set[int] = set()
    for fraction in (0.05, 0.2, 0.5):
        held_out = dataset.indices("held_out", fraction).tolist()
        assert held_out == [index for index, value in enumerate(hashes) if value < fraction]
        assert before < set(held_out)
        assert stats.binomtest(len(held_out), 900, fraction).pvalue > 1e-3
        before = set(held_out)


def test_a_region_stays_together_and_is_split_by_its_own_name(latents: Callable[..., Dataset]) -> None:
    keys = [f"photo#{index // 36}.png@{index // 9}#{index % 9},0" for index in range(900)]
    dataset = latents(keys, split_by="region")
    wanted = [
        index
        for index in range(900)
        if int(hashlib.sha256(f"photo#{index // 36}.png@{index // 9}".encode()).hexdigest(), 16) < 0.3 * 2**256
    ]
    assert dataset.indices("held_out", 0.3).tolist() == wanted
    assert 0 < len(wanted) < 900
    assert len({index // 9 for index in wanted}) * 9 == len(wanted)
    assert len(dataset) == 900


def test_verifying_reads_every_shard(latents: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = latents()
    dataset.verify()
    content = bytearray((tmp_path / "part-800.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "part-800.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"part-800\.arrow .*sha256"):
        dataset.verify()


def test_a_folder_with_the_dataset_json_of_edm_is_not_a_prepared_dataset(
    latents: Callable[..., Dataset], tmp_path: Path
) -> None:
    latents()
    assert is_dataset(Folder.at(tmp_path))
    write_json(tmp_path / "dataset.json", {"labels": [["00000/img.png", 0]]})
    assert not is_dataset(Folder.at(tmp_path))
    assert not is_dataset(Folder.at(tmp_path / "nowhere"))
