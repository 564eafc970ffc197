"""Readers: the inputs of a source read by their places, in any process: files, archives, arrays and tables."""

import gzip
import hashlib
import io
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.dataset.labels import first_of
from patchloom.platform.files.copies import cached_copy
from patchloom.platform.files.folder import COPY_BYTES, Folder

TABLE_BATCH_ROWS = 32
GZIP_LEAST_BYTES = 18
NO_CELLS = (0, pa.array([]))
ZIP_HEADER_BYTES, USUAL_HEADER_BYTES = 30, 160  # of a member, without and with its name and extra fields


class Reader:
    """Reads the inputs of a source by their places, in any process; what is wrong with one comes as an exception."""

    def __init__(self, kind: str, address: str) -> None:
        self.folder = Folder(address)
        how: dict[str, Callable[..., bytes | np.ndarray]] = {
            "files": self.folder.read,
            "zip": self._member,
            "tar": self._piece,
            "table": self._cell,
            "npz": self._row,
        }
        self._read = how[kind]
        self._open: dict[tuple[str, str], Any] = {}

    def read(self, place: list[Any]) -> bytes | np.ndarray:
        """The encoded image at a place, or the (H, W, C) array."""
        return self._read(*place)

    def _opened(self, name: str, how: Callable[[Folder, str], Any]) -> Any:
        """The file of this name, kept open until another is asked for: inputs come in order."""
        if (name, how.__name__) not in self._open:
            self._open = {(name, how.__name__): how(self.folder, name)}
        return self._open[name, how.__name__]

    def _member(self, name: str, offset: int, size: int, crc: int) -> bytes:
        """A member of a zip archive, without the archive's directory: that of a million images fills a gigabyte."""
        file: BinaryIO = self._opened(name, Folder.open)
        file.seek(offset)
        piece = file.read(size + USUAL_HEADER_BYTES)  # far away, each read is a request
        start = _zip_data_start(piece)
        if len(piece) < start + size:
            piece += file.read(start + size - len(piece))
        content = _unpacked(piece[start : start + size], int.from_bytes(piece[8:10], "little"))
        if zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("wrong checksum (CRC-32)")
        return content

    def _piece(self, name: str, offset: int, size: int) -> bytes:
        file: BinaryIO = self._opened(name, tar_file)
        file.seek(offset)
        return file.read(size)

    def _row(self, name: str, row: int) -> np.ndarray:
        return np.array(self._opened(name, npz_images)[row])

    def _cell(self, name: str, column: str, row: int) -> bytes:
        value = self._opened(name, open_table).cell(column, row)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise ValueError("the row has no image")
        return value if isinstance(value, bytes) else self.folder.read(str(value))


def zip_place(name: str, member: zipfile.ZipInfo) -> list[Any]:
    """Where a member of the zip archive of this name is found."""
    return [name, member.header_offset, member.compress_size, member.CRC]


def _zip_data_start(piece: bytes) -> int:
    """Where a member's data begins behind its own header (APPNOTE 4.3.7)."""
    if len(piece) < ZIP_HEADER_BYTES or piece[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no header where the archive's directory tells of one")
    if piece[6] & 1:
        raise ValueError("is encrypted: unpack the archive first")
    return ZIP_HEADER_BYTES + int.from_bytes(piece[26:28], "little") + int.from_bytes(piece[28:30], "little")


def _unpacked(packed: bytes, method: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return packed
    if method == zipfile.ZIP_DEFLATED:
        return zlib.decompress(packed, -zlib.MAX_WBITS)
    raise ValueError(f"is compressed by method {method}, and stored or deflated was wanted: zip it again")


def zip_file(folder: Folder, name: str) -> zipfile.ZipFile:
    """An open zip archive with its directory."""
    try:
        return zipfile.ZipFile(folder.open(name))
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{folder}/{name} is no whole zip file ({error}): fetch it again") from None


def npz_array(folder: Folder, name: str, wanted: tuple[str, ...]) -> np.ndarray | None:
    """The first of these arrays that an `.npz` holds."""
    with zip_file(folder, name) as archive:
        there = {member.removesuffix(".npy"): member for member in archive.namelist()}
        found = first_of(wanted, there)
        if found is None:
            return None
        try:
            return np.lib.format.read_array(io.BytesIO(archive.read(there[found])), allow_pickle=False)
        except (ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder}/{name}: {found} cannot be read ({error}): write it again") from None


def npz_images(folder: Folder, name: str) -> np.ndarray:
    """(N, H, W, C) or (N, H, W) uint8, unpacked once to the node's cache and memory-mapped."""
    with zip_file(folder, name) as archive:
        there = {member.removesuffix(".npy"): member for member in archive.namelist()}
        found = first_of(("images", "image", "arr_0", "x", "data"), there)
        if found is None:
            raise UserError(f"{folder}/{name} holds {', '.join(there)}, and no array `images`: rename it")
        member = archive.getinfo(there[found])

        def unpack(here: Path) -> None:
            try:
                with archive.open(member) as source, (here / "images.npy").open("wb") as target:
                    shutil.copyfileobj(source, target, COPY_BYTES)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise UserError(f"{folder}/{name} is no whole .npz ({error}): fetch it again") from None

        _, here = cached_copy("arrays", f"{member.CRC:08x}-{member.file_size}", member.file_size, unpack)
    images: np.ndarray = np.load(here / "images.npy", mmap_mode="r", allow_pickle=False)
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise UserError(
            f"{folder}/{name}: {found} is {images.dtype} of {images.shape}, and uint8 of (N, H, W, C) or (N, H, W) "
            "was wanted: convert it"
        )
    if images.ndim == 4 and images.shape[-1] > 4 and images.shape[1] in (1, 2, 3, 4):
        images = images.transpose(0, 2, 3, 1)  # stored as (N, C, H, W)
    return images


def tar_file(folder: Folder, name: str) -> BinaryIO:
    """A tar file to read at random; a compressed one is unpacked once to the node's cache."""
    if name.lower().endswith(".tar"):
        return folder.open(name)
    if folder.size(name) < GZIP_LEAST_BYTES:
        raise UserError(f"{folder}/{name} is no whole gzip file (it is too short): fetch it again")
    with folder.open(name) as file:
        file.seek(-8, io.SEEK_END)
        digest = file.read(8).hex()  # gzip's own checksum and length

    def unpack(here: Path) -> None:
        try:
            with folder.open(name) as file, gzip.open(file) as source, (here / "plain.tar").open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
        except (OSError, EOFError) as error:
            raise UserError(f"{folder}/{name} is no whole gzip file ({error}): fetch it again") from None

    size = folder.size(name)
    place = hashlib.sha256(f"{name} {digest} {size}".encode()).hexdigest()[:32]
    _, here = cached_copy("archives", place, 4 * size, unpack)
    return (here / "plain.tar").open("rb")


class Table:
    """A Parquet or Arrow file: columns whole, cells of large columns one batch at a time."""

    def __init__(self, schema: pa.Schema, rows: int, column: Callable[[str], list[Any]],
                 batches: Callable[[str, int], Iterator[tuple[int, pa.Array]]]) -> None:  # fmt: skip
        self.schema, self.rows, self.column = schema, rows, column
        self._batches = batches
        self._begun: tuple[str, Iterator[tuple[int, pa.Array]]] | None = None
        self._batch: tuple[int, pa.Array] = NO_CELLS

    def cell(self, column: str, row: int) -> Any:
        """One cell; rows that come in order are read once."""
        if self._begun is None or self._begun[0] != column or row < self._batch[0]:
            return self._begin(column, row)
        try:
            return self._go_on(self._begun[1], row)
        except Exception:  # of a damaged piece, which may lie between the row before and this one
            return self._begin(column, row)

    def _begin(self, column: str, row: int) -> Any:
        batches, self._begun, self._batch = self._batches(column, row), None, NO_CELLS
        cell = self._go_on(batches, row)
        self._begun = (column, batches)
        return cell

    def _go_on(self, batches: Iterator[tuple[int, pa.Array]], row: int) -> Any:
        while row >= self._batch[0] + len(self._batch[1]):
            self._batch = next(batches)
        first, cells = self._batch
        return cells[row - first].as_py()


def open_table(folder: Folder, name: str) -> Table:
    """A Parquet file, or an Arrow IPC file or stream."""
    with _whole(folder, name):
        return _parquet(folder, name) if name.lower().endswith(".parquet") else _arrow(folder, name)


@contextmanager
def _whole(folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder}/{name} is no whole table ({' '.join(str(error).split())}): fetch it again") from None


def _parquet(folder: Folder, name: str) -> Table:
    file = pyarrow.parquet.ParquetFile(folder.open(name))
    starts = np.cumsum([0] + [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])

    lost: dict[int, tuple[int, str]] = {}  # by row group: from which row on it cannot be read, and why

    def batches(column: str, row: int) -> Iterator[tuple[int, pa.Array]]:
        for group in range(int(np.searchsorted(starts, row, side="right")) - 1, file.num_row_groups):
            first, problem = lost.get(group, (row + 1, ""))
            if row >= first:
                raise ValueError(problem)
            yield from cells(group, column)

    def cells(group: int, column: str) -> Iterator[tuple[int, pa.Array]]:
        """A few at a time, because a group may hold gigabytes of images; those before a damaged page one by one."""
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
                problem = f"stands in or behind a damaged page of its row group ({error})"
        lost[group] = done, problem
        raise ValueError(problem)

    def column(wanted: str) -> list[Any]:
        with _whole(folder, name):
            return list(file.read([wanted]).column(0).to_pylist())

    return Table(file.schema_arrow, file.metadata.num_rows, column, batches)


def _arrow(folder: Folder, name: str) -> Table:
    """An Arrow IPC file or stream, memory-mapped; a remote one from the node's cache."""
    if folder.is_remote:
        digest = hashlib.sha256(f"{folder.address}/{name} {folder.stamp(name)}".encode()).hexdigest()[:32]
        _, here = cached_copy("tables", digest, folder.size(name), lambda to: folder.fetch(name, to / "table.arrow"))
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

    return Table(table.schema, table.num_rows, lambda name: list(table.column(name).to_pylist()), batches)
