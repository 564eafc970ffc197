"""How labels are read, the same for every source and label file: numbers, names, gaps, vectors, and what is refused.

`docs/formats.md` says the same in tables; the last test compares its examples with the code.
"""

import io
import json
import math
import os
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from patchloom.errors import UserError
from patchloom.platform.dataset.labels import column_of_labels, label_of
from patchloom.platform.dataset.sources import Source, open_source
from patchloom.platform.files.folder import Folder

KEYS = [f"{number}.png" for number in range(4)]


def folder_of(place: Path, names: list[str]) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"")
    return place


def classes(source: Source) -> list[str | None]:
    """The class name of each input."""
    return [source.class_names[one.label] if one.label >= 0 else None for one in source.inputs]


def as_csv(place: Path, labels: list[Any]) -> Path:
    pd.DataFrame({"key": KEYS[: len(labels)], "label": labels}).to_csv(place / "labels.csv", index=False)
    return place / "labels.csv"


def as_parquet(place: Path, labels: list[Any]) -> Path:
    pd.DataFrame({"key": KEYS[: len(labels)], "label": labels}).to_parquet(place / "labels.parquet")
    return place / "labels.parquet"


def as_jsonl(place: Path, labels: list[Any]) -> Path:
    rows = [json.dumps({"key": key, "label": label}) + "\n" for key, label in zip(KEYS, labels, strict=False)]
    (place / "labels.jsonl").write_text("".join(rows))
    return place / "labels.jsonl"


def as_edm(place: Path, labels: list[Any]) -> Path:
    (place / "dataset.json").write_text(json.dumps({"labels": [list(row) for row in zip(KEYS, labels, strict=False)]}))
    return place / "dataset.json"


WRITERS = (as_csv, as_parquet, as_jsonl, as_edm)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["01", "12", "02", "01"], ["01", "12", "02", "01"]),  # text that is not written as plain numbers is a name
        (["007", "7", "01", "001"], ["007", "7", "01", "001"]),
        (["1", "10", "2", "0"], ["1", "10", "2", "0"]),
        ([1, 10, 2, 0], ["1", "10", "2", "0"]),
        (["²", "1", "2", "3"], ["²", "1", "2", "3"]),
    ],
    ids=["padded", "four spellings", "plain text", "numbers", "superscript"],
)
def test_text_is_a_number_only_if_the_whole_column_is_written_plainly(
    write: Callable[[Path, list[Any]], Path], labels: list[Any], wanted: list[str], tmp_path: Path
) -> None:
    photos = folder_of(tmp_path / "photos", KEYS)
    source = open_source(str(photos), str(write(tmp_path, labels)))
    assert classes(source) == wanted
    if wanted == ["1", "10", "2", "0"]:
        assert [one.label for one in source.inputs] == [1, 10, 2, 0] and len(source.class_names) == 11


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_jsonl])
def test_a_pandas_column_with_a_gap_has_whole_numbers(write: Callable[[Path, list[Any]], Path], tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", KEYS)
    source = open_source(str(photos), str(write(tmp_path, [0.0, math.nan, 10.0, 2.0])))
    assert [one.label for one in source.inputs] == [0, -1, 10, 2]
    assert source.class_names == [str(number) for number in range(11)]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(3, 3), (3.0, 3), (np.int16(3), 3), (np.float32(3), 3), (b"cat", "cat"), (np.bytes_(b"cat"), "cat"), ("", None),
     (None, None), (math.nan, None), (np.float64("nan"), None), (-1, -1), ([0, 1, 0], 1), (np.eye(3)[2], 2), (True, 1)],
)  # fmt: skip
def test_a_value_is_a_number_a_name_or_no_class(value: Any, wanted: int | str | None) -> None:
    assert label_of(value, "x") == wanted


@pytest.mark.parametrize(
    "value", [1.5, [0.2, 0.8], [1, 1], [0, 0], [], [3], ["cat"], {"a": 1}, pd.Timestamp("2024-01-31"), np.zeros((2, 2))]
)
def test_other_values_are_refused_in_one_line(value: Any) -> None:
    with pytest.raises(UserError, match="photo 7") as refused:
        label_of(value, "photo 7")
    assert "\n" not in str(refused.value)


def test_a_column_of_text_keeps_missing_values() -> None:
    assert column_of_labels(["0", "nan", None, "2"]) == [0, None, None, 2]
    assert column_of_labels(["cat", "nan", None]) == ["cat", "nan", None]  # nan is a name like others here


def test_labels_of_an_npz(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    for labels, wanted in (
        (np.array([b"dog", b"cat", b"dog"]), ["dog", "cat", "dog"]),
        (np.array([0.0, np.nan, 2.0]), ["0", None, "2"]),
        (np.eye(3, dtype=np.uint8)[[2, 0, 1]], ["2", "0", "1"]),
    ):
        np.savez(tmp_path / "a.npz", images=images, labels=labels)
        assert classes(open_source(str(tmp_path / "a.npz"))) == wanted
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))
    with pytest.raises(UserError, match="one-hot"):
        open_source(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(["1", "0", "1"]), class_names=np.array(["1", "0"]))
    assert classes(open_source(str(tmp_path / "a.npz"))) == ["1", "0", "1"]


@pytest.mark.parametrize("label", [100_000, 3_000_001, 20240131])
def test_numbers_that_would_make_too_many_classes_are_refused(label: int, tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", KEYS)
    with pytest.raises(UserError, match=str(label)):
        open_source(str(photos), str(as_jsonl(tmp_path, [0, 1, label])))
    assert len(open_source(str(photos), str(as_jsonl(tmp_path, [3, 900]))).class_names) == 901


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_parquet])
@pytest.mark.parametrize("label", [50_000_000, 99_999_999_999, 2**62])
def test_a_large_label_takes_neither_time_nor_memory(write: Any, label: int, tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", KEYS)
    started = time.monotonic()
    with pytest.raises(UserError, match=str(label)):
        open_source(str(photos), str(write(tmp_path, [0, label])))
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, label]))
    with pytest.raises(UserError, match=str(label)):
        open_source(str(tmp_path / "a.npz"))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "label", [2**70, -(2**70), "x" * 5000, 1e300, [0] * 100_000, "²", "9" * 5000], ids=lambda x: "x"
)
def test_what_is_no_label_is_one_short_line(label: Any, tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", KEYS)
    if label == "²":  # a name
        assert open_source(str(photos), str(as_jsonl(tmp_path, [label]))).class_names == ["²"]
        return
    with pytest.raises(UserError) as refused:
        open_source(str(photos), str(as_jsonl(tmp_path, [label])))
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_a_key_with_two_labels_is_refused(tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", KEYS)
    (tmp_path / "a.csv").write_text("key,label\n0.png,cat\n1.png,dog\n0.png,cat\n")
    assert classes(open_source(str(photos), str(tmp_path / "a.csv"))) == ["cat", "dog", None, None]
    (tmp_path / "a.csv").write_text("key,label\n0.png,cat\n1.png,dog\n0.png,dog\n")
    with pytest.raises(UserError, match=r"0\.png.*'cat' and 'dog'"):
        open_source(str(photos), str(tmp_path / "a.csv"))


def test_other_spellings_of_a_key_match(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "café/é.png")
    photos = folder_of(tmp_path / "photos", [name, "b/1.png"])
    (tmp_path / "a.csv").write_text(f"key,label\n{unicodedata.normalize('NFC', name)},cat\n./b\\1.png,dog\nc.png,dog\n")
    source = open_source(str(photos), str(tmp_path / "a.csv"))
    assert dict(zip([one.key for one in source.inputs], classes(source), strict=True)) == {
        name: "cat",
        "b/1.png": "dog",
    }
    assert source.unmatched_labels == 1


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_text_have_any_delimiter(delimiter: str, tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", KEYS[:2])
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("key,label\n0.png,cat\n1.png,dog\n".replace(",", delimiter))
        assert classes(open_source(str(photos), str(tmp_path / name))) == ["cat", "dog"]


def test_metadata_of_captions_has_no_labels(tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", ["a/1.png", "b/2.png"])
    (photos / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "a cat"}\n')
    assert classes(open_source(str(photos))) == ["a", "b"]
    with pytest.raises(UserError, match="file_name, text"):
        open_source(str(photos), str(photos / "metadata.jsonl"))


def test_storage_folders_of_edm_are_not_classes(tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", ["00000/img00000000.png", "00001/img00001000.png"])
    (photos / "dataset.json").write_text('{"labels": null}')
    assert open_source(str(photos)).class_names == []
    assert classes(open_source(str(photos))) == [None, None]


def write_zip(path: Path, names: list[str], **texts: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
        for name, text in texts.items():
            archive.writestr(name.replace("__", "."), text)
    return path


def test_a_zip_made_on_windows_has_folders(tmp_path: Path) -> None:
    source = open_source(str(write_zip(tmp_path / "a.zip", ["cat\\0.png", "dog\\1.png"])))
    assert [one.key for one in source.inputs] == ["cat/0.png", "dog/1.png"]
    assert classes(source) == ["cat", "dog"]
    labels = json.dumps({"labels": [["00000\\0.png", 1], ["00000\\1.png", 0]]})
    source = open_source(str(write_zip(tmp_path / "b.zip", ["00000/0.png", "00000/1.png"], dataset__json=labels)))
    assert [one.label for one in source.inputs] == [1, 0] and source.unmatched_labels == 0


HIDDEN = ["__MACOSX/cat/._0.png", ".ipynb_checkpoints/0-checkpoint.png", "cat/._0.png", "cat/Thumbs.db", ".a.png"]


def test_hidden_files_are_no_inputs_and_make_no_classes(tmp_path: Path) -> None:
    names = ["cat/0.png", "dog/1.png", *HIDDEN]
    photos = folder_of(tmp_path / "photos", names)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    for address in (photos, write_zip(tmp_path / "a.zip", names), tmp_path / "a.tar"):
        source = open_source(str(address))
        assert [one.key for one in source.inputs] == ["cat/0.png", "dog/1.png"]
        assert source.class_names == ["cat", "dog"]


def test_links_in_a_folder_are_followed_and_loops_end(tmp_path: Path) -> None:
    elsewhere = folder_of(tmp_path / "elsewhere", ["1.png", "more/2.png"])
    photos = folder_of(tmp_path / "photos", ["cat/0.png"])
    (photos / "dog").symlink_to(elsewhere)
    (photos / "cat" / "loop").symlink_to(photos)
    (photos / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(photos))
    assert [one.key for one in source.inputs] == ["cat/0.png", "cat/gone.png", "dog/1.png", "dog/more/2.png"]
    assert source.class_names == ["cat", "dog"]


def test_a_symbolic_link_in_a_tar_is_an_input_that_is_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.png"), io.BytesIO())
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    source = open_source(str(tmp_path / "a.tar"))
    assert [(one.key, one.error is None) for one in source.inputs] == [("0.png", True), ("1.png", False)]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_paths_in_a_table_stay_in_its_folder(path: str, tmp_path: Path) -> None:
    from patchloom.platform.dataset.readers import SourceReader

    (tmp_path / "secret.png").write_bytes(b"secret")
    folder_of(tmp_path / "photos", ["a/0.png"])
    pyarrow.parquet.write_table(pa.table({"image": [path]}), tmp_path / "photos" / "a.parquet")
    source = open_source(str(tmp_path / "photos" / "a.parquet"))
    with pytest.raises(UserError, match="outside"):
        SourceReader(source.kind, source.address).read(source.inputs[0].place)
    with pytest.raises(UserError, match="outside"):
        Folder(str(tmp_path / "photos")).read(path)


def test_lists_of_bytes_in_a_table_are_images(tmp_path: Path) -> None:
    from patchloom.platform.dataset.readers import SourceReader

    cells = pa.array([list(b"\x89PNG"), list(b"abc")], pa.list_(pa.uint8()))
    pyarrow.parquet.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    reader = SourceReader(source.kind, source.address)
    assert [reader.read(one.place) for one in source.inputs] == [b"\x89PNG", b"abc"]


def test_a_name_that_is_not_utf8_is_one_skipped_input(tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", ["0.png"])
    (Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))).write_bytes(b"")
    source = open_source(str(photos))
    assert [(one.key, one.error is None) for one in source.inputs] == [("0.png", True), ("caf\\xe9.png", False)]


def write_shard(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_the_key_of_a_webdataset_member_ends_at_the_first_dot(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "a.tar", **{"0.input.png": b"", "0.cls": b"1", "v1.2/x.JPG": b"", "v1.2/x.CLS": b"0"}
    )
    source = open_source(str(shard))
    assert {one.key: one.label for one in source.inputs} == {"0.input.png": 1, "v1.2/x.JPG": 0}


def test_the_image_of_a_webdataset_key_is_chosen(tmp_path: Path) -> None:
    members = {"0.input.png": b"", "0.mask.png": b"", "0.cls": b"dog", "1.input.png": b"", "1.mask.PNG": b""}
    shard = write_shard(tmp_path / "a.tar", **members, **{"7.cls": b"cat"})
    with pytest.raises(UserError, match="--image-member"):
        open_source(str(shard))
    source = open_source(str(shard), image_member="input.png")
    assert [one.key for one in source.inputs] == ["0.input.png", "1.input.png"]
    assert classes(source) == ["dog", None] and source.unmatched_labels == 1
    assert [one.key for one in open_source(str(shard), image_member="mask.png").inputs] == ["0.mask.png", "1.mask.PNG"]
    members |= {"2.jpg": b""}  # a key without this member is an input that is skipped
    source = open_source(str(write_shard(tmp_path / "b.tar", **members)), image_member="mask.png")
    assert [(one.key, one.error is None) for one in source.inputs] == [
        ("0.mask.png", True), ("1.mask.PNG", True), ("2", False),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"depth\.png"):
        open_source(str(shard), image_member="depth.png")


def test_classes_of_sidecars_are_one_column(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", **{"0.png": b"", "0.cls": b"01", "1.png": b"", "1.cls": b"12"})
    assert classes(open_source(str(shard))) == ["01", "12"]


def test_files_of_other_kinds_are_counted_by_ending(tmp_path: Path) -> None:
    names = ["a.jfif", "a.jpe", "a.avif", "a.heic", "b.HEIC", "notes.txt", "labels.csv", "README"]
    (folder_of(tmp_path / "photos", names) / "labels.csv").write_text("key,label\na.jpe,1\n")
    source = open_source(str(tmp_path / "photos"))
    assert [one.key for one in source.inputs] == ["a.avif", "a.jfif", "a.jpe"]
    assert source.others == {".heic": 2, ".txt": 1, "no ending": 1}
    with pytest.raises(UserError, match=r"\.heic 1"):
        open_source(str(folder_of(tmp_path / "phone", ["a.heic"])))


def test_errors_of_a_single_file_name_the_file(tmp_path: Path) -> None:
    folder_of(tmp_path, ["other.png"])
    pyarrow.parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 3), np.uint8))
    for name in ("empty.parquet", "a.npy"):
        with pytest.raises(UserError, match=rf"{name}"):
            open_source(str(tmp_path / name))


def table_of(title: str) -> list[list[str]]:
    """The rows of the table below a title of `docs/formats.md`."""
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_documented_labels_are_read_as_documented() -> None:
    def read(text: str) -> str:
        try:
            label = label_of(json.loads(text), "x")
        except UserError:
            return "error"
        if label in (None, -1):
            return "no class"
        return f"class number {label}" if isinstance(label, int) else f'class "{label}"'

    rows = table_of("One label")
    assert len(rows) == 11 and [[cell, read(cell.strip("`"))] for cell, _ in rows] == rows


def test_the_documented_columns_are_read_as_documented() -> None:
    def read(text: str) -> str:
        found = column_of_labels(json.loads(text))
        return "numbers" if all(value is None or isinstance(value, int) for value in found) else "names"

    rows = table_of("A column of labels")
    assert len(rows) == 6 and [[cell, read(cell.strip("`"))] for cell, _ in rows] == rows


def test_the_documented_endings_and_columns_are_those_of_the_code() -> None:
    from patchloom.platform.dataset.image_names import IMAGE_EXTENSIONS
    from patchloom.platform.dataset.label_files import LABEL_COLUMNS, NAME_COLUMNS, TABLE_ENDINGS
    from patchloom.platform.dataset.sources import FILE_ENDINGS

    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    for names in (IMAGE_EXTENSIONS, LABEL_COLUMNS, NAME_COLUMNS, TABLE_ENDINGS, *FILE_ENDINGS.values()):
        assert all(f"`{name}`" in page for name in names)
