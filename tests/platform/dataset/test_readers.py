"""Readers: members of zip archives, cells of damaged and of rewritten tables, read by their places."""

import gc
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from sources_on_disk import zip_place

from patchloom.errors import UserError
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.dataset.tables import open_table
from patchloom.platform.files.cache import cache_folder
from patchloom.platform.files.folder import Folder

GENERATOR = np.random.default_rng(0)
CONTENTS = [GENERATOR.bytes(500 + 7 * row) for row in range(60)]


def write_zip(
    path: Path, method: int = zipfile.ZIP_STORED, before: bytes = b"", extra: bytes = b""
) -> list[list[object]]:
    """An archive of the contents; returns their places."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for row, content in enumerate(CONTENTS):
            member = zipfile.ZipInfo(f"a/{row}.png")
            member.extra = extra
            archive.writestr(member, content, method)
    path.write_bytes(before + file.getvalue())
    with zipfile.ZipFile(path) as archive:
        return [zip_place(path.name, member) for member in archive.infolist()]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n"], ids=["plain", "self-extracting"])
def test_members_of_a_zip_are_read_in_any_order(tmp_path: Path, method: int, before: bytes) -> None:
    extra = struct.pack("<HH", 0x6666, 900) + bytes(900)  # longer than what is read at once
    places = write_zip(tmp_path / "some.zip", method, before, extra)
    reader = SourceReader("zip", str(tmp_path))
    for row in [59, 3, 3, 0, 41, *range(60)]:
        assert reader.read(places[row]) == CONTENTS[row]


def test_a_damaged_member_is_the_only_one_lost(tmp_path: Path) -> None:
    path = tmp_path / "some.zip"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        places = write_zip(path, method)
        content = bytearray(path.read_bytes())
        content[int(str(places[7][1])) + 100] ^= 255  # in its pixels
        content[int(str(places[9][1]))] ^= 255  # in its header
        path.write_bytes(content)
        reader = SourceReader("zip", str(tmp_path))
        for row, place in enumerate(places):
            if row in (7, 9):
                with pytest.raises((zipfile.BadZipFile, zlib.error)):
                    reader.read(place)
            else:
                assert reader.read(place) == CONTENTS[row]


def test_encrypted_members_and_rare_compression_methods_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.zip"
    places = write_zip(path, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="method 14"):
        SourceReader("zip", str(tmp_path)).read(places[0])
    places = write_zip(path)
    content = bytearray(path.read_bytes())
    content[int(str(places[5][1])) + 6] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="encrypted"):
        SourceReader("zip", str(tmp_path)).read(places[5])


def write_damaged_table(path: Path) -> None:
    """Pages of one row each in three groups of 20; that of row 31 is damaged."""
    table = pa.table({"image": CONTENTS, "label": [row % 3 for row in range(60)]})
    pyarrow.parquet.write_table(
        table, path, row_group_size=20, compression="zstd", use_dictionary=False, data_page_size=1, write_batch_size=1
    )
    content = bytearray(path.read_bytes())
    at = content.index(CONTENTS[31])  # what cannot be compressed stands there as it is
    content[at - 8 : at] = bytes(8)  # zstd's own header of the page
    path.write_bytes(content)


def test_a_damaged_page_loses_no_earlier_row_and_no_other_group(tmp_path: Path) -> None:
    write_damaged_table(tmp_path / "rows.parquet")
    reader = SourceReader("table", str(tmp_path))
    for order in (range(60), range(59, -1, -1), GENERATOR.permutation(60).tolist()):
        for row in order:
            if 31 <= row < 40:
                with pytest.raises(ValueError, match="row group"):
                    reader.read(["rows.parquet", "image", row])
            else:
                assert reader.read(["rows.parquet", "image", row]) == CONTENTS[row]
    assert [one.label for one in open_source(str(tmp_path / "rows.parquet")).inputs] == [row % 3 for row in range(60)]


def test_the_error_of_a_damaged_label_column_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"image": CONTENTS, "label": list(range(60))})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    column = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + 20 : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size - 20
    )
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.parquet") as refused:
        open_source(str(path))
    assert "\n" not in str(refused.value)


def test_copies_of_remote_files_are_open_only_while_they_are_read(s3: str, tmp_path: Path, cache: Path) -> None:
    there = Folder.at(f"{s3}/{tmp_path.name}")
    for number in range(5):
        sink, table = pa.BufferOutputStream(), pa.table({"image": CONTENTS})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        there.write(f"{number}.arrow", sink.getvalue())

    def open_copies() -> int:
        gc.collect()
        files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(file.startswith(str(cache_folder("tables"))) for file in files)

    before, source = open_copies(), open_source(str(there))
    reader = SourceReader(source.kind, source.address)
    assert [reader.read(one.place) for one in source.inputs] == CONTENTS * 5
    assert open_copies() <= before + 2  # the last one and its lock


def test_a_remote_table_that_was_rewritten_is_read_again(s3: str, tmp_path: Path) -> None:
    there = Folder.at(f"{s3}/{tmp_path.name}")
    for contents in (CONTENTS, CONTENTS[::-1], [content[::-1] for content in CONTENTS]):  # of one size, within a second
        sink = pa.BufferOutputStream()
        table = pa.table({"image": sorted(contents, key=len)})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        there.write("rows.arrow", sink.getvalue())
        assert open_table(there, "rows.arrow").cell("image", 59) == sorted(contents, key=len)[59]
    assert there.stamp("rows.arrow") == there.stamp("rows.arrow")
