"""Labels: found in the source or in a separate file, by name or number, and errors that name what is wrong."""

import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from patchloom.errors import UserError
from patchloom.platform.dataset.sources import open_source

KEYS = ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]


def parquet(**columns: list[object]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def rows(names: list[str], values: list[object], name: str = "file_name", label: str = "label") -> bytes:
    return "".join(
        json.dumps({name: one, label: value}) + "\n" for one, value in zip(names, values, strict=True)
    ).encode()


# Each file, and the classes and class names that come of it: the same for a folder and for a zip.
TOLD: dict[str, tuple[str, bytes, list[int], list[str]]] = {
    "EDM's list": (
        "dataset.json", json.dumps({"labels": [[key, n % 2] for n, key in enumerate(KEYS)]}).encode(), [0, 1, 0, 1],
        ["0", "1"],
    ),
    "EDM's list with names": (
        "dataset.json",
        json.dumps({"labels": [[key, 2 - n % 2] for n, key in enumerate(KEYS)], "classes": ["x", "y", "z"]}).encode(),
        [2, 1, 2, 1], ["x", "y", "z"],
    ),
    "a dictionary": ("dataset.json", json.dumps({"labels": dict.fromkeys(KEYS, 3)}).encode(), [3] * 4, list("0123")),
    "EDM without labels": ("dataset.json", b'{"labels": null}', [0, 0, 1, 1], ["a", "b"]),  # classes from folders
    "CSV of names": ("labels.csv", b"key,label\na/1.png,dog\na/2.png,cat\nb/3.png,cat\nb/4.png,dog\n", [1, 0, 0, 1],
                     ["cat", "dog"]),
    "CSV of numbers with a BOM": ("metadata.csv", b"\xef\xbb\xbffilename,class\na/1.png,2\nb/4.png,0\n", [2, -1, -1, 0],
                                  ["0", "1", "2"]),
    "JSON lines": ("metadata.jsonl", rows(KEYS, ["u", None, "v", "u"]), [0, -1, 1, 0], ["u", "v"]),
    "Parquet": ("labels.parquet", parquet(key=KEYS, label=[1, 0, 1, 1]), [1, 0, 1, 1], ["0", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_a_labels_file_in_the_source_contains_the_classes(case: str, tmp_path: Path) -> None:
    name, content, labels, class_names = TOLD[case]
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for key, image in [(name, content), *((key, b"") for key in KEYS)]:
            path = tmp_path / "some" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
            archive.writestr(key, image)
    for source in (open_source(str(tmp_path / "some")), open_source(str(tmp_path / "some.zip"))):
        assert [one.key for one in source.inputs] == KEYS
        assert [one.label for one in source.inputs] == labels
        assert source.class_names == class_names


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for key in KEYS:
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / key).write_bytes(b"")
    return tmp_path / "photos"


def test_a_separate_labels_file_takes_precedence_over_one_in_the_source(photos: Path, tmp_path: Path) -> None:
    (photos / "labels.csv").write_bytes(b"key,label\na/1.png,dog\n")
    (tmp_path / "mine.jsonl").write_bytes(rows(["b/3.png", "a/1.png", "nobody.png"], ["q", "p", "p"], "key"))
    source = open_source(str(photos), str(tmp_path / "mine.jsonl"))
    assert [one.label for one in source.inputs] == [0, -1, 1, -1]
    assert (source.class_names, source.unmatched_labels) == (["p", "q"], 1)


WRONG: dict[str, tuple[str, bytes, str]] = {
    "no such column": ("x.csv", b"picture,kind\na/1.png,1\n", "picture, kind"),
    "cut JSON": ("x.json", b'{"labels": [["a/1.png", 0], ', "x.json"),
    "no labels": ("x.json", b"{}", "x.json"),
    "names and numbers": ("x.jsonl", rows(KEYS[:2], ["dog", 1]), "numbers and names"),
    "a negative class": ("x.jsonl", rows(KEYS[:2], [0, -2]), "-2"),
    "beyond the classes": ("x.json", b'{"labels": [["a/1.png", 2]], "classes": ["x", "y"]}', "2 classes"),
    "no table": ("x.txt", b"a/1.png 0", "x.txt"),
    "text as Parquet": ("x.parquet", b"text" * 9, "x.parquet"),
    "bytes as CSV": ("x.csv", b"key,label\n\xff\xfe\x00", "x.csv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_error_of_wrong_labels_is_one_line(case: str, photos: Path, tmp_path: Path) -> None:
    name, content, named = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named) as refused:
        open_source(str(photos), str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_a_missing_labels_file_is_named(photos: Path) -> None:
    with pytest.raises(UserError, match=r"--labels nowhere\.csv"):
        open_source(str(photos), "nowhere.csv")
