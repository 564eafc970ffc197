"""The error of a damaged or missing source is one line that names it."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from sources_on_disk import ENCODED, MEMBERS, PIXELS, write_files, write_tar, write_zip

from patchloom.errors import UserError
from patchloom.platform.dataset.sources import open_source


def whole_tar(here: Path) -> tuple[bytes, list[int]]:
    path = write_tar(here / "whole.tar", [(name, ENCODED[0]) for name in ("a.png", "b.png", "c.png")])
    with tarfile.open(path) as archive:
        return path.read_bytes(), [member.offset for member in archive.getmembers()]


def changed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def npz(here: Path, **arrays: Any) -> bytes:
    np.savez(here / "arrays.npz", **arrays)
    return (here / "arrays.npz").read_bytes()


def parquet(here: Path, **columns: Any) -> bytes:
    pyarrow.parquet.write_table(pa.table(columns), here / "table.parquet")
    return (here / "table.parquet").read_bytes()


OTHERS = np.arange(6 * 60, dtype=np.uint8).reshape(6, 4, 5, 3)
BROKEN: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "a film": ("film.mp4", lambda here: b"film", "film.mp4"),
    "a text as zip": ("x.zip", lambda here: b"text", "x.zip"),
    "half a zip": ("x.zip", lambda here: write_zip(here / "a.zip", MEMBERS).read_bytes()[:300], "x.zip"),
    "a zip without images": ("x.zip", lambda here: write_zip(here / "a.zip", MEMBERS[-1:]).read_bytes(), ".png"),
    "a text as tar": ("x.tar", lambda here: b"text" * 1000, "x.tar"),
    "an empty tar": ("x.tar", lambda here: b"", "x.tar"),
    "a tar cut in an image": ("x.tar", lambda here: whole_tar(here)[0][: whole_tar(here)[1][1] + 600], "x.tar"),
    "a tar cut in a header": ("x.tar", lambda here: whole_tar(here)[0][: whole_tar(here)[1][1] + 99], "x.tar"),
    "a damaged header": ("x.tar", lambda here: changed(whole_tar(here)[0], whole_tar(here)[1][1]), "x.tar"),
    "half a tar.gz": (
        "x.tar.gz",
        lambda here: write_tar(here / "a.tgz", MEMBERS[1:], "w:gz").read_bytes()[:200],
        "x.tar.gz",
    ),
    "an empty tar.gz": ("x.tar.gz", lambda here: b"", "x.tar.gz"),
    "a text as parquet": ("x.parquet", lambda here: b"text" * 9, "x.parquet"),
    "half a parquet": ("x.parquet", lambda here: parquet(here, image=ENCODED)[:-9], "x.parquet"),
    "a text as arrow": ("x.arrow", lambda here: b"text" * 9, "x.arrow"),
    "no column of images": ("x.parquet", lambda here: parquet(here, text=["a"], label=[0]), "text, label"),
    "half an npz": ("x.npz", lambda here: npz(here, images=PIXELS)[:-30], "x.npz"),
    "a damaged npz": ("x.npz", lambda here: changed(npz(here, images=OTHERS), 400), "x.npz"),
    "an npz without images": ("x.npz", lambda here: npz(here, weights=PIXELS), "weights"),
    "images of floats": ("x.npz", lambda here: npz(here, images=PIXELS / 255), "float64"),
    "too few labels": ("x.npz", lambda here: npz(here, images=PIXELS, labels=[1]), "6 images and 1 labels"),
    "labels of Python objects": (
        "x.npz",
        lambda here: npz(here, images=PIXELS, labels=np.array(list("aabbab"), object)),
        "label",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_error_of_a_damaged_file_names_it_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, named = BROKEN[case]
    (tmp_path / name).write_bytes(content(tmp_path))
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / name))
    message = str(error.value)
    assert named in message and str(tmp_path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"README.txt": b""}, ".png"),
        ({"dataset_dict.json": b"{}", "train/state.json": b"{}", "test/x.arrow": b""}, "test, train"),
        (
            {"state.json": b'{"_data_files": [{"filename": "data-0.arrow"}]}', "dataset_info.json": b"{}"},
            "data-0.arrow",
        ),
    ],
    ids=["no image", "several splits", "a saved dataset without its file"],
)
def test_the_error_of_a_folder_that_is_not_a_source_names_it_in_one_line(
    files: dict[str, bytes], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        open_source(str(write_files(tmp_path, files)))
    message = str(error.value)
    assert named in message and str(tmp_path) in message and "\n" not in message


def test_the_error_of_a_missing_source_names_it(tmp_path: Path) -> None:
    for address in (f"{tmp_path}/nothing", f"{tmp_path}/nothing.zip", "memory://nothing/here"):
        with pytest.raises(UserError, match=address):
            open_source(address)


def test_a_damaged_archive_is_refused_at_every_attempt(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tgz", MEMBERS[1:], "w:gz").read_bytes()
    (tmp_path / "half.tgz").write_bytes(whole[: len(whole) // 2])
    code = f"""
from patchloom.errors import UserError
from patchloom.platform.dataset.sources import open_source
for _ in range(2):
    try:
        open_source({str(tmp_path / "half.tgz")!r})
    except UserError:
        print("refused")
"""
    environment = {**os.environ, "PATCHLOOM_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    assert output.split() == ["refused", "refused"]  # with a lock left behind, the second attempt would wait for ever
