"""Six small images, and functions that write them as files, archives and tables."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
NAMES = ["dog/9.png", "cat/1.png", "dog/2.png", "cat/10.png", "dog/3.png", "cat/4.png"]  # in no order
LABELS = [1, 0, 1, 0, 1, 0]
CLASSES = ["cat", "dog"]
NUMBERS = [str(row) for row in range(6)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


ENCODED = [png(pixels) for pixels in PIXELS]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def arrow_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


MEMBERS = [("cat/", b""), *zip(NAMES, ENCODED, strict=True), ("README.txt", b"no input")]


def zip_place(name: str, member: zipfile.ZipInfo) -> list[str | int]:
    """The place of a member of the zip archive `name`."""
    return [name, member.header_offset, member.compress_size, member.CRC, member.file_size]
