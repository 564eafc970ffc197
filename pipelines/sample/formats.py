"""Formats: what sampled images are kept in: a PNG file each, or shards of them as zip, WebDataset, Parquet or .npz."""

import hashlib
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.pipelines.pages.pictures import png_bytes, png_pixels
from patchloom.platform.files.folder import Folder

Content = bytes | np.ndarray  # the bytes of a PNG, or the (H, W, C) uint8 pixels themselves: what a sha256 is of
DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, tarfile.TarError, pa.ArrowException)


@dataclass(frozen=True)
class Picture:
    """A sampled image as its format keeps it."""

    seed: int
    label: int
    content: Content


@dataclass(frozen=True)
class Format:
    """One way to keep images. An archive holds the seeds of one shard, in their order, and is written whole."""

    ending: str
    encode: Callable[[np.ndarray], Content]  # of a (C, H, W) uint8 image
    pack: Callable[[list[Picture]], bytes] | None  # None: every image is a file of its own
    unpack: Callable[[BinaryIO, Collection[int]], dict[int, Content]]  # of these seeds, those that are there

    def file_of(self, seed: int, shard_size: int) -> str:
        """`000000/000042.png`, a folder a thousand, or the archive of the seed's shard, `000000.zip`."""
        if self.pack is None:
            return f"{seed // 1000:06d}/{seed:06d}{self.ending}"
        return f"{seed // shard_size:06d}{self.ending}"


def digest(content: Content) -> str:
    """The sha256 of a PNG's bytes, or of the pixels, row by row."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()


def pixels(content: Content) -> np.ndarray:
    """(C, H, W) uint8 of a kept image."""
    return png_pixels(content) if isinstance(content, bytes) else content.transpose(2, 0, 1)


def read_contents(folder: Folder, entries: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Content | None]]:
    """Manifest lines with what they vouch for; None where it is missing or was changed.

    Lines of one file should stand together, since each file is opened once for those that do.
    """
    for file, lines in groupby(entries, key=lambda entry: str(entry["file"])):
        wanted = list(lines)
        try:
            with folder.open(file) as opened:
                found = format_of(file).unpack(opened, {int(entry["seed"]) for entry in wanted})
        except DAMAGED:
            found = {}
        for entry in wanted:
            content = found.get(int(entry["seed"]))
            yield entry, content if content is not None and digest(content) == entry["sha256"] else None


def format_of(file: str) -> Format:
    """The format of a file of images, by its ending."""
    return next(format for format in FORMATS.values() if file.endswith(format.ending))


def choose_format(name: str) -> Format:
    """A format by its name; raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"--format {name} is unknown: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _pixels_last(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _unpack_png(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    content = file.read()
    return dict.fromkeys(seeds, content)


def _member(seed: int, ending: str = ".png") -> str:
    return f"{seed:06d}{ending}"


def _pack_zip(pictures: list[Picture]) -> bytes:
    """PNG files and `dataset.json` with their labels, as EDM's tools and `patchloom prepare` read them."""
    labels = [[_member(picture.seed), picture.label] for picture in pictures]
    is_labelled = any(picture.label >= 0 for picture in pictures)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for picture in pictures:
            archive.writestr(
                zipfile.ZipInfo(_member(picture.seed)), bytes(picture.content)
            )  # of 1980: no clock in the bytes
        card = json.dumps({"labels": labels if is_labelled else None})
        archive.writestr(zipfile.ZipInfo("dataset.json"), card)
    return buffer.getvalue()


def _unpack_zip(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    with zipfile.ZipFile(file) as archive:
        there = set(archive.namelist())
        return {seed: archive.read(_member(seed)) for seed in seeds if _member(seed) in there}


def _pack_tar(pictures: list[Picture]) -> bytes:
    """A shard of WebDataset: `000042.png` and, where it has a class, `000042.cls`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for picture in pictures:
            parts = {".png": bytes(picture.content)}
            if picture.label >= 0:
                parts[".cls"] = str(picture.label).encode()
            for ending, content in parts.items():
                member = tarfile.TarInfo(_member(picture.seed, ending))
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
                found[names[member.name]] = content.read()
    return found


def _pack_parquet(pictures: list[Picture]) -> bytes:
    """Columns seed, label and image, the struct of bytes and path that Hugging Face's `datasets` keeps images in."""
    image = [{"bytes": picture.content, "path": _member(picture.seed)} for picture in pictures]
    table = pa.table({
        "seed": pa.array([picture.seed for picture in pictures], pa.int64()),
        "label": pa.array([picture.label for picture in pictures], pa.int32()),
        "image": pa.array(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    })  # fmt: skip
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="none")  # PNG files do not get smaller
    return buffer.getvalue()


def _unpack_parquet(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    table = pyarrow.parquet.read_table(pa.BufferReader(file.read()), columns=["seed", "image"])
    rows = zip(table["seed"].to_pylist(), table["image"], strict=True)
    wanted = set(seeds)
    return {seed: image["bytes"].as_py() for seed, image in rows if seed in wanted}


def _pack_npz(pictures: list[Picture]) -> bytes:
    """`arr_0` (N, H, W, C) uint8, as ADM's evaluator reads it, beside `labels` and `seeds`."""
    buffer = io.BytesIO()
    images = np.stack([np.asarray(picture.content) for picture in pictures])
    labels = np.array([picture.label for picture in pictures], np.int64)
    np.savez(buffer, arr_0=images, labels=labels, seeds=np.array([picture.seed for picture in pictures], np.int64))
    return buffer.getvalue()


def _unpack_npz(file: BinaryIO, seeds: Collection[int]) -> dict[int, Content]:
    with np.load(file, allow_pickle=False) as arrays:
        images, there = arrays["arr_0"], arrays["seeds"].tolist()
    wanted = set(seeds)
    return {seed: image for seed, image in zip(there, images, strict=True) if seed in wanted}


def join_npz(folder: Folder, entries: list[dict[str, Any]], name: str) -> None:
    """All shards as one `.npz` of the same arrays, for evaluators that read one file; one shard at a time in memory."""
    columns = {key: np.array([entry[key] for entry in entries], np.int64) for key in ("label", "seed")}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                for number, file in enumerate(dict.fromkeys(entry["file"] for entry in entries)):
                    with folder.open(file) as opened, np.load(opened, allow_pickle=False) as arrays:
                        images = arrays["arr_0"]
                    if number == 0:
                        header = np.lib.format.header_data_from_array_1_0(images)
                        header["shape"] = (len(entries), *images.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(images.tobytes())
            for key, values in columns.items():
                with archive.open(zipfile.ZipInfo(f"{key}s.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        folder.put(path, name)


FORMATS = {
    "png": Format(".png", png_bytes, None, _unpack_png),
    "zip": Format(".zip", png_bytes, _pack_zip, _unpack_zip),
    "webdataset": Format(".tar", png_bytes, _pack_tar, _unpack_tar),
    "parquet": Format(".parquet", png_bytes, _pack_parquet, _unpack_parquet),
    "npz": Format(".npz", _pixels_last, _pack_npz, _unpack_npz),
}
