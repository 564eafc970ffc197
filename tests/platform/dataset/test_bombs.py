"""Decompression bombs: small files that would take gigabytes of memory or disk, and what their refusal leaves."""

import gzip
import io
import itertools
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import environment, run_bounded
from sources_on_disk import ENCODED, PIXELS, write_tar, write_zip, zip_place

from patchloom.errors import UserError
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.dataset.tables import open_table
from patchloom.platform.files import bounds
from patchloom.platform.files.folder import Folder

OPEN = """
from patchloom.errors import UserError
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import open_source
"""
ZEROS = bytes(1 << 20)


def npy_header(shape: tuple[int, ...], dtype: str = "|u1", by_columns: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": by_columns, "shape": shape})
    return file.getvalue()


def write_npz(path: Path, members: dict[str, tuple[bytes, int]]) -> Path:
    """An `.npz` of members that are each some bytes and then a number of MiB of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (start, mebibytes) in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(start)
                for _ in range(mebibytes):
                    member.write(ZEROS)
    return path


def read_all(mib: int, *paths: Path) -> list[str]:
    """What opening sources and reading their inputs says, in a process with bounded memory."""
    code = f"""
for path in {[str(path) for path in paths]}:
    try:
        source = open_source(path)
        reader = SourceReader(source.kind, source.address)
        for one in source.inputs:
            try:
                print("read", len(reader.read(one.place)))
            except ValueError as error:
                print("skipped", one.key, error)
    except UserError as error:
        print("refused", error)
"""
    done = run_bounded(OPEN, code, mib)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def write_zip_bomb(path: Path, name: str) -> None:
    """A member of 700 MiB and a small image."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            for _ in range(700):
                member.write(ZEROS)
        archive.writestr("good.png", ENCODED[0])


def test_zip_member_larger_than_an_image_is_not_unpacked(tmp_path: Path) -> None:
    write_zip_bomb(tmp_path / "a.zip", "bomb.png")
    assert (tmp_path / "a.zip").stat().st_size < 4 << 20
    bomb, good = read_all(256, tmp_path / "a.zip")
    assert f"skipped bomb.png has {700 << 20:,} bytes" in bomb and good == f"read {len(ENCODED[0])}"


def test_zip_member_is_unpacked_as_far_as_its_directory_says(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", [("a.png", bytes(1 << 22))])
    content = bytearray(path.read_bytes())
    at = content.rindex(struct.pack("<L", 1 << 22))  # the size in the directory
    content[at : at + 4] = struct.pack("<L", 1000)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        place = zip_place("a.zip", archive.infolist()[0])
    with pytest.raises(zipfile.BadZipFile, match="directory"):
        SourceReader("zip", str(tmp_path)).read(place)


NPZ_BOMBS: dict[str, tuple[str, tuple[bytes, int]]] = {
    "row": ("labels", (npy_header((6, 1 << 29)), 1)),
    "text": ("labels", (npy_header((6,), "<U500000000"), 1)),
    "rows by column": ("labels", (npy_header((1 << 29, 6), by_columns=True), 1)),
    "columns": ("labels", (npy_header((6, 1 << 29), by_columns=True), 1)),
    "header": ("labels", (b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**31), 400)),
    "class names": ("class_names", (npy_header((10**12,), "<U1"), 1)),
    "image": ("images", (npy_header((1, 40_000, 40_000)), 1)),
    "rows": ("images", (npy_header((10**12, 1, 1)), 1)),
    "images": ("images", (npy_header((3 << 9, 1024, 1024)), 1)),
}


def test_npz_bombs_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    images = {"images": (npy_header(PIXELS.shape) + PIXELS.tobytes(), 0)}
    bombs = NPZ_BOMBS.items()
    paths = [write_npz(tmp_path / f"{name}.npz", images | dict([member])) for name, member in bombs]
    found = read_all(256, *paths)
    assert len(found) == len(paths)
    for line, path in zip(found, paths, strict=True):
        assert line.startswith("refused") and str(path) in line


def test_npz_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", {"images": (npy_header((50, 64, 64, 3)), 1)})  # 600 kB follow, not 1 MiB
    assert len(open_source(str(path)).inputs) == 50
    path = write_npz(tmp_path / "b.npz", {"images": (npy_header((500, 64, 64, 3)), 1)})
    with pytest.raises(UserError, match="array of images"):
        open_source(str(path))


def write_tar_bomb(path: Path, mebibytes: int) -> Path:
    with gzip.open(path, "wb", 1) as file:
        header = tarfile.TarInfo("a.png")
        header.size = mebibytes << 20
        file.write(header.tobuf())
        for _ in range(mebibytes):
            file.write(ZEROS)
        file.write(bytes(1024))
    return path


def test_tar_bomb_stays_within_the_cache_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_tar_bomb(tmp_path / "a.tar.gz", 96)
    with environment(PATCHLOOM_CACHE=str(tmp_path / "cache"), PATCHLOOM_CACHE_GIB="0.03"):
        with pytest.raises(UserError, match="PATCHLOOM_CACHE_GIB"):
            open_source(str(path))
        assert not list((tmp_path / "cache").rglob("*.tar"))
    with environment(PATCHLOOM_CACHE=str(tmp_path / "cache"), PATCHLOOM_CACHE_GIB="0.2"):
        assert len(open_source(str(path)).inputs) == 1


def test_tar_that_is_compressed_as_no_images_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "UNPACKED_BYTES", 1 << 20)
    path = write_tar_bomb(tmp_path / "a.tar.gz", 200)
    with environment(PATCHLOOM_CACHE=str(tmp_path / "cache")), pytest.raises(UserError, match="unpack it yourself"):
        open_source(str(path))
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_large_tar_headers_are_not_read(tmp_path: Path) -> None:
    kinds = [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
    for kind in kinds:
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 300 << 20
        with (tmp_path / f"{kind.decode()}.tar").open("wb") as file:
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.truncate(301 << 20)
    found = read_all(128, *tmp_path.iterdir())
    assert len(found) == 4 and all("not a complete tar file (a header of" in line for line in found)


def test_nested_and_many_tar_headers_are_refused(tmp_path: Path) -> None:
    header, name = tarfile.TarInfo("x"), b"a.png\0".ljust(512, b"\0")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 6
    (tmp_path / "nested.tar").write_bytes((header.tobuf() + name) * 3000)
    pax = b"".join(tarfile.TarInfo.create_pax_global_header({f"k{n}{m}": "v" for m in range(100)}) for n in range(20))
    (tmp_path / "many.tar").write_bytes(pax + tarfile.TarInfo("a.png").tobuf() + bytes(1024))
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="not a complete tar file"):
            open_source(str(path))


def test_hard_links_to_hard_links_take_linear_time(tmp_path: Path) -> None:
    path, count = write_tar(tmp_path / "a.tar", [("00000.png", ENCODED[0])]), 8_000
    with tarfile.open(path, "a") as archive:
        for number in range(1, count):
            link = tarfile.TarInfo(f"{number:05d}.png")
            link.type, link.linkname = tarfile.LNKTYPE, f"{number - 1:05d}.png"
            archive.addfile(link)
    started = time.monotonic()
    source = open_source(str(path))
    assert time.monotonic() - started < 30  # 6 minutes in quadratic time
    reader = SourceReader(source.kind, source.address)
    assert len(source.inputs) == count and reader.read(source.inputs[count - 1].place) == ENCODED[0]


@pytest.mark.parametrize("names", [("a.png", "b.png", "a.png"), ("a.png", "a.png"), ("a.png", "missing")])
def test_hard_links_without_a_target_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, target in itertools.pairwise(names):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            archive.addfile(link)
    with pytest.raises(UserError, match="not a complete tar file"):
        open_source(str(tmp_path / "a.tar"))


def test_oversized_files_and_members_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with (tmp_path / "folder" / "large.png").open("wb") as file:
        file.truncate(2 << 30)
    (tmp_path / "folder" / "small.png").write_bytes(ENCODED[0])
    member = tarfile.TarInfo("a.png")
    member.size = 1 << 32
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate((1 << 32) + 2048)
    large, small, in_tar = read_all(256, tmp_path / "folder", tmp_path / "a.tar")
    assert large.startswith(f"skipped large.png has {2 << 30:,} bytes") and small == f"read {len(ENCODED[0])}"
    assert in_tar.startswith("skipped a.png has")


@pytest.mark.slow
def test_value_of_every_row_of_a_table_is_stored_once(tmp_path: Path) -> None:
    rows, value = 1000, b"x" * (32 << 20)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    table = pa.table({"image": images, "label": list(range(rows))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    code = f"""
reader = SourceReader("table", {str(tmp_path)!r})
print(sum(len(reader.read(["a.parquet", "image", row])) for row in range(3)))
"""
    done = run_bounded(OPEN, code, 3000)  # a batch of 32 rows has 1 GiB; all rows have 31 GiB
    assert done.stdout.strip() == str(3 * len(value)), done.stderr


def test_table_that_claims_more_rows_than_bytes_is_refused(tmp_path: Path) -> None:
    rows = 5_000_000
    table = pa.table({"image": pa.nulls(rows), "label": pa.nulls(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match="5,000,000 rows"):
            open_table(Folder(str(tmp_path)), name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_compressed_arrow_file_is_read_batch_by_batch(tmp_path: Path, kind: str) -> None:
    batch = pa.record_batch({"label": pa.array(range(4)), "image": pa.array([bytes(64 << 20)] * 4)})
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(tmp_path / "a.arrow"), batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for _ in range(20):
            writer.write_batch(batch)
    code = f"""
from patchloom.platform.dataset.tables import open_table
from patchloom.platform.files.folder import Folder
table = open_table(Folder({str(tmp_path)!r}), "a.arrow")
print(table.rows, len(table.cell("image", 79)), [row[0] for row in table.values(["label"])][-1])
"""
    done = run_bounded(OPEN, code, 1500)  # a batch has 256 MiB, the file 5 GiB
    assert done.stdout.split() == ["80", str(64 << 20), "3"], done.stderr


@pytest.mark.slow
def test_statistics_and_features_of_an_npz_are_bounded(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", {"mu": (npy_header((4,), "<f8") + bytes(32), 0),
                                   "sigma": (npy_header((10**5, 10**5), "<f8"), 1)})  # fmt: skip
    code = f"""
try:
    print(read_statistics({str(tmp_path / "a.npz")!r}))
except UserError as error:
    print(error)
"""
    imports = (
        "from patchloom.errors import UserError\nfrom patchloom.pipelines.evaluate.features import read_statistics"
    )
    assert "80,000,000,000 bytes" in run_bounded(imports, code, 512).stdout


def test_archive_of_samples_is_unpacked_within_bounds(tmp_path: Path) -> None:
    from patchloom.pipelines.sample.formats import DAMAGED, FORMATS

    write_zip_bomb(tmp_path / "a.zip", "000000.png")
    with (tmp_path / "a.zip").open("rb") as file, pytest.raises(DAMAGED, match="bytes"):
        FORMATS["zip"].unpack(file, [0])
    write_npz(tmp_path / "a.npz", {"arr_0": (npy_header((1 << 40, 1, 1, 3)), 1), "seeds": (npy_header((1,)) + b"0", 0)})
    with (tmp_path / "a.npz").open("rb") as file, pytest.raises(DAMAGED, match="bytes"):
        FORMATS["npz"].unpack(file, [0])
