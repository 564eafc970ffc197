"""Formats of sampled images: one PNG file per image, or archives as zip, WebDataset, Parquet or .npz."""

import hashlib
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patchloom.pipelines.pages.pictures import png_bytes, png_pixels
from patchloom.platform.files.arrays import read_arrays
from patchloom.platform.files.bounds import read_image, read_image_member
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.samples import ManifestEntry

Content = bytes | np.ndarray  # the bytes of a PNG, or (H, W, C) uint8 pixels; the manifest has its sha256
VALUES_AT_ONCE = 1 << 14  # of a column of `samples.npz`
MOST_ARCHIVE_BYTES = 8 << 30  # of the images in one `.npz`
DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, tarfile.TarError, pa.ArrowException)


@dataclass(frozen=True)
class EncodedImage:
    """A sampled image as its format stores it."""

    seed: int
    label: int
    content: Content


@dataclass(frozen=True)
class Format:
    """A file format of images. An archive contains the seeds of one shard, in ascending order."""

    ending: str
    encode: Callable[[np.ndarray], Content]  # of a (C, H, W) uint8 image
    pack: Callable[[list[EncodedImage]], bytes] | None  # None: one file per image
    unpack: Callable[[BinaryIO, Collection[int]], dict[int, Content]]  # the requested seeds that are in the file

    def file_of(self, seed: int, shard_size: int | None = None) -> str:
        """`000000/000042.png` (one folder per thousand images), or the archive of the seed's shard, `000000.zip`."""
        if self.pack is None or shard_size is None:
            return f"{seed // 1000:06d}/{seed:06d}{self.ending}"
        return f"{seed // shard_size:06d}{self.ending}"


def content_sha256(content: Content) -> str:
    """The sha256 of the bytes of a PNG, or of the pixels, row by row."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()


def pixels(content: Content) -> np.ndarray:
    """The image as (C, H, W) uint8."""
    return png_pixels(content) if isinstance(content, bytes) else content.transpose(2, 0, 1)


def read_contents(folder: Folder, entries: Iterable[ManifestEntry]) -> Iterator[tuple[ManifestEntry, Content | None]]:
    """Manifest lines with their images; None if an image is missing or its sha256 differs.

    Consecutive lines of one file are read together.
    """
    for file, lines in groupby(entries, key=lambda entry: entry.file):
        wanted = list(lines)
        try:
            with folder.open(file) as opened:
                found = format_of(file).unpack(opened, {entry.seed for entry in wanted})
        except DAMAGED:
            found = {}
        for entry in wanted:
            content = found.get(entry.seed)
            yield entry, content if content is not None and content_sha256(content) == entry.sha256 else None


def format_of(file: str) -> Format:
    """The format of a file of images, by its suffix."""
    return next(format for format in FORMATS.values() if file.endswith(format.ending))


def _pixels_last(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _unpack_png(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return dict.fromkeys(seeds, read_image(file, size))


def _member(seed: int, ending: str = ".png") -> str:
    return f"{seed:06d}{ending}"


def _pack_zip(images: list[EncodedImage]) -> bytes:
    """PNG files and `dataset.json` with their labels, as EDM's tools and `patchloom prepare` read them."""
    labels = [[_member(image.seed), image.label] for image in images]
    is_labelled = any(image.label >= 0 for image in images)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for image in images:
            # ZipInfo has a fixed date: the bytes do not depend on the clock
            archive.writestr(zipfile.ZipInfo(_member(image.seed)), bytes(image.content))
        card = json.dumps({"labels": labels if is_labelled else None})
        archive.writestr(zipfile.ZipInfo("dataset.json"), card)
    return buffer.getvalue()


def _unpack_zip(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        return {seed: read_image_member(archive, _member(seed)) for seed in seeds if _member(seed) in names}


def _pack_tar(images: list[EncodedImage]) -> bytes:
    """A shard of WebDataset: `000042.png` and, for a labelled image, `000042.cls`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for image in images:
            parts = {".png": bytes(image.content)}
            if image.label >= 0:
                parts[".cls"] = str(image.label).encode()
            for ending, content in parts.items():
                member = tarfile.TarInfo(_member(image.seed, ending))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _unpack_tar(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    names = {_member(seed): seed for seed in seeds}
    found: dict[int, Content] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name in names else None
            if content is not None:
                found[names[member.name]] = read_image(content, member.size)
    return found


def _pack_parquet(images: list[EncodedImage]) -> bytes:
    """Columns seed, label and image, where image is the struct of bytes and path of Hugging Face's `datasets`."""
    contents = [{"bytes": image.content, "path": _member(image.seed)} for image in images]
    table = pa.table({
        "seed": pa.array([image.seed for image in images], pa.int64()),
        "label": pa.array([image.label for image in images], pa.int32()),
        "image": pa.array(contents, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    })  # fmt: skip
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="none")  # PNG is compressed already
    return buffer.getvalue()


def _unpack_parquet(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    table = pyarrow.parquet.read_table(pa.BufferReader(file.read()), columns=["seed", "image"])
    rows = zip(table["seed"].to_pylist(), table["image"], strict=True)
    wanted = set(seeds)
    return {seed: image["bytes"].as_py() for seed, image in rows if seed in wanted}


def _pack_npz(images: list[EncodedImage]) -> bytes:
    """`arr_0` (N, H, W, C) uint8, as ADM's evaluator reads it, with `labels` and `seeds`."""
    buffer = io.BytesIO()
    stacked = np.stack([np.asarray(image.content) for image in images])
    labels = np.array([image.label for image in images], np.int64)
    np.savez(buffer, arr_0=stacked, labels=labels, seeds=np.array([image.seed for image in images], np.int64))
    return buffer.getvalue()


def _unpack_npz(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    arrays = read_arrays(file, ("arr_0", "seeds"), MOST_ARCHIVE_BYTES)
    images, stored = arrays["arr_0"], arrays["seeds"].tolist()
    wanted = set(seeds)
    return {seed: image for seed, image in zip(stored, images, strict=True) if seed in wanted}


def join_npz(folder: Folder, entries: Iterable[ManifestEntry], count: int, name: str) -> None:
    """Join all shards into one `.npz`, for evaluators that read one file. It holds one shard in memory at a time.

    Args:
        folder: the folder of the shards, which gets the file.
        entries: the lines of the manifest, in order; iterated several times.
        count: the number of lines.
        name: the name of the file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                for number, (file, _) in enumerate(groupby(entries, key=lambda entry: entry.file)):
                    with folder.open(file) as opened:
                        images = read_arrays(opened, ("arr_0",), MOST_ARCHIVE_BYTES)["arr_0"]
                    if number == 0:
                        header = np.lib.format.header_data_from_array_1_0(images)
                        header["shape"] = (count, *images.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(images.tobytes())
            for key in ("label", "seed"):
                with archive.open(zipfile.ZipInfo(f"{key}s.npy"), "w", force_zip64=True) as member:
                    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
                    np.lib.format.write_array_header_1_0(member, header)
                    lines = iter(entries)
                    while values := [entry[key] for entry in islice(lines, VALUES_AT_ONCE)]:
                        member.write(np.array(values, "<i8").tobytes())
        folder.put(path, name)


FORMATS = {
    "png": Format(".png", png_bytes, None, _unpack_png),
    "zip": Format(".zip", png_bytes, _pack_zip, _unpack_zip),
    "webdataset": Format(".tar", png_bytes, _pack_tar, _unpack_tar),
    "parquet": Format(".parquet", png_bytes, _pack_parquet, _unpack_parquet),
    "npz": Format(".npz", _pixels_last, _pack_npz, _unpack_npz),
}
