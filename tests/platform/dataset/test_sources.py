"""Sources: whatever people keep images in, here or far away, gives the same inputs, and what is broken says so."""

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from sources_on_disk import (
    CLASSES,
    ENCODED,
    LABELS,
    MEMBERS,
    NAMES,
    NUMBERS,
    PIXELS,
    arrow_stream,
    write_files,
    write_tar,
    write_zip,
)

from patchloom.pipelines.prepare.images import decode
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import Source, open_source
from patchloom.platform.files.folder import Folder


def inputs_of(address: str | Path) -> tuple[list[str], list[int], list[str]]:
    source = open_source(str(address))
    return [one.key for one in source.inputs], [one.label for one in source.inputs], source.class_names


def contents_of(source: Source) -> list[np.ndarray]:
    reader = SourceReader(source.kind, source.address)
    return [np.asarray(decode(reader.read(one.place))) for one in source.inputs]


# Each of these writes the six images into a folder and returns what to open in it ("" for the folder itself) and
# the keys, classes and rows that must come out, the rows in numbers of PIXELS.
Written = tuple[str, list[str], list[int]]
BY_NAME = sorted(range(6), key=NAMES.__getitem__)
STRUCTS = [{"bytes": content, "path": None} for content in ENCODED]
FEATURES = {"photo": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}


def a_folder(here: Path) -> Written:
    write_files(here, dict(zip(NAMES, ENCODED, strict=True)) | {".DS_Store": b"", "notes.csv": b"a", "cat/x.txt": b"b"})
    return "", sorted(NAMES), BY_NAME


def a_zip(here: Path) -> Written:
    write_zip(here / "images.zip", MEMBERS)
    return "images.zip", NAMES, list(range(6))


def a_tar(here: Path) -> Written:
    write_tar(here / "images.tar", MEMBERS[1:])
    return "images.tar", NAMES, list(range(6))


def a_compressed_tar(here: Path) -> Written:
    write_tar(here / "images.tar.gz", [(f"./{name}", content) for name, content in MEMBERS[1:]], "w:gz")
    return "images.tar.gz", NAMES, list(range(6))


def webdataset_shards(here: Path) -> Written:
    for shard in range(2):
        members = []
        for row in range(3 * shard, 3 * shard + 3):
            members += [(f"{row:04d}.cls", str(LABELS[row]).encode()), (f"{row:04d}.png", ENCODED[row])]
            members += [(f"{row:04d}.json", b'{"caption": "no label"}')]
        write_tar(here / f"{shard}.tar", members)
    return "", [f"{row // 3}.tar/{row:04d}.png" for row in range(6)], list(range(6))


def parquet_of_bytes(here: Path) -> Written:
    words = [CLASSES[label] for label in LABELS]
    table = pa.table({"label": words, "key": NAMES, "image": ENCODED})
    pyarrow.parquet.write_table(table, here / "rows.parquet", row_group_size=4)
    return "rows.parquet", NAMES, list(range(6))


def parquet_of_paths(here: Path) -> Written:
    write_files(here, dict(zip(NAMES, ENCODED, strict=True)))
    table = pa.table({"path": NAMES, "label": [CLASSES[label] for label in LABELS]})
    pyarrow.parquet.write_table(table, here / "rows.parquet")
    return "rows.parquet", NUMBERS, list(range(6))


def parquet_of_hugging_face(here: Path) -> Written:
    """A table with features in its metadata, and structs with bytes or with a path."""
    structs = [{"bytes": None, "path": "cat/0.png"}, *STRUCTS[1:]]
    write_files(here, {"cat/0.png": ENCODED[0]})
    table = pa.table({"image": ["a caption"] * 6, "photo": structs, "label": LABELS})
    told = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Value"}, **FEATURES}}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(told), here / "rows.parquet")
    return "rows.parquet", NUMBERS, list(range(6))


def an_arrow_file(here: Path) -> Written:
    table = pa.table({"image": ENCODED, "label": [CLASSES[label] for label in LABELS]})
    with pa.ipc.new_file(str(here / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return "rows.arrow", NUMBERS, list(range(6))


def a_saved_hugging_face_dataset(here: Path) -> Written:
    """A dataset as `datasets` 4 saves it, in two files, in the order of state.json."""
    files = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for half, name in enumerate(files):
        rows = slice(3 * half, 3 * half + 3)
        (here / name).write_bytes(arrow_stream(pa.table({"photo": STRUCTS[rows], "label": LABELS[rows]})))
    (here / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    (here / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return "", NUMBERS, list(range(6))


def an_npz(here: Path) -> Written:
    np.savez_compressed(here / "images.npz", images=PIXELS, labels=np.array(LABELS), class_names=np.array(CLASSES))
    return "images.npz", NUMBERS, list(range(6))


def upload(here: Path, address: str) -> None:
    """Upload every file of a folder to memory:// or s3://, with other clients than ours."""
    store, bucket, prefix = boto3.client("s3"), *address.split("://")[1].split("/", 1)
    for path in here.rglob("*"):
        name = f"{prefix}/{path.relative_to(here).as_posix()}"
        if path.is_file() and address.startswith("s3://"):
            store.put_object(Bucket=bucket, Key=name, Body=path.read_bytes())
        elif path.is_file():
            fsspec.filesystem("memory").pipe_file(f"/{bucket}/{name}", path.read_bytes())


@pytest.mark.parametrize(
    "write",
    [a_folder, a_zip, a_tar, a_compressed_tar, webdataset_shards, parquet_of_bytes, parquet_of_paths,
     parquet_of_hugging_face, an_arrow_file, a_saved_hugging_face_dataset, an_npz],
)  # fmt: skip
def test_a_source_gives_the_same_inputs_on_every_file_system(
    write: Callable[[Path], Written], tmp_path: Path, s3: str
) -> None:
    name, keys, rows = write(tmp_path)
    for store in (str(tmp_path), f"memory://sources/{write.__name__}", f"{s3}/sources/{write.__name__}"):
        if store != str(tmp_path):
            upload(tmp_path, store)
        source = open_source(f"{store}/{name}".rstrip("/"))
        assert [one.key for one in source.inputs] == keys, store
        assert [one.label for one in source.inputs] == [LABELS[row] for row in rows], store
        assert source.class_names == (["0", "1"] if write is webdataset_shards else CLASSES), store
        assert source.unmatched_labels == 0, store
        for row, pixels in zip(rows, contents_of(source), strict=True):
            assert np.array_equal(pixels, PIXELS[row]), store


def test_a_compressed_file_is_uploaded_unchanged(tmp_path: Path) -> None:
    content = gzip.compress(b"text" * 100)
    (tmp_path / "a.tar.gz").write_bytes(content)
    far = Folder("memory://brought/here")
    far.put(tmp_path / "a.tar.gz", "put.tar.gz")
    far.write("written.tar.gz", content)
    assert far.read("put.tar.gz") == far.read("written.tar.gz") == content


def test_every_file_with_an_image_extension_is_an_input_whatever_its_content(tmp_path: Path) -> None:
    names = ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "a.tif", "a.tiff", "a.gif", "a.PNG", "a.Jpeg"]
    others = ["a.txt", "a.png.txt", "png", "dataset.jsonl", ".DS_Store", "a.svg", "b/Thumbs.db"]
    write_files(tmp_path, dict.fromkeys(names + others, b""))
    assert inputs_of(tmp_path) == (sorted(names), [-1] * 10, [])


def test_the_class_is_the_first_sub_folder_and_files_outside_have_none(tmp_path: Path) -> None:
    write_files(tmp_path, {"b/x/y/1.png": b"", "a/c/2.png": b"", "3.png": b"", "b/4.png": b""})
    assert inputs_of(tmp_path) == (["3.png", "a/c/2.png", "b/4.png", "b/x/y/1.png"], [-1, 0, 1, 1], ["a", "b"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_keys_are_found_and_both_inputs_can_be_read(tmp_path: Path) -> None:
    write_zip(tmp_path / "two.zip", [("a.png", ENCODED[0]), ("b.png", ENCODED[1]), ("a.png", ENCODED[2])])
    write_tar(tmp_path / "two.tar", [("a.png", ENCODED[0]), ("b.png", ENCODED[1]), ("./a.png", ENCODED[2])])
    for name in ("two.zip", "two.tar"):
        source = open_source(str(tmp_path / name))
        assert [one.key for one in source.inputs] == ["a.png", "b.png", "a.png"]
        assert source.repeated.tolist() == [2]
        assert np.array_equal(contents_of(source), PIXELS[:3])


def test_a_hard_link_in_a_tar_is_its_target_image(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images.tar", [("a.png", ENCODED[0])])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")  # as GNU tar stores the second name of one file
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    source = open_source(str(path))
    assert [one.key for one in source.inputs] == ["a.png", "b.png"]
    assert np.array_equal(contents_of(source), PIXELS[[0, 0]])


@pytest.mark.parametrize(
    ("ending", "content", "label", "classes"),
    [
        ("cls", b"1\n", 1, ["0", "1"]),
        ("cls", b"-1", -1, []),
        ("cls", b"tabby cat", 0, ["tabby cat"]),
        ("cls", b"", -1, []),
        ("json", b'{"width": 4, "label": 2}', 2, ["0", "1", "2"]),
        ("json", b"[not json", -1, []),
    ],
)
def test_a_webdataset_sidecar_contains_the_class(
    ending: str, content: bytes, label: int, classes: list[str], tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.jpg", ENCODED[0]), (f"a.{ending}", content), ("b.jpg", ENCODED[1])])
    assert inputs_of(path) == (["a.jpg", "b.jpg"], [label, -1], classes)


def test_shards_without_labels_have_no_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", ENCODED[0])])
    write_tar(tmp_path / "1.tar", [("c.jpg", ENCODED[2])])
    assert inputs_of(tmp_path) == (["0.tar/a.jpg", "1.tar/c.jpg"], [-1, -1], [])


def test_tables_of_img2dataset_next_to_its_shards_are_not_inputs(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("000.jpg", ENCODED[0]), ("000.json", b'{"key": "000"}'), ("000.txt", b"cat")])
    table = pa.table({"url": ["https://example.org"], "key": ["000"], "status": ["success"]})
    pyarrow.parquet.write_table(table, tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert inputs_of(tmp_path)[0] in (["000.jpg"], ["00000.tar/000.jpg"])


OPAQUE = np.concatenate([PIXELS, np.full((6, 4, 5, 1), 255, np.uint8)], 3)
GREY = PIXELS[..., :1]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [(PIXELS, PIXELS), (PIXELS.transpose(0, 3, 1, 2), PIXELS), (OPAQUE.transpose(0, 3, 1, 2), PIXELS),
     (GREY, GREY.repeat(3, 3)), (GREY[..., 0], GREY.repeat(3, 3)), (GREY.transpose(0, 3, 1, 2), GREY.repeat(3, 3))],
    ids=["NHWC", "NCHW", "RGBA NCHW", "grey NHWC", "grey NHW", "grey NCHW"],
)  # fmt: skip
def test_an_npz_may_store_images_in_any_usual_order_of_axes(
    stored: np.ndarray, shown: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "images.npz", images=np.asfortranarray(stored))
    source = open_source(str(tmp_path / "images.npz"))
    assert [one.label for one in source.inputs] == [-1] * 6
    assert np.array_equal(contents_of(source), shown)


@pytest.mark.parametrize("labels", [np.array(LABELS)[:, None], np.eye(2)[LABELS], np.eye(2, dtype=bool)[LABELS]])
def test_an_npz_may_store_labels_as_a_column_or_one_hot(labels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=PIXELS, labels=labels)
    assert inputs_of(tmp_path / "images.npz") == (NUMBERS, LABELS, ["0", "1"])


def test_keys_of_numbered_rows_are_zero_padded(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((101, 2, 2), np.uint8))
    keys = inputs_of(tmp_path / "images.npz")[0]
    assert keys == sorted(keys) and keys[:2] == ["000", "001"] and keys[-1] == "100"


def test_cells_of_a_table_are_read_in_any_order(tmp_path: Path) -> None:
    values = [row.to_bytes(4, "big") for row in range(100)]
    pyarrow.parquet.write_table(pa.table({"image": values}), tmp_path / "rows.parquet", row_group_size=40)
    (tmp_path / "rows.arrow").write_bytes(
        arrow_stream(pa.table({"image": pa.chunked_array([values[:60], values[60:]])}))
    )
    order = [7, 99, 0, 40, 39, 41, 3, 3, 98, *range(100)]
    for name in ("rows.parquet", "rows.arrow"):
        reader = SourceReader("table", str(tmp_path))
        assert [reader.read([name, "image", row]) for row in order] == [values[row] for row in order]


def test_a_row_without_an_image_is_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    empty = [{"bytes": None, "path": None}, None, {"bytes": b"", "path": None}]
    pyarrow.parquet.write_table(pa.table({"image": [*STRUCTS[:2], *empty]}), tmp_path / "rows.parquet")
    source = open_source(str(tmp_path / "rows.parquet"))
    reader = SourceReader(source.kind, source.address)
    assert [one.key for one in source.inputs] == list("01234")
    for one in list(source.inputs)[2:]:
        with pytest.raises(ValueError, match="image"):
            reader.read(one.place)
    assert reader.read(source.inputs[1].place) == ENCODED[1]


def test_a_remote_source_may_be_a_whole_bucket() -> None:
    for name in ("cat/a.png", "dog/b.png"):
        fsspec.filesystem("memory").pipe_file(f"/top/{name}", ENCODED[0])
    assert inputs_of("memory://top") == (["cat/a.png", "dog/b.png"], [0, 1], ["cat", "dog"])
    assert inputs_of("memory://top/") == inputs_of("memory://top")


def test_a_folder_of_images_may_contain_an_unrelated_state_json(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": ENCODED[0], "state.json": b'{"epoch": 3}'})
    assert inputs_of(tmp_path)[0] == ["a.png"]
