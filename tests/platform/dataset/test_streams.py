"""What is read piece by piece is what the standard library reads whole: zip directories, tar headers and JSON."""

import io
import json
import tarfile
import zipfile

import pytest

from patchloom.platform.dataset import json_stream
from patchloom.platform.dataset.json_stream import JsonStream
from patchloom.platform.dataset.tar_headers import tar_headers
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


def a_tar_of_everything(tar_format: int, pax_headers: dict[str, str]) -> bytes:
    """Files with all kinds of names and sizes, folders, links, and kinds of members that are not files."""
    names = ["a.png", "b/é.png", "c" * 100, "d" * 101, "e/" * 70 + "f.png", "日" * 90, "g.cls", "./h.png", "old/"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format, pax_headers=pax_headers) as archive:
        for number, name in enumerate(names * 3):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = (0, 1, 511, 512, 513, 5000)[number % 6], 1.5 if number % 2 else 7
            if number % 5 == 4:
                member.pax_headers = {"comment": "=x\n=", "LIBARCHIVE.creationtime": "1"}
            if number % 7 == 6:
                kinds = [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
                member.type, member.linkname, member.size = kinds[number // 7], "a.png", 0
            if name == "old/":
                member.type, member.size = tarfile.AREGTYPE, 0
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return file.getvalue()


def same_by_tarfile(file: io.BytesIO) -> list[tuple[str, int, int, bool, bytes]]:
    """The members of a tar as `tarfile` lists them."""
    with tarfile.open(fileobj=file) as archive:
        members = archive.getmembers()
    return [(one.name, one.offset_data, one.size, one.isfile(), one.linkname) for one in members]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("pax_headers", [{}, {"uname": "someone"}], ids=["", "with a global header"])
def test_the_headers_of_a_tar_are_those_of_tarfile(tar_format: int, pax_headers: dict[str, str]) -> None:
    content = a_tar_of_everything(tar_format, pax_headers)
    found = []
    file = io.BytesIO(content)
    for one in tar_headers(file):
        found.append((one.name, one.first_byte, one.size_bytes, one.kind == tarfile.REGTYPE, one.target))
        file.seek(len(found) * 100)  # as if a label were read
    assert found == same_by_tarfile(io.BytesIO(content)) and len(found) == 27
    assert sum(is_file for _, _, _, is_file, _ in found) == 21


def test_a_damaged_or_shortened_tar_is_an_error() -> None:
    content = a_tar_of_everything(tarfile.PAX_FORMAT, {})
    end = content.rstrip(b"\0")
    for cut in (len(end) - 3000, len(end) - 600, 300, 0):
        with pytest.raises(tarfile.TarError):
            list(tar_headers(io.BytesIO(content[:cut])))
    starts = [one.first_byte - tarfile.BLOCKSIZE for one in tar_headers(io.BytesIO(content))]
    for start in (starts[1], starts[-1]):
        damaged = bytearray(content)
        damaged[start + 20] ^= 255
        with pytest.raises(tarfile.TarError):
            list(tar_headers(io.BytesIO(bytes(damaged))))


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
