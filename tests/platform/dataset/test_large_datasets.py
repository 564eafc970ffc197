"""Datasets of many rows and shards: bounded maps, an index, splits of one bit per row, shards verified once."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import dataset_card

from patchloom.errors import UserError
from patchloom.platform.dataset import shards as shards_module
from patchloom.platform.dataset.index import Split, is_held_out, read_hashes, unit_hashes, write_hashes
from patchloom.platform.dataset.prepared import INDEXED_ROWS, open_dataset, write_shard
from patchloom.platform.dataset.shard_table import ShardLister
from patchloom.platform.files.cache import cache_entries
from patchloom.platform.files.storage import file_sha256, write_json


def hash_of(unit: str) -> int:
    """The number that decides whether what has this name is held out."""
    return int(hashlib.sha256(unit.encode()).hexdigest()[:16], 16)


def write_dataset(folder: Path, rows_of_shards: list[int], is_listed: bool = False, has_index: bool = False) -> None:
    """A dataset of 1 x 1 images, the number of the row modulo 251, whose keys are the numbers of the rows."""
    (folder / "shards").mkdir(parents=True)
    lister, entries, first = ShardLister(), [], 0
    for part, count in enumerate(rows_of_shards):
        rows = np.arange(first, first + count)
        images = (rows % 251).astype(np.uint8).reshape(-1, 1, 1, 1)
        path = folder / "shards" / f"part-{part:05d}.arrow"
        entry = write_shard(path, list(map(str, rows)), (rows % 7).tolist(), {"image": images})
        lister.add(part, entry.rows, entry.bytes, entry.sha256)
        entries.append(entry.to_dict())
        first += count
    card = dataset_card(entries, resolution=1, channels=1)
    if is_listed:
        (folder / "shards.npy").write_bytes(lister.content())
        card |= {"format_version": 2, "shards": [], "shard_list": described(folder / "shards.npy", shards=len(lister))}
    if has_index:
        with (folder / "index.npy").open("wb") as file:
            write_hashes(file, [unit_hashes(map(str, range(first)), "key")])
        card |= {"index": described(folder / "index.npy", rows=first)}
    write_json(folder / "dataset.json", card)


def described(path: Path, **count: int) -> dict[str, object]:
    """The entry of the card for a file next to it."""
    return {"file": path.name, **count, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


@pytest.mark.parametrize("split_by", ["key", "region"])
def test_the_hash_is_that_of_the_key_without_what_is_split_together(split_by: str) -> None:
    keys = ["a/ø.png", "a/ø.png#mirror", "photo#1@3#0,9", "photo#1@3#0,9#mirror", ""]
    units = ["a/ø.png", "a/ø.png", *["photo#1@3#0,9" if split_by == "key" else "photo#1@3"] * 2, ""]
    hashes = unit_hashes(keys, split_by)  # type: ignore[arg-type]
    assert hashes.dtype == np.dtype("<u8") and hashes.tolist() == [hash_of(unit) for unit in units]


def test_an_index_is_a_numpy_file_of_all_hashes_and_is_read_in_parts(tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 600_000, dtype=np.uint64)
    with (tmp_path / "index.npy").open("wb") as file:
        assert write_hashes(file, np.split(hashes, [7, 100_000])) == 600_000
    assert np.array_equal(np.load(tmp_path / "index.npy"), hashes)
    parts = list(read_hashes(tmp_path / "index.npy"))
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), hashes)


@pytest.mark.parametrize("fraction", [0.0, 2**-64, 0.05, 0.5, 0.999, 1.0])
def test_a_split_has_the_rows_whose_hash_is_below_the_fraction(fraction: float) -> None:
    hashes = np.random.default_rng(1).integers(0, 2**64, 20_000, dtype=np.uint64)
    hashes[[0, 5, 19_999]] = [0, 2**64 - 1, 1]
    starts = np.array([0, 0, 1, 511, 512, 7000, 7000, 20_000])  # two shards are empty
    wanted = np.array([int(value) < fraction * 2**64 for value in hashes])
    for of_held_out in (True, False):
        rows = np.flatnonzero(wanted == of_held_out)
        parts = (is_held_out(part, fraction) == of_held_out for part in np.split(hashes, [512, 10_240]))
        split = Split(parts, starts)
        assert len(split) == len(rows) and np.array_equal(split.indices(), rows)
        assert np.array_equal(split.rows(range(len(rows))), rows)
        some = np.random.default_rng(2).integers(0, max(len(rows), 1), 50 if len(rows) else 0)
        assert np.array_equal(split.rows(some), rows[some])
        assert split.starts.tolist() == [int((rows < start).sum()) for start in starts]
        assert len(split.spread(10)) == min(10, len(rows)) and set(split.spread(10)) <= set(rows)
        with pytest.raises(IndexError, match=str(len(rows))):
            split.rows([len(rows)])


def test_a_dataset_of_more_shards_than_maps_reads_every_row(tmp_path: Path) -> None:
    write_dataset(tmp_path / "many", [2] * 1100 + [0, 3], is_listed=True)
    dataset = open_dataset(tmp_path / "many")
    assert len(dataset) == 2203 and dataset.card.shards == [] and len(dataset.shards) == 1102
    wanted = np.random.default_rng(0).permutation(2203)
    rows = dataset.rows(wanted)
    assert np.array_equal(rows["image"].reshape(-1), wanted % 251) and np.array_equal(rows["label"], wanted % 7)
    assert rows["key"].tolist() == [str(row) for row in wanted]
    assert list(dataset.rows([2202], ["label"])) == ["label"]
    maps = Path("/proc/self/maps").read_text().count(f"{tmp_path}/many/shards/")
    assert 1000 < maps <= shards_module.MAPPED_SHARDS == 1024
    dataset.reader.forget(range(1102))
    assert f"{tmp_path}/many/shards/" not in Path("/proc/self/maps").read_text()
    held_out = [row for row in range(2203) if hash_of(str(row)) < 0.3 * 2**64]
    assert dataset.indices("held_out", 0.3).tolist() == held_out
    assert dataset.split("train", 0.3).starts[-1] == 2203 - len(held_out)


def test_a_list_of_shards_is_covered_by_the_card(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [2, 3], is_listed=True)
    fingerprint = open_dataset(tmp_path / "data").fingerprint
    listed = np.load(tmp_path / "data" / "shards.npy")
    assert listed["rows"].tolist() == [2, 3] and listed["part"].tolist() == [0, 1]
    assert bytes(listed["sha256"][1]).hex() == file_sha256(tmp_path / "data" / "shards" / "part-00001.arrow")
    write_dataset(tmp_path / "other", [3, 2], is_listed=True)
    assert open_dataset(tmp_path / "other").fingerprint != fingerprint
    (tmp_path / "other" / "shards.npy").replace(tmp_path / "data" / "shards.npy")
    with pytest.raises(UserError, match=r"shards\.npy was changed"):
        open_dataset(tmp_path / "data")
    (tmp_path / "data" / "shards.npy").unlink()
    with pytest.raises(UserError, match=r"shards\.npy is missing"):
        open_dataset(tmp_path / "data")


def test_an_index_next_to_the_card_is_used_and_verified(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [400, 300], has_index=True)
    for shard in (tmp_path / "data" / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))  # the split reads no shard
    held_out = [row for row in range(700) if hash_of(str(row)) < 0.3 * 2**64]
    assert open_dataset(tmp_path / "data").indices("held_out", 0.3).tolist() == held_out
    content = bytearray((tmp_path / "data" / "index.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "data" / "index.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.npy was changed"):
        open_dataset(tmp_path / "data").split("train")


def test_a_large_dataset_without_an_index_gets_one_in_the_cache(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = INDEXED_ROWS + 1000
    write_dataset(tmp_path / "data", [rows // 2, rows - rows // 2])
    hashes = unit_hashes(map(str, range(rows)), "key")
    train = np.flatnonzero(hashes >= np.uint64(2**62))
    before = len(cache_entries("indexes"))
    assert np.array_equal(open_dataset(tmp_path / "data").indices("train", 0.25), train)
    assert f"indexing: {rows:,} rows" in capsys.readouterr().out and len(cache_entries("indexes")) == before + 1
    assert np.array_equal(open_dataset(tmp_path / "data").indices("train", 0.25), train)
    assert "indexing" not in capsys.readouterr().out
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "file" / "cache"))  # cannot be written
    assert np.array_equal(open_dataset(tmp_path / "data").indices("train", 0.25), train)


READ_TEN_ROWS = """
import sys
from patchloom.platform.dataset import open_dataset

dataset, paths = open_dataset(sys.argv[1]), []
sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith(".arrow") and paths.append(args[0]))
print(dataset.rows(range(0, 10))["label"].sum(), len(paths))  # pyarrow's own opening is not an event of Python
"""


def test_a_shard_is_verified_once_per_node_and_again_after_a_change(tmp_path: Path, cache: Path) -> None:
    write_dataset(tmp_path / "data", [5, 5, 5])

    def read() -> list[int]:
        command = [sys.executable, "-c", READ_TEN_ROWS, str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()]

    total = sum(row % 7 for row in range(10))
    assert read() == [total, 2]  # the third shard was not read
    assert read() == [total, 0]
    path = tmp_path / "data" / "shards" / "part-00000.arrow"
    content = path.read_bytes()
    path.write_bytes(content)  # the same bytes at another time
    assert read() == [total, 1]
    path.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    with pytest.raises(UserError, match=r"part-00000\.arrow was changed"):
        open_dataset(tmp_path / "data").rows([0])


def test_a_dataset_is_verified_by_each_process_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", [5, 5])
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "file" / "cache"))
    assert open_dataset(tmp_path / "data").rows([0, 9])["label"].tolist() == [0, 2]
    path = tmp_path / "data" / "shards" / "part-00001.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"part-00001\.arrow was changed"):
        open_dataset(tmp_path / "data").rows([9])


def test_a_card_without_many_rows_or_shards_has_no_new_fields(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [3])
    content = (tmp_path / "data" / "dataset.json").read_text()
    assert open_dataset(tmp_path / "data").card.to_dict() == json.loads(content)
    assert "index" not in content and "shard_list" not in content


def test_reading_from_several_threads_gives_the_rows_of_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [1] * 1300, is_listed=True)
    dataset = open_dataset(tmp_path / "data")

    def read(seed: int) -> bool:
        wanted = np.random.default_rng(seed).integers(0, 1300, 500)
        return np.array_equal(dataset.rows(wanted, ["image"])["image"].reshape(-1), wanted % 251)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
