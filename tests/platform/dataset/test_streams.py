"""What is read piece by piece is what the standard library reads whole: zip directories and JSON."""

import io
import json
import zipfile

import pytest

from patchloom.platform.dataset import json_stream
from patchloom.platform.dataset.json_stream import JsonStream
from patchloom.platform.dataset.zip_directory import zip_entries


@pytest.mark.parametrize("members", [0, 1, 3000])
@pytest.mark.parametrize("is_wide", [False, True])
def test_a_zip_directory_is_that_of_zipfile(members: int, is_wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_wide:  # 64-bit fields, as for archives above 4 GiB
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    file = io.BytesIO(b"something before the archive")
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"a comment"
        for number in range(members):
            member = zipfile.ZipInfo(f"é{number}/x.png" if number % 3 else f"{number}/")
            member.comment = b"c" * (number % 30)
            archive.writestr(member, b"" if member.is_dir() else b"x" * (number % 200))
    monkeypatch.undo()
    wanted = [(one.filename, one.header_offset, one.compress_size, one.file_size, one.CRC)
              for one in zipfile.ZipFile(file).infolist()]  # fmt: skip
    found = [(one.name, one.header_offset, one.packed_bytes, one.size_bytes, one.crc) for one in zip_entries(file)]
    assert found == wanted and len(found) == members


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive" * 100])
def test_what_is_no_zip_file_is_an_error(content: bytes) -> None:
    with pytest.raises(zipfile.BadZipFile, match="not a zip file"):
        list(zip_entries(io.BytesIO(content)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_json_in_pieces_has_the_values_of_json(encoding: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "PIECE_CHARACTERS", piece)
    value = {"classes": ["é", '\\"'], "labels": [["a/b.png", 12], ["日", -1.5e3], []], "more": {"x": [1, {"y": None}]}}
    for text in (json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False)):
        stream = JsonStream(io.BytesIO(text.encode(encoding)))
        found = {}
        for key in stream.members():
            found[key] = list(stream.items()) if key == "labels" else stream.value()
        assert found == value and stream.next_character() == ""


@pytest.mark.parametrize("text", ['{"a": [1, 2', '{"a": [1 2]}', '{"a" 1}', '{"a": tru}', "{1: 2"])
def test_damaged_json_is_an_error(text: str) -> None:
    stream = JsonStream(io.BytesIO(text.encode()))
    with pytest.raises(ValueError):
        for _ in stream.members():
            list(stream.items())
