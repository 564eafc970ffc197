"""Readers: read an input of a source by its place: files, members of archives, rows of arrays and tables."""

import gzip
import io
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.dataset.cifar_batches import read_cifar_batch
from patchloom.platform.dataset.image_names import is_image
from patchloom.platform.dataset.labels import first_of
from patchloom.platform.dataset.lmdb_values import LmdbFile, lmdb_file
from patchloom.platform.dataset.tables import open_table
from patchloom.platform.dataset.zip_directory import zip_entries
from patchloom.platform.files.arrays import ArrayHeader, read_array_header, read_values
from patchloom.platform.files.bounds import (
    MOST_IMAGE_BYTES,
    check_image_bytes,
    check_rows,
    most_unpacked_bytes,
    reading_damaged,
)
from patchloom.platform.files.cache import cached_copy, copy_name, kept_with, make_room
from patchloom.platform.files.folder import COPY_BYTES, Folder
from patchloom.platform.files.inside import inner_path
from patchloom.platform.files.patience import StoreError

# Where an input is in its source: the name of a file, then numbers such as an offset, or a column and a row.
Place = list[str | int]

GAP_BYTES, RUN_BYTES = 1 << 18, 32 << 20  # limits of what one request reads: between two members, and in all
MEMBER_PIECE_BYTES = 1 << 18  # of a member that is read in pieces
GZIP_MIN_BYTES, GZIP_ENDINGS = 18, (".gz", ".tgz")
ROOM_STEP_BYTES = 1 << 30  # that are asked of the cache at once
MOST_LABEL_BYTES = 1 << 20  # of a row of labels, such as one-hot vectors
Opened = TypeVar("Opened")

LARGER = "is larger than the directory of the archive says"
LMDB_NAME = "data.mdb"
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
ZIP_HEADER_BYTES, TYPICAL_HEADER_BYTES = 30, 160  # of a member, without and with its name and extra fields


class UnopenedError(UserError):
    """A file of the source cannot be opened on this node, such as for want of room or of a package.

    It was opened when the source was listed, so that its inputs are not to blame.
    """


def is_of_node_or_store(error: Exception) -> bool:
    """Whether an input could not be read for a reason that is not its own: it may be fine."""
    return isinstance(error, UnopenedError) or (isinstance(error, StoreError) and error.is_passing)


class SourceReader:
    """Reads inputs of a source by their places, in any process.

    A damaged input raises an exception, and a file of the source that cannot be opened here `UnopenedError`.
    """

    def __init__(self, kind: str, address: str) -> None:
        self.folder = Folder(address)
        self._kind = kind
        self._open: dict[tuple[str, str], Any] = {}
        self._runs: dict[tuple[str, int], int] = {}
        self._piece_at, self._piece = ("", 0), b""  # what was read last: its file and first byte, and the bytes
        self._batch_at, self._batch = ("", 0), np.empty(0, np.uint8)  # of CIFAR, also the one that was read last

    def read(self, place: Place) -> bytes | np.ndarray:
        """The encoded image at a place, or its pixels as an (H, W, C) uint8 array."""
        return READ_BY_KIND[self._kind](self, *place)  # no bound method, which would keep files open

    def expect(self, places: Iterable[Place]) -> None:
        """Prepare to read these inputs in this order. Members of archives in a store then need few requests."""
        if self.folder.is_remote and self._kind in ("tar", "zip", "idx", "cifar"):
            more = TYPICAL_HEADER_BYTES if self._kind == "zip" else 0
            self._runs = member_runs((str(name), int(first), int(size) + more) for name, first, size, *_ in places)

    def _bytes(self, name: str, open_file: Callable[[Folder, str], BinaryIO], first: int, size: int) -> bytes:
        """Bytes of an archive: of the piece that was read last, or the beginning of the next piece."""
        start = first - self._piece_at[1]
        if name != self._piece_at[0] or start < 0 or start + size > len(self._piece):
            most = max(size, self._runs.get((name, first), first) - first)
            self._piece = self.folder.read_from(self._opened(name, open_file), first, most)
            self._piece_at, start = (name, first), 0
        return self._piece[start : start + size]

    def _opened(self, name: str, open_file: Callable[[Folder, str], Opened]) -> Opened:
        """A file of the source, kept open until another one is needed, because inputs are read in order."""
        key = (name, open_file.__name__)
        if key not in self._open:
            try:
                self._open = {key: open_file(self.folder, name)}
            except StoreError:
                raise
            except UserError as error:
                raise UnopenedError(str(error)) from None
        opened: Opened = self._open[key]
        return opened

    def _file(self, name: str) -> bytes:
        return self.folder.read(name, MOST_IMAGE_BYTES)

    def _member(self, name: str, offset: int, size: int, crc: int, unpacked: int = MOST_IMAGE_BYTES) -> bytes:
        """A member of a zip archive. The directory is not read: with a million images it takes a gigabyte of memory."""
        check_image_bytes(max(size, unpacked))
        piece = self._bytes(name, Folder.open, offset, size + TYPICAL_HEADER_BYTES)
        start = _zip_data_start(piece)
        if len(piece) < start + size:
            piece = self._bytes(name, Folder.open, offset, start + size)
        content = _unpacked(piece[start : start + size], int.from_bytes(piece[8:10], "little"), unpacked)
        if zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("wrong checksum (CRC-32)")
        return content

    def _tar_member(self, name: str, offset: int, size: int) -> bytes:
        return self._bytes(name, plain_file, offset, check_image_bytes(size))

    def _row(self, name: str, row: int) -> np.ndarray:
        return np.array(self._opened(name, npz_images)[row])

    def _pixels(self, name: str, first: int, size: int, *shape: int) -> np.ndarray:
        """Pixels without a format: of shape (H, W), or (C, H, W)."""
        values = np.frombuffer(self._bytes(name, plain_file, first, check_image_bytes(size)), np.uint8)
        if values.size != size:
            raise ValueError(f"has {values.size:,} of {size:,} bytes")
        pixels = values.reshape(shape)
        return pixels.transpose(1, 2, 0) if len(shape) == 3 else pixels

    def _cifar_image(self, name: str, first: int, size: int, *rest: int) -> np.ndarray:
        """Row `rest` of a pickled batch, or pixels of that shape in a binary one."""
        if len(rest) > 1:
            return self._pixels(name, first, size, *rest)
        if self._batch_at != (name, first):
            content = self.folder.read_from(self._opened(name, plain_file), first, size)
            self._batch_at, self._batch = (name, first), read_cifar_batch(content).images
        return np.array(self._batch[rest[0]])

    def _value(self, name: str, key: str) -> bytes:
        return self._opened(name, open_lmdb).value(bytes.fromhex(key))

    def _cell(self, name: str, column: str, row: int) -> bytes:
        value = self._opened(name, open_table).cell(column, row)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise ValueError("the row has no image")
        if isinstance(value, list):  # of uint8
            value = bytes(value)
        return value if isinstance(value, bytes) else self._named_file(name, str(value))

    def _named_file(self, table: str, name: str) -> bytes:
        """A file that a cell of a table names, which is in the folder of the source."""
        if not self.folder.is_remote:
            inner_path(self.folder.path, name, table)
        return self._file(name)


READ_BY_KIND: dict[str, Callable[..., bytes | np.ndarray]] = {
    "files": SourceReader._file,
    "zip": SourceReader._member,
    "tar": SourceReader._tar_member,
    "table": SourceReader._cell,
    "npz": SourceReader._row,
    "idx": SourceReader._pixels,
    "cifar": SourceReader._cifar_image,
    "lmdb": SourceReader._value,
}


def member_runs(members: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int], int]:
    """Where to read several members at once: the file and first byte of the first one, and the end of the last one.

    Only members that are near to one another, in the order of the file, belong together.

    Args:
        members: the file, first byte and size of each member, in the order in which they are read.
    """
    runs: dict[tuple[str, int], int] = {}
    name, start = "", 0
    for file, first, size in members:
        end = runs.get((name, start), 0)
        if file != name or not start <= first <= end + GAP_BYTES or first + size > start + RUN_BYTES:
            name, start = file, first
        runs[name, start] = max(runs.get((name, start), 0), first + size)
    return runs


def zip_images(folder: Folder, name: str) -> Iterator[tuple[str, Place, int]]:
    """The name, place and size in bytes of each member of a zip archive; raises UserError if it is damaged.

    Archives made on Windows may separate folders with backslashes.
    """
    try:
        with folder.open(name) as file:
            for one in zip_entries(file):
                member = one.name.replace("\\", "/")
                if not one.name.endswith("/"):
                    place: Place = [name, one.header_offset, one.packed_bytes, one.crc, one.size_bytes]
                    yield member, place, one.size_bytes
    except (zipfile.BadZipFile, OSError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{name} is not a complete zip file ({error}): download it again") from None


def zip_member(folder: Folder, name: str, offset: int, size: int, crc: int, unpacked: int) -> Iterator[bytes]:
    """The content of a member of a zip archive in pieces.

    Raises:
        BadZipFile: at the end if its checksum is wrong; before, if it is larger than the directory says.
        ValueError: it would be much larger than any text after unpacking.
    """
    if unpacked > most_unpacked_bytes(size):
        raise ValueError(f"has {size:,} bytes and {unpacked:,} after unpacking, which could be a decompression bomb")
    opened: Any = folder.open(name)
    with io.BufferedReader(
        opened, min(COPY_BYTES, max(size, MEMBER_PIECE_BYTES))
    ) as file:  # a request each, on a store
        file.seek(offset)
        header = file.read(ZIP_HEADER_BYTES)
        file.seek(offset + _zip_data_start(header))
        method, found, left = int.from_bytes(header[8:10], "little"), 0, unpacked
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        for piece in _pieces(file, size):
            while piece:
                if method == zipfile.ZIP_DEFLATED:
                    content = inflate.decompress(piece, MEMBER_PIECE_BYTES)
                    piece = inflate.unconsumed_tail
                else:
                    content, piece = _unpacked(piece, method, left), b""
                left -= len(content)
                if left < 0:
                    raise zipfile.BadZipFile(LARGER)
                found = zlib.crc32(content, found)
                yield content
        rest = inflate.flush()  # at most the match that did not fit into the last piece
        found = zlib.crc32(rest, found)
        yield rest
    if found != crc:
        raise zipfile.BadZipFile("wrong checksum (CRC-32)")


def tar_member(folder: Folder, name: str, offset: int, size: int) -> Iterator[bytes]:
    """The content of a member of a tar archive in pieces."""
    with plain_file(folder, name) as file:
        file.seek(offset)
        yield from _pieces(file, size)


# by the kind of the archive; the arguments are its folder, and the place of the member
ARCHIVE_MEMBERS: dict[str, Callable[..., Iterator[bytes]]] = {"zip": zip_member, "tar": tar_member}


def open_lmdb(folder: Folder, name: str) -> LmdbFile:
    """An LMDB. A remote one, and one in a zip archive as LSUN's are, is copied once to the cache of this node."""
    in_zip = name.lower().endswith(".zip")
    if not folder.is_remote and not in_zip:
        return lmdb_file(folder.path / name, f"{folder}/{name}")
    place = lmdb_in_zip(folder, name) if in_zip else None
    size = int(place[-1]) if place else folder.size(name)

    def fill(target: Path) -> None:
        if place is None:
            folder.fetch(name, target / LMDB_NAME)
            return
        with reading_damaged(f"{folder}/{name}", "a complete zip file"), (target / LMDB_NAME).open("wb") as unpacked:
            unpacked.writelines(ARCHIVE_MEMBERS["zip"](folder, *place))

    handle, here = cached_copy("archives", copy_name(folder, name, LMDB_NAME), size, fill)
    opened = lmdb_file(here / LMDB_NAME, f"{folder}/{name}")
    kept_with(opened, handle)
    return opened


def lmdb_in_zip(folder: Folder, name: str) -> Place | None:
    """The place of the LMDB in a zip archive; None if an image comes before it, or there is none."""
    for member, place, _ in zip_images(folder, name):
        if is_image(member):
            return None
        if member.rpartition("/")[2] == LMDB_NAME:
            return place
    return None


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next bytes of a file; fewer at its end."""
    while size > 0 and (piece := file.read(min(size, MEMBER_PIECE_BYTES))):
        yield piece
        size -= len(piece)


def _zip_data_start(piece: bytes) -> int:
    """The offset of the data of a member from its header (APPNOTE 4.3.7)."""
    if len(piece) < ZIP_HEADER_BYTES or piece[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("the archive has no member header at the offset in its directory")
    if piece[6] & 1:
        raise ValueError("is encrypted: unpack the archive first")
    return ZIP_HEADER_BYTES + int.from_bytes(piece[26:28], "little") + int.from_bytes(piece[28:30], "little")


def _unpacked(packed: bytes, method: int, size: int) -> bytes:
    """The content of a member, of which the directory says that it has `size` bytes."""
    if method == zipfile.ZIP_STORED:
        return packed
    if method == zipfile.ZIP_DEFLATED:
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        content = unpack.decompress(packed, size + 1)
        if len(content) > size or not (unpack.eof or unpack.decompress(b"", 1) == b"" == unpack.unconsumed_tail):
            raise zipfile.BadZipFile(LARGER)
        return content
    raise ValueError(f"uses zip compression method {method}; only stored and deflated are supported")


def zip_file(folder: Folder, name: str) -> zipfile.ZipFile:
    """An open zip archive; raises UserError if it is damaged."""
    file = folder.open(name)
    with reading_damaged(f"{folder}/{name}", "a complete zip file"):
        return zipfile.ZipFile(file)


def npz_array(folder: Folder, name: str, wanted: tuple[str, ...]) -> "NpzArray | None":
    """The first of these arrays that an `.npz` contains, or None."""
    with zip_file(folder, name) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        found = first_of(wanted, members)
        return None if found is None else NpzArray(folder, name, members[found])


class NpzArray:
    """An array in an `.npz`, of which only some rows are in memory."""

    def __init__(self, folder: Folder, name: str, member: str) -> None:
        self.folder, self.name, self.member = folder, name, member
        with self._opened() as (_, header):
            self.shape = header.shape

    def blocks(self) -> Iterator[np.ndarray]:
        """Consecutive rows."""
        with self._opened() as (file, header):
            rows_left, row = header.shape[0] if header.shape else 1, header.row_bytes
            if row > MOST_LABEL_BYTES:
                raise ValueError(f"each of its rows has {row:,} bytes, and at most {MOST_LABEL_BYTES:,} are read")
            while rows_left > 0:
                rows = min(rows_left, max(1, COPY_BYTES // max(1, row)))
                yield read_values(file, replace(header, shape=(rows, *header.shape[1:])))
                rows_left -= rows

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, ArrayHeader]]:
        """The member after its header, and its header; one that is stored by columns is read whole."""
        name = f"{self.folder}/{self.name}: {self.member.removesuffix('.npy')}"
        with (
            zip_file(self.folder, self.name) as archive,
            reading_damaged(name, "an array that can be read", "write it again"),
            archive.open(self.member) as file,
        ):
            header = read_array_header(file)
            if not header.by_columns:
                yield file, header
                return
            content = np.ascontiguousarray(read_values(file, header)).tobytes()
            yield io.BytesIO(content), replace(header, by_columns=False)


def npz_images(folder: Folder, name: str) -> np.ndarray:
    """(N, H, W, C) or (N, H, W) uint8 images, unpacked once into the cache of this node and memory-mapped."""
    with zip_file(folder, name) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        found = first_of(("images", "image", "arr_0", "x", "data"), members)
        if found is None:
            raise UserError(f"{folder}/{name} contains {', '.join(members)} and no array `images`: rename one")
        member = archive.getinfo(members[found])
        with reading_damaged(f"{folder}/{name}: {found}", "an array of images"), archive.open(member) as file:
            _check_images(read_array_header(file), f"{folder}/{name}: {found}", member.compress_size)

        def unpack(target: Path) -> None:
            with (
                reading_damaged(f"{folder}/{name}", "a complete .npz"),
                archive.open(member) as source,
                (target / "images.npy").open("wb") as unpacked,
            ):
                shutil.copyfileobj(source, unpacked, COPY_BYTES)

        handle, here = cached_copy("arrays", copy_name(folder, name, members[found]), member.file_size, unpack)
    with reading_damaged(f"{folder}/{name}: {found}", "an array of images"):
        images: np.ndarray = np.load(here / "images.npy", mmap_mode="r", allow_pickle=False)
    if images.ndim == 4 and images.shape[-1] > 4 and images.shape[1] in (1, 2, 3, 4):
        images = images.transpose(0, 2, 3, 1)  # stored as (N, C, H, W)
    kept_with(images, handle)
    return images


def _check_images(header: ArrayHeader, name: str, packed_bytes: int) -> None:
    """Refuse an array that is not of images, before it is unpacked."""
    if len(header.shape) not in (3, 4) or header.dtype != np.uint8:
        raise UserError(
            f"{name} has type {header.dtype} and shape {header.shape}; convert it to uint8 of (N, H, W, C) or (N, H, W)"
        )
    check_image_bytes(header.row_bytes)
    check_rows(header.shape[0], packed_bytes)
    most = most_unpacked_bytes(packed_bytes)
    if header.size_bytes > most:
        raise UserError(
            f"{name} has {packed_bytes:,} bytes and would have {header.size_bytes:,} after unpacking, more than images "
            "need: write it again without compression (numpy.savez)"
        )


def plain_file(folder: Folder, name: str) -> BinaryIO:
    """A file for random access. One that gzip compressed is unpacked once into the cache of this node."""
    if not name.lower().endswith(GZIP_ENDINGS):
        return folder.open(name)
    if folder.size(name) < GZIP_MIN_BYTES:
        raise UserError(f"{folder}/{name} is not a complete gzip file (too short): download it again")

    size = folder.size(name)

    def unpack(target: Path) -> None:
        with (
            folder.open(name) as file,
            reading_damaged(f"{folder}/{name}", "a complete gzip file"),
            gzip.open(file) as source,
            (target / "plain.tar").open("wb") as unpacked,
        ):
            unpack_within_bounds(cast(IO[bytes], source), unpacked, target.parent, f"{folder}/{name}", size)

    handle, here = cached_copy("archives", copy_name(folder, name), min(4 * size, most_unpacked_bytes(size)), unpack)
    opened = (here / "plain.tar").open("rb")
    kept_with(opened, handle)
    return opened


def unpack_within_bounds(source: IO[bytes], unpacked: IO[bytes], cache: Path, name: str, packed_bytes: int) -> None:
    """Unpack a file of unknown size as far as the cache has room, and no bomb.

    Args:
        source: what is unpacked, open for reading.
        unpacked: where it goes, a file in the cache.
        cache: the folder of the cache that it is in.
        name: the packed file, for messages.
        packed_bytes: its size.
    """
    written, room, most = 0, 0, most_unpacked_bytes(packed_bytes)
    while piece := source.read(COPY_BYTES):
        if written + len(piece) > most:
            raise UserError(
                f"{name} has {packed_bytes:,} bytes and more than {most:,} after unpacking, more than images need: "
                "unpack it yourself, and give the folder"
            )
        if len(piece) > room:
            room = max(COPY_BYTES, min(written, ROOM_STEP_BYTES))
            make_room(cache, room)
        room -= unpacked.write(piece)
        written += len(piece)
