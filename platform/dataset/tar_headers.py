"""The headers of a tar archive, read without an object of `tarfile` per member (POSIX ustar and pax).

`tarfile` takes 60 microseconds per member. Headers of plain files, which nearly all members are, are read here, and
`tarfile` reads the others.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

BLOCK_BYTES = tarfile.BLOCKSIZE
PLAIN_KINDS, PAX_KIND = (0, ord("0")), ord("x")  # the byte at 156 is the kind of a member
PAX_RECORD = re.compile(rb"([0-9]+) ([^=\n]+)=")
MOST_TAR_HEADER_BYTES, MOST_PAX_HEADERS = 1 << 20, 1000  # of an archive of files, not of a bomb
RARE_RECORDS = (b"size", b"linkpath", b"hdrcharset", b"GNU.sparse.")  # which `tarfile` reads


@dataclass(slots=True)
class TarHeader:
    """A member of a tar archive: its name, where its data begins, its size, and its kind and target if it is a link."""

    name: str
    first_byte: int
    size_bytes: int
    kind: bytes = tarfile.REGTYPE
    target: str = ""

    @property
    def is_hard_link(self) -> bool:
        """Whether it is another name of an earlier member."""
        return self.kind == tarfile.LNKTYPE


class _HeaderFile:
    """A tar file of which only headers are read. It refuses an extended header that is as large as no header is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Some bytes."""
        if size > MOST_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def tar_headers(file: BinaryIO) -> Iterator[TarHeader]:
    """The members of a tar archive in their order; between two of them, the file may be read elsewhere.

    Raises:
        tarfile.TarError: a header is damaged, or data is missing.
    """
    file.seek(0)
    archive = tarfile.TarFile(fileobj=cast(BinaryIO, _HeaderFile(file)))
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        if len(archive.pax_headers) > MOST_PAX_HEADERS:  # each later header would copy them
            raise tarfile.ReadError(f"more than {MOST_PAX_HEADERS} global headers")
        kind = tarfile.REGTYPE if member.isfile() else member.type
        yield TarHeader(member.name, member.offset_data, member.size, kind, member.linkname)
        while not archive.pax_headers and (plain := _plain_file(file, archive.offset)):  # those are for all members
            yield plain
            archive.offset = plain.first_byte + _padded(plain.size_bytes)
        file.seek(0)  # so that `tarfile` checks that the data before the next header is there
    file.seek(archive.offset)
    if file.read(BLOCK_BYTES).strip(b"\0"):  # `tarfile` ends at a damaged header
        raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _plain_file(file: BinaryIO, offset: int) -> TarHeader | None:
    """The file whose header is at an offset; None if `tarfile` must read it."""
    file.seek(offset)
    header, long_name = file.read(BLOCK_BYTES), ""
    try:
        if len(header) == BLOCK_BYTES and header[156] == PAX_KIND:
            size = _size_of(header)
            if size > MOST_TAR_HEADER_BYTES:
                return None
            long_name = _pax_name(file.read(_padded(size))[:size])
            offset += BLOCK_BYTES + _padded(size)
            header = file.read(BLOCK_BYTES)
        if len(header) < BLOCK_BYTES or header[156] not in PLAIN_KINDS:
            return None
        name = header[:100].partition(b"\0")[0].decode()
        prefix = header[345:500].partition(b"\0")[0].decode()
        name = f"{prefix}/{name}" if prefix else name
        if name.endswith("/"):  # a folder in the format of 1979
            return None
        return TarHeader(long_name or name, offset + BLOCK_BYTES, _size_of(header))
    except ValueError:  # also of texts that are not UTF-8
        return None


def _size_of(header: bytes) -> int:
    """The size of a member; raises ValueError if it is not in plain digits, or the checksum is wrong."""
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(header[148:156].rstrip(b"\0 "), 8):
        raise ValueError("wrong checksum")
    size = int(header[124:136].rstrip(b"\0 "), 8)
    if size < 0:  # would lead back to an earlier header
        raise ValueError("a negative size")
    return size


def _pax_name(records: bytes) -> str:
    """The name in a pax header, or an empty text; raises ValueError if more than times and owners are in it."""
    name, position = "", 0
    while position < len(records):
        found = PAX_RECORD.match(records, position)
        if found is None or found[2].startswith(RARE_RECORDS) or not int(found[1]):
            raise ValueError("not a plain file")
        end = position + int(found[1])
        if found[2] == b"path":
            name = records[found.end() : end - 1].decode().rstrip("/")
        position = end
    return name
