"""The directory of a zip archive, read piece by piece (PKWARE's APPNOTE 6.3, 4.3.12 to 4.3.16).

`zipfile` keeps an object for each member, which takes a gigabyte of memory for a million images.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import BadZipFile

DIRECTORY_ENTRY, DIRECTORY_END = struct.Struct("<4s4B4HL2L5H2L"), struct.Struct("<4s4H2LH")
DIRECTORY_LOCATOR_64, DIRECTORY_END_64 = struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
LONGEST_COMMENT, PIECE_BYTES = 1 << 16, 1 << 20
LONGEST_ENTRY = DIRECTORY_ENTRY.size + 3 * LONGEST_COMMENT  # with its name, extra data and comment
UTF8_FLAG, IN_EXTRA = 0x800, 0xFFFF_FFFF  # a flag for the name, and the value of a field that is in the extra data


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A member of a zip archive: its name, and where and how it is stored."""

    name: str
    header_offset: int
    packed_bytes: int
    size_bytes: int
    crc: int


def zip_entries(file: BinaryIO) -> Iterator[ZipEntry]:
    """The members of a zip archive, folders included, in the order of its directory; raises BadZipFile."""
    start, size, before = _directory_of(file)
    file.seek(start)
    buffer, position, is_read = b"", 0, False
    while size > 0:
        if not is_read and len(buffer) - position < LONGEST_ENTRY:
            piece = file.read(PIECE_BYTES)
            buffer, position, is_read = buffer[position:] + piece, 0, len(piece) < PIECE_BYTES
        if len(buffer) - position < DIRECTORY_ENTRY.size:
            raise BadZipFile("Truncated central directory")
        fields = DIRECTORY_ENTRY.unpack_from(buffer, position)
        if fields[0] != b"PK\1\2":
            raise BadZipFile("Bad magic number for central directory")
        flags, offset = fields[5], fields[18]
        crc, packed, unpacked, name_size, extra_size, comment_size = fields[9:15]
        begin = position + DIRECTORY_ENTRY.size
        name = buffer[begin : begin + name_size].decode("utf-8" if flags & UTF8_FLAG else "cp437").partition("\0")[0]
        values = [unpacked, packed, offset]
        if IN_EXTRA in values:
            values = _long_values(buffer[begin + name_size : begin + name_size + extra_size], values)
        yield ZipEntry(name, values[2] + before, values[1], values[0], crc)
        taken = DIRECTORY_ENTRY.size + name_size + extra_size + comment_size
        position, size = position + taken, size - taken


def _directory_of(file: BinaryIO) -> tuple[int, int, int]:
    """Where the directory begins, its size in bytes, and the number of bytes before the archive in its file."""
    archive_bytes = file.seek(0, io.SEEK_END)
    longest_end = LONGEST_COMMENT + DIRECTORY_END.size + DIRECTORY_LOCATOR_64.size + DIRECTORY_END_64.size
    first = max(0, archive_bytes - longest_end)
    file.seek(first)
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + DIRECTORY_END.size > len(tail):
        raise BadZipFile("File is not a zip file")
    size, offset = DIRECTORY_END.unpack_from(tail, end)[5:7]
    after = 0  # bytes between the directory and its end record
    if tail[max(0, end - DIRECTORY_LOCATOR_64.size) : end][:4] == b"PK\6\7":
        fields = DIRECTORY_END_64.unpack_from(tail, end - DIRECTORY_LOCATOR_64.size - DIRECTORY_END_64.size)
        if fields[0] == b"PK\6\6":
            size, offset, after = fields[8], fields[9], DIRECTORY_LOCATOR_64.size + DIRECTORY_END_64.size
    start = first + end - after - size
    if start < 0 or start < offset:
        raise BadZipFile("Bad offset for central directory")
    return start, size, start - offset


def _long_values(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset with those that need 64 bits, which are in this order in the extra data (APPNOTE 4.5.3)."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            try:
                return [next(wide) if value == IN_EXTRA else value for value in values]
            except StopIteration:
                break
        extra = extra[4 + size :]
    raise BadZipFile("Corrupt zip64 extra field")
