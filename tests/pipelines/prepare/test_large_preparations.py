"""Preparations of many rows and shards: the index and the list of shards, which the card covers."""

import base64
import hashlib
from pathlib import Path

import numpy as np
import pytest

from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.notes import ShardNotes, dataset_card, gather, note_name
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.records.dataset import DatasetCard
from patchloom.platform.records.prepare import PreparationPlan, ShardNote


def hash_of(key: str) -> int:
    """The number that decides whether a key is held out."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def note_of(number: int, keys: list[str], has_hashes: bool = True) -> ShardNote:
    """The note of a shard of grey images of one pixel."""
    hashes = b"".join(hash_of(key).to_bytes(8, "little") for key in keys)
    return ShardNote(
        inputs=len(keys), rows=len(keys), skipped=[], source_sha256="", file=f"shards/part-{number:05d}.arrow",
        bytes=100 + number, sha256=hashlib.sha256(str(number).encode()).hexdigest(), shape=[1, 1, 1],
        classes={-1: len(keys)}, sums={"count": [len(keys)], "sum": [0], "squares": [0]},
        hashes=base64.b64encode(hashes).decode() if has_hashes else None,
    )  # fmt: skip


def card_of(folder: Path, notes: list[ShardNote]) -> DatasetCard:
    """The card that the notes of a preparation give; the other files are written into the folder."""
    for number, note in enumerate(notes):
        Folder(str(folder)).write(note_name(number), note.to_json(), sync=False)
    plan = PreparationPlan(source="", source_kind="npz", transform=None, class_names=[], inputs_sha256="")
    return dataset_card(plan, gather(ShardNotes(Folder(str(folder)), len(notes))))


def test_a_card_of_many_rows_has_an_index_and_one_of_many_shards_a_list(tmp_path: Path) -> None:
    empty = ShardNote(inputs=1, rows=0, skipped=[{"key": "bad", "error": "no image"}], source_sha256="")
    keys = [[f"{number}/{row}" for row in range(60)] for number in range(1100)]
    notes = [note_of(number, names) if number != 7 else empty for number, names in enumerate(keys)]
    card = card_of(tmp_path, notes)
    assert card.format_version == 2 and card.shards == [] and card.rows == 60 * 1099
    assert card.shard_list is not None and card.index is not None
    for listed, name in ((card.shard_list, "shards.npy"), (card.index, "index.npy")):
        path = tmp_path / name
        assert (listed.file, listed.bytes, listed.sha256) == (name, path.stat().st_size, file_sha256(path))
    assert (card.shard_list.shards, card.index.rows) == (1099, 60 * 1099)
    table = Dataset(tmp_path, card).shards
    assert table.name_of(7) == "shards/part-00008.arrow" and table.sizes[7] == 108
    assert table.sha256_of(7) == hashlib.sha256(b"8").hexdigest()
    written = [key for number, names in enumerate(keys) if number != 7 for key in names]
    assert np.load(tmp_path / "index.npy").tolist() == [hash_of(key) for key in written]


def test_a_small_dataset_has_its_shards_in_the_card_as_in_older_versions(tmp_path: Path) -> None:
    card = card_of(tmp_path, [note_of(number, [f"{number}/0"]) for number in range(1024)])
    assert card.format_version == 1 and len(card.shards) == 1024
    assert not {"index", "shard_list"} & card.to_dict().keys()
    assert card.shards[3] == {
        "file": "shards/part-00003.arrow", "rows": 1, "bytes": 103, "sha256": hashlib.sha256(b"3").hexdigest(),
    }  # fmt: skip
    assert not (tmp_path / "index.npy").exists() and not (tmp_path / "shards.npy").exists()


def test_notes_of_an_older_version_give_a_card_without_an_index(tmp_path: Path) -> None:
    keys = [[f"{number}/{row}" for row in range(22_000)] for number in range(3)]
    card = card_of(tmp_path, [note_of(number, names, has_hashes=number > 0) for number, names in enumerate(keys)])
    assert card.rows == 66_000 and card.index is None and not (tmp_path / "index.npy").exists()


@pytest.mark.slow
def test_a_large_preparation_splits_as_its_keys_say(tmp_path: Path) -> None:
    images = np.arange(66_000 * 4, dtype=np.uint32).astype(np.uint8).reshape(-1, 2, 2, 1)
    np.savez(tmp_path / "images.npz", images)
    dataset = prepare(
        str(tmp_path / "images.npz"), str(tmp_path / "data"), crop="none", channels=1, shard_rows=60, workers=0
    )
    assert dataset.card.index is not None and dataset.card.shard_list is not None
    keys = dataset.rows(range(66_000), ["key"])["key"]
    held_out = [row for row, key in enumerate(keys) if hash_of(key) < 0.05 * 2**64]
    assert dataset.indices("held_out").tolist() == held_out
    wanted = np.random.default_rng(0).integers(0, 66_000, 1000)
    assert np.array_equal(dataset.rows(wanted)["image"], images[wanted].transpose(0, 3, 1, 2))
    dataset.verify()
