"""Datasets: native Arrow tensors, rows by index, and a split that is a pure function of the keys."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import dataset_card

from patchloom.errors import UserError
from patchloom.platform.dataset.prepared import Dataset, open_dataset, write_shard
from patchloom.platform.files.storage import file_sha256, write_json

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
KEYS = [f"photo@{index // 2}#{index % 2}" for index in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of four and six rows and their card."""
    (tmp_path / "shards").mkdir()
    shards = []
    for number, rows in enumerate((slice(0, 4), slice(4, 10))):
        path = tmp_path / "shards" / f"part-{number:05d}.arrow"
        shard = write_shard(path, KEYS[rows], list(range(10))[rows], {"image": IMAGES[rows]})
        assert shard == {
            "file": f"shards/{path.name}", "rows": len(KEYS[rows]), "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }  # fmt: skip
        shards.append(shard.to_dict())
    write_json(tmp_path / "dataset.json", dataset_card(shards))
    return tmp_path


def test_rows_are_in_the_requested_order(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert len(dataset) == 10
    wanted = [9, 0, 4, 3, 9]
    rows = dataset.rows(wanted)
    assert np.array_equal(rows["image"], IMAGES[wanted])
    assert rows["label"].tolist() == wanted and rows["label"].dtype == np.int32
    assert list(rows["key"]) == [KEYS[index] for index in wanted]
    assert dataset.rows([])["image"].shape == (0, 3, 4, 4)
    with pytest.raises(IndexError):
        dataset.rows([10])


def test_any_arrow_reader_finds_native_tensors(folder: Path) -> None:
    table = pa.ipc.open_file(pa.memory_map(str(folder / "shards" / "part-00001.arrow"))).read_all()
    assert table.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), (3, 4, 4))
    assert table.schema.field("key").type == pa.string()
    assert np.array_equal(table.column("image").combine_chunks().to_numpy_ndarray(), IMAGES[4:])
    mapped = open_dataset(folder).reader.mapped(1).tensor("image")
    assert not mapped.flags.writeable and not mapped.flags.owndata  # the memory map itself


def test_the_split_is_the_hash_of_the_key(folder: Path) -> None:
    dataset = open_dataset(folder)
    expected = [i for i, key in enumerate(KEYS) if int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) < 0.4 * 2**64]
    assert 0 < len(expected) < 10
    assert dataset.indices("held_out", 0.4).tolist() == expected
    assert sorted([*expected, *dataset.indices("train", 0.4).tolist()]) == list(range(10))
    assert dataset.indices("all").tolist() == list(range(10))
    assert len(dataset.indices("held_out", 0)) == 0 == len(dataset.indices("train", 1))
    with pytest.raises(UserError, match="split"):
        dataset.indices("test")


def test_all_crops_of_a_region_are_in_the_same_split(folder: Path) -> None:
    dataset = Dataset(folder, open_dataset(folder).card.model_copy(update={"split_by": "region"}))
    for split in ("train", "held_out"):
        indices = set(dataset.indices(split, 0.5).tolist())
        assert all((index ^ 1) in indices for index in indices)


def test_a_damaged_shard_is_not_read(folder: Path) -> None:
    path = folder / "shards" / "part-00001.arrow"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(folder)
    assert np.array_equal(dataset.rows([0])["image"][0], IMAGES[0])
    with pytest.raises(UserError, match=r"part-00001\.arrow .*sha256"):
        dataset.rows([5])
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"part-00001\.arrow .*{len(content) - 1} bytes.*{len(content)}"):
        open_dataset(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00001\.arrow"):
        open_dataset(folder)


def test_the_error_of_a_folder_that_is_not_a_dataset_names_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"shards .*dataset\.json"):
        open_dataset(folder / "shards")
    write_json(folder / "dataset.json", {"format_version": 99, "shards": []})
    with pytest.raises(UserError, match="format 99"):
        open_dataset(folder)
    write_json(folder / "dataset.json", {"labels": []})
    with pytest.raises(UserError, match=r"dataset\.json .*format_version"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("file", "named"),
    [("run.json", "run"), ("sampling.json", "patchloom evaluate"), ("model.json", "model"), ("search.json", "search"),
     (".work/plan.json", "unfinished"), ("cat/0.png", "patchloom prepare")],
)  # fmt: skip
def test_a_folder_of_another_kind_is_named(file: str, named: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=named):
        open_dataset(tmp_path)
