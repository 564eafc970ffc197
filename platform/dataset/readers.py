"""Readers: read an input of a source by its place: files, members of archives, rows of arrays and tables."""

import gzip
import hashlib
import io
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.dataset.labels import first_of
from patchloom.platform.dataset.zip_directory import zip_entries
from patchloom.platform.files.cache import cached_copy
from patchloom.platform.files.folder import COPY_BYTES, Folder
from patchloom.platform.files.inside import inner_path

# Where an input is in its source: the name of a file, then numbers such as an offset, or a column and a row.
Place = list[str | int]

TABLE_BATCH_ROWS, SMALL_BATCH_ROWS = 32, 8192
GAP_BYTES, RUN_BYTES = 1 << 18, 32 << 20  # limits of what one request reads: between two members, and in all
MEMBER_PIECE_BYTES = 1 << 18  # of a member that is read in pieces
GZIP_MIN_BYTES = 18
NO_CELLS = (0, pa.array([]))
Opened = TypeVar("Opened")

ZIP_HEADER_BYTES, TYPICAL_HEADER_BYTES = 30, 160  # of a member, without and with its name and extra fields


class SourceReader:
    """Reads inputs of a source by their places, in any process. A damaged input raises an exception."""

    def __init__(self, kind: str, address: str) -> None:
        self.folder = Folder(address)
        methods: dict[str, Callable[..., bytes | np.ndarray]] = {
            "files": self.folder.read,
            "zip": self._member,
            "tar": self._file,
            "table": self._cell,
            "npz": self._row,
        }
        self._read, self._kind = methods[kind], kind
        self._open: dict[tuple[str, str], Any] = {}
        self._runs: dict[tuple[str, int], int] = {}
        self._piece_at, self._piece = ("", 0), b""  # what was read last: its file and first byte, and the bytes

    def read(self, place: Place) -> bytes | np.ndarray:
        """The encoded image at a place, or its pixels as an (H, W, C) uint8 array."""
        return self._read(*place)

    def expect(self, places: Iterable[Place]) -> None:
        """Prepare to read these inputs in this order. Members of archives in a store then need few requests."""
        if self.folder.is_remote and self._kind in ("tar", "zip"):
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
            self._open = {key: open_file(self.folder, name)}
        opened: Opened = self._open[key]
        return opened

    def _member(self, name: str, offset: int, size: int, crc: int) -> bytes:
        """A member of a zip archive. The directory is not read: with a million images it takes a gigabyte of memory."""
        piece = self._bytes(name, Folder.open, offset, size + TYPICAL_HEADER_BYTES)
        start = _zip_data_start(piece)
        if len(piece) < start + size:
            piece = self._bytes(name, Folder.open, offset, start + size)
        content = _unpacked(piece[start : start + size], int.from_bytes(piece[8:10], "little"))
        if zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("wrong checksum (CRC-32)")
        return content

    def _file(self, name: str, offset: int, size: int) -> bytes:
        return self._bytes(name, tar_file, offset, size)

    def _row(self, name: str, row: int) -> np.ndarray:
        return np.array(self._opened(name, npz_images)[row])

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
        return self.folder.read(name)


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


def zip_place(name: str, member: zipfile.ZipInfo) -> Place:
    """The place of a member of the zip archive `name`."""
    return [name, member.header_offset, member.compress_size, member.CRC]


def zip_images(folder: Folder, name: str) -> Iterator[tuple[str, Place, int]]:
    """The name, place and size in bytes of each member of a zip archive; raises UserError if it is damaged.

    Archives made on Windows may separate folders with backslashes.
    """
    try:
        with folder.open(name) as file:
            for one in zip_entries(file):
                member = one.name.replace("\\", "/")
                if not one.name.endswith("/"):
                    yield member, [name, one.header_offset, one.packed_bytes, one.crc], one.size_bytes
    except (zipfile.BadZipFile, OSError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{name} is not a complete zip file ({error}): download it again") from None


def zip_member(folder: Folder, name: str, offset: int, size: int, crc: int) -> Iterator[bytes]:
    """The content of a member of a zip archive in pieces; raises BadZipFile at the end if its checksum is wrong."""
    with folder.open(name) as file:
        file.seek(offset)
        header = file.read(ZIP_HEADER_BYTES)
        file.seek(offset + _zip_data_start(header))
        method, found = int.from_bytes(header[8:10], "little"), 0
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        for piece in _pieces(file, size):
            content = inflate.decompress(piece) if method == zipfile.ZIP_DEFLATED else _unpacked(piece, method)
            found = zlib.crc32(content, found)
            yield content
    if found != crc:
        raise zipfile.BadZipFile("wrong checksum (CRC-32)")


def tar_member(folder: Folder, name: str, offset: int, size: int) -> Iterator[bytes]:
    """The content of a member of a tar archive in pieces."""
    with tar_file(folder, name) as file:
        file.seek(offset)
        yield from _pieces(file, size)


# by the kind of the archive; the arguments are its folder, and the place of the member
ARCHIVE_MEMBERS: dict[str, Callable[..., Iterator[bytes]]] = {"zip": zip_member, "tar": tar_member}


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


def _unpacked(packed: bytes, method: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return packed
    if method == zipfile.ZIP_DEFLATED:
        return zlib.decompress(packed, -zlib.MAX_WBITS)
    raise ValueError(f"uses zip compression method {method}; only stored and deflated are supported")


def zip_file(folder: Folder, name: str) -> zipfile.ZipFile:
    """An open zip archive; raises UserError if it is damaged."""
    try:
        return zipfile.ZipFile(folder.open(name))
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{folder}/{name} is not a complete zip file ({error}): download it again") from None


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
        with self._opened() as (_, shape, _dtype):
            self.shape = shape

    def blocks(self) -> Iterator[np.ndarray]:
        """Consecutive rows."""
        with self._opened() as (file, shape, dtype):
            row, left = dtype.itemsize * int(np.prod(shape[1:])), shape[0] if shape else 1
            while left > 0:
                rows = min(left, max(1, COPY_BYTES // max(1, row)))
                content = file.read(rows * row)
                yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])
                left -= rows

    @contextmanager
    def _opened(self) -> "Iterator[tuple[Any, tuple[int, ...], np.dtype[Any]]]":
        """The member after its header, its shape and its type; one that is not stored by rows is read whole."""
        with zip_file(self.folder, self.name) as archive, archive.open(self.member) as file:
            try:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
                shape, by_columns, dtype = read(file)
                if by_columns or dtype.hasobject:
                    content = io.BytesIO(archive.read(self.member))
                    whole = np.lib.format.read_array(content, allow_pickle=False)
                    yield io.BytesIO(np.ascontiguousarray(whole).tobytes()), whole.shape, whole.dtype
                else:
                    yield file, shape, dtype
            except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                found = self.member.removesuffix(".npy")
                raise UserError(
                    f"{self.folder}/{self.name}: {found} cannot be read ({error}): write it again"
                ) from None


def npz_images(folder: Folder, name: str) -> np.ndarray:
    """(N, H, W, C) or (N, H, W) uint8 images, unpacked once into the cache of this node and memory-mapped."""
    with zip_file(folder, name) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        found = first_of(("images", "image", "arr_0", "x", "data"), members)
        if found is None:
            raise UserError(f"{folder}/{name} contains {', '.join(members)} and no array `images`: rename one")
        member = archive.getinfo(members[found])

        def unpack(target: Path) -> None:
            try:
                with archive.open(member) as source, (target / "images.npy").open("wb") as unpacked:
                    shutil.copyfileobj(source, unpacked, COPY_BYTES)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise UserError(f"{folder}/{name} is not a complete .npz ({error}): download it again") from None

        _, here = cached_copy("arrays", _cache_name(folder, name, members[found]), member.file_size, unpack)
    images: np.ndarray = np.load(here / "images.npy", mmap_mode="r", allow_pickle=False)
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise UserError(
            f"{folder}/{name}: {found} has type {images.dtype} and shape {images.shape}; convert it to uint8 of "
            "(N, H, W, C) or (N, H, W)"
        )
    if images.ndim == 4 and images.shape[-1] > 4 and images.shape[1] in (1, 2, 3, 4):
        images = images.transpose(0, 2, 3, 1)  # stored as (N, C, H, W)
    return images


def _cache_name(folder: Folder, name: str, member: str = "") -> str:
    """The name of what is unpacked from a file in the cache, which no other file has.

    A checksum such as CRC-32 in the file would not do: anyone can make another file with the same one.
    """
    identity = (folder.address, name, member, folder.stamp(name))
    return hashlib.sha256(json.dumps(identity).encode(errors="surrogatepass")).hexdigest()[:32]


def tar_file(folder: Folder, name: str) -> BinaryIO:
    """A tar file for random access. A compressed one is unpacked once into the cache of this node."""
    if name.lower().endswith(".tar"):
        return folder.open(name)
    if folder.size(name) < GZIP_MIN_BYTES:
        raise UserError(f"{folder}/{name} is not a complete gzip file (too short): download it again")

    def unpack(target: Path) -> None:
        try:
            with (
                folder.open(name) as file,
                gzip.open(file) as source,
                (target / "plain.tar").open("wb") as unpacked,
            ):
                shutil.copyfileobj(source, unpacked, COPY_BYTES)
        except (OSError, EOFError) as error:
            raise UserError(f"{folder}/{name} is not a complete gzip file ({error}): download it again") from None

    size = folder.size(name)
    _, here = cached_copy("archives", _cache_name(folder, name), 4 * size, unpack)
    return (here / "plain.tar").open("rb")


class SourceTable:
    """A Parquet or Arrow file. `small` reads all rows of small columns; `cell` reads a large column in batches.

    Args:
        schema: its columns.
        rows: its number of rows.
        small: yields batches with the columns of these names.
        batches: yields the number of the first row and the cells of batches of a column, from the one with a row on.
    """

    def __init__(self, schema: pa.Schema, rows: int, small: Callable[[list[str]], Iterator[pa.RecordBatch]],
                 batches: Callable[[str, int], Iterator[tuple[int, pa.Array]]]) -> None:  # fmt: skip
        self.schema, self.rows, self._small = schema, rows, small
        self._batches = batches
        self._iterator: tuple[str, Iterator[tuple[int, pa.Array]]] | None = None
        self._batch: tuple[int, pa.Array] = NO_CELLS

    def values(self, names: list[str | None]) -> Iterator[list[Any]]:
        """The values of small columns, row by row; None for a column without a name."""
        wanted = [name for name in names if name]
        if not wanted:
            yield from ([None] * len(names) for _ in range(self.rows))
            return
        for batch in self._small(wanted):
            columns = [batch.column(name).to_pylist() if name else [None] * len(batch) for name in names]
            yield from map(list, zip(*columns, strict=True))

    def cell(self, column: str, row: int) -> Any:
        """One cell. Rows in ascending order are read once."""
        if self._iterator is None or self._iterator[0] != column or row < self._batch[0]:
            return self._start(column, row)
        try:
            return self._advance(self._iterator[1], row)
        except Exception:  # a damaged page may be between the previous row and this one
            return self._start(column, row)

    def _start(self, column: str, row: int) -> Any:
        batches, self._iterator, self._batch = self._batches(column, row), None, NO_CELLS
        cell = self._advance(batches, row)
        self._iterator = (column, batches)
        return cell

    def _advance(self, batches: Iterator[tuple[int, pa.Array]], row: int) -> Any:
        while row >= self._batch[0] + len(self._batch[1]):
            self._batch = next(batches)
        first, cells = self._batch
        return cells[row - first].as_py()


def open_table(folder: Folder, name: str) -> SourceTable:
    """A Parquet file, or an Arrow IPC file or stream."""
    with _complete(folder, name):
        return _parquet(folder, name) if name.lower().endswith(".parquet") else _arrow(folder, name)


@contextmanager
def _complete(folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{folder}/{name} is not a complete table ({' '.join(str(error).split())}): download it again"
        ) from None


def _parquet(folder: Folder, name: str) -> SourceTable:
    file = pyarrow.parquet.ParquetFile(folder.open(name))
    starts = np.cumsum([0] + [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])

    damaged: dict[int, tuple[int, str]] = {}  # by row group: the first row that cannot be read, and why

    def batches(column: str, row: int) -> Iterator[tuple[int, pa.Array]]:
        for group in range(int(np.searchsorted(starts, row, side="right")) - 1, file.num_row_groups):
            first, problem = damaged.get(group, (row + 1, ""))
            if row >= first:
                raise ValueError(problem)
            yield from cells(group, column)

    def cells(group: int, column: str) -> Iterator[tuple[int, pa.Array]]:
        """Cells in small batches, because a group may have gigabytes. Before a damaged page, cells one by one."""
        done = int(starts[group])
        for rows in (TABLE_BATCH_ROWS, 1):
            first = int(starts[group])
            try:
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                    if first >= done:
                        yield first, batch.column(0)
                        done = first + len(batch)
                    first += len(batch)
                return
            except (pa.ArrowException, OSError) as error:
                problem = f"is in or after a damaged page of its row group ({error})"
        damaged[group] = done, problem
        raise ValueError(problem)

    def small(names: list[str]) -> Iterator[pa.RecordBatch]:
        with _complete(folder, name):
            yield from file.iter_batches(SMALL_BATCH_ROWS, columns=names)

    return SourceTable(file.schema_arrow, file.metadata.num_rows, small, batches)


def _arrow(folder: Folder, name: str) -> SourceTable:
    """An Arrow IPC file or stream, memory-mapped; a remote one is copied to the cache of this node."""
    if folder.is_remote:
        place = _cache_name(folder, name)
        _, here = cached_copy("tables", place, folder.size(name), lambda new: folder.fetch(name, new / "table.arrow"))
        path = here / "table.arrow"
    else:
        path = folder.path / name
    mapped = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_stream(mapped).read_all()

    def batches(column: str, row: int) -> Iterator[tuple[int, pa.Array]]:
        first = 0
        for chunk in table.column(column).chunks:
            if row < first + len(chunk):
                yield first, chunk
            first += len(chunk)

    def small(names: list[str]) -> Iterator[pa.RecordBatch]:
        yield from table.select(names).to_batches(SMALL_BATCH_ROWS)

    return SourceTable(table.schema, table.num_rows, small, batches)
