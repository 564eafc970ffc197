"""Raw listing: the images of MNIST's idx files and of CIFAR's archives, which are pixels without an image format.

CIFAR-10 and CIFAR-100 come as pickled batches for Python and as binary files, in a `.tar.gz` or unpacked.
"""

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.dataset.cifar_batches import CIFAR_SHAPE, MOST_CIFAR_BYTES, read_cifar_batch, read_cifar_names
from patchloom.platform.dataset.image_names import is_hidden, is_image
from patchloom.platform.dataset.labels import Label, Labels, label_of
from patchloom.platform.dataset.listed import ListedInput, Listing
from patchloom.platform.dataset.readers import TAR_ENDINGS, Place, plain_file
from patchloom.platform.dataset.splits import Splits, split_named
from patchloom.platform.dataset.tar_headers import tar_headers
from patchloom.platform.dataset.tar_listing import buffered_tar
from patchloom.platform.files.bounds import check_image_bytes, reading_damaged
from patchloom.platform.files.folder import Folder

IDX_BYTES, IDX_HEADER_BYTES, IDX_LABEL_HEADER_BYTES = b"\0\0\x08", 16, 8  # unsigned bytes; then the number of axes
IDX_IMAGES = re.compile(r"(?:(.*)[-_.])?images[-_.]idx3-ubyte", re.IGNORECASE)
CIFAR_10_BATCH, CIFAR_100_BATCHES = re.compile(r"data_batch_[0-9]+|test_batch"), ("train", "test")
CIFAR_100_NAMES = {"": "meta", ".bin": "fine_label_names.txt"}  # by the ending of the batches
CIFAR_10_NAMES = {"": "batches.meta", ".bin": "batches.meta.txt"}
CIFAR_FILE = re.compile(
    r"(data_batch_[0-9]+|(test|train)(_batch)?)(\.bin)?|(batches\.)?meta(\.txt)?|fine_label_names\.txt"
)
MOST_CIFAR_FILES = 64  # in an archive
MOST_NAMES_BYTES = 1 << 20
LABEL_BLOCK_BYTES = 1 << 16
RECORDS_AT_ONCE = 1024


def list_idx(folder: Folder, names: dict[str, int]) -> Listing:
    """The images of idx files, with the labels in the files next to them."""
    files = {name.removesuffix(".gz"): name for name in sorted(names, reverse=True)}  # the unpacked one of two
    parts = {name: _idx_part(name) for name in sorted(files.values())}
    listing = Listing()
    if len(parts) > 1:  # otherwise the file was meant, whatever it is named
        bases = {part.rpartition("/")[2] for part in parts.values()}
        listing.splits = Splits({base: split_named(re.split(r"[-_.]", base)[-1]) for base in bases}, default="train")
    listing.inputs = itertools.chain.from_iterable(
        _idx_rows(folder, name, f"{part}/" if len(parts) > 1 else "") for name, part in parts.items()
    )
    return listing


def _idx_part(name: str) -> str:
    """`train` of `train-images-idx3-ubyte.gz`."""
    parent, slash, base = name.removesuffix(".gz").rpartition("/")
    found = IDX_IMAGES.fullmatch(base)
    return parent + slash + (found[1] or base if found else base)


def _idx_rows(folder: Folder, name: str, prefix: str) -> Iterator[ListedInput]:
    with reading_damaged(f"{folder}/{name}", "a complete idx file of images"), plain_file(folder, name) as file:
        count, height, width = _idx_lengths(file, 3)
        check_image_bytes(height * width)
    labels = _idx_labels(folder, name, count)
    digits = len(str(max(count - 1, 0)))
    for row in range(count):
        first = IDX_HEADER_BYTES + row * height * width
        place: Place = [name, first, height * width, height, width]
        yield ListedInput(f"{prefix}{row:0{digits}d}", place, height * width, next(labels, None))


def _idx_lengths(file: BinaryIO, axes: int) -> list[int]:
    """The lengths of the axes of an idx file; raises ValueError if its header or size is wrong."""
    header = file.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes or header[:4] != IDX_BYTES + bytes([axes]):
        raise ValueError(f"it has no header of unsigned bytes with {axes} axes")
    lengths = [int.from_bytes(header[4 * axis : 4 * axis + 4], "big") for axis in range(1, axes + 1)]
    found = file.seek(0, io.SEEK_END) - len(header)
    if math.prod(lengths) != found or not all(lengths):
        raise ValueError(f"{' x '.join(map(str, lengths))} bytes are announced, and {found:,} follow")
    return lengths


def _idx_labels(folder: Folder, images: str, count: int) -> Iterator[int]:
    """The labels in the file next to a file of images; none if there is no such file."""
    parent, slash, base = images.removesuffix(".gz").rpartition("/")
    wanted = parent + slash + base.replace("images", "labels").replace("idx3", "idx1")
    name = next((name for name in (wanted, f"{wanted}.gz") if name != images and folder.has(name)), None)
    if name is None:
        return
    with reading_damaged(f"{folder}/{name}", "a complete idx file of labels"), plain_file(folder, name) as file:
        (labels,) = _idx_lengths(file, 1)
        if labels != count:
            raise UserError(
                f"{folder}/{name} has {labels:,} labels, and {images} {count:,} images: download both again"
            )
        file.seek(IDX_LABEL_HEADER_BYTES)
        while block := file.read(LABEL_BLOCK_BYTES):
            yield from block


@dataclass(frozen=True)
class _CifarPart:
    """A file of CIFAR: its name, where it is if it is in a tar, and its size in bytes."""

    name: str
    file: str
    first_byte: int
    size_bytes: int

    @property
    def stem(self) -> str:
        """The name of a batch: `data_batch_1`."""
        return self.name.rpartition("/")[2].removesuffix(".bin")

    def place(self, *rest: int) -> Place:
        """The place of the part, or of something in it."""
        return [self.file, self.first_byte, self.size_bytes, *rest]


def cifar_batches(names: Iterable[str]) -> list[str]:
    """Which of these files are the batches of CIFAR-10 or CIFAR-100, sorted; empty if there are none."""
    known, found = set(names), list[str]()
    for name in sorted(known):
        parent, slash, base = name.rpartition("/")
        ending = ".bin" if base.endswith(".bin") else ""
        stem = base.removesuffix(ending)
        is_100 = stem in CIFAR_100_BATCHES and parent + slash + CIFAR_100_NAMES[ending] in known
        if is_100 or CIFAR_10_BATCH.fullmatch(stem):
            found.append(name)
    return found


def list_cifar(folder: Folder, names: dict[str, int]) -> Listing:
    """The images of CIFAR-10 or CIFAR-100, in an archive or in files."""
    first = next(iter(names))
    if first.lower().endswith(TAR_ENDINGS):
        parts = {part.name: part for part in _parts_of_tar(folder, first)}
    else:
        parts = {name: _CifarPart(name, name, 0, folder.size(name)) for name in names}
    batches = [parts[name] for name in cifar_batches(parts)]
    places = sorted({part.name.rpartition("/")[0] for part in batches})
    if len(places) > 1:
        raise UserError(f"{folder} contains CIFAR more than once, in {', '.join(places)}: give one of them")
    class_names = _cifar_names(folder, parts, batches[0])
    listing = Listing(labels=Labels(first, class_names=class_names) if class_names else None)
    listing.splits = Splits({part.stem: split_named(part.stem) for part in batches}, default="train")
    listing.inputs = itertools.chain.from_iterable(_cifar_rows(folder, part) for part in batches)
    return listing


def is_cifar_archive(folder: Folder, tar: str) -> bool:
    """Whether a tar contains batches of CIFAR, and no image or tar among its first members."""
    names = list[str]()
    with reading_damaged(f"{folder}/{tar}", "a complete tar file"), buffered_tar(folder, tar) as file:
        for member in itertools.islice(tar_headers(file), MOST_CIFAR_FILES):
            if is_image(member.name) or member.name.lower().endswith(TAR_ENDINGS):
                return False
            names.append(member.name.removeprefix("./"))
    return bool(cifar_batches(names))


def _parts_of_tar(folder: Folder, tar: str) -> Iterator[_CifarPart]:
    with reading_damaged(f"{folder}/{tar}", "a complete tar file"), buffered_tar(folder, tar) as file:
        for member in itertools.islice(tar_headers(file), MOST_CIFAR_FILES):
            if not is_hidden(member.name):
                yield _CifarPart(member.name.removeprefix("./"), tar, member.first_byte, member.size_bytes)


def _cifar_names(folder: Folder, parts: dict[str, _CifarPart], batch: _CifarPart) -> list[str]:
    """The names of the classes; empty if they are not there."""
    known = CIFAR_100_NAMES if batch.stem in CIFAR_100_BATCHES else CIFAR_10_NAMES
    parent, slash, base = batch.name.rpartition("/")
    ending = ".bin" if base.endswith(".bin") else ""
    part = parts.get(parent + slash + known[ending])
    if part is None:
        return []
    with reading_damaged(f"{folder}/{part.file}: {part.name}", "a list of the classes of CIFAR"):
        content = _part_bytes(folder, part, MOST_NAMES_BYTES)
        return content.decode().split() if ending else read_cifar_names(content)


def _part_bytes(folder: Folder, part: _CifarPart, most_bytes: int) -> bytes:
    """The content of a part; raises ValueError if it is too large or incomplete."""
    if part.size_bytes > most_bytes:
        raise ValueError(f"has {part.size_bytes:,} bytes, and at most {most_bytes:,} are read")
    with plain_file(folder, part.file) as file:
        return folder.read_from(file, part.first_byte, part.size_bytes)


def _cifar_rows(folder: Folder, part: _CifarPart) -> Iterator[ListedInput]:
    """The images of a batch. Those of a binary one have a place of their own, the others a row in the batch."""
    size = math.prod(CIFAR_SHAPE)
    with reading_damaged(f"{folder}/{part.file}: {part.name}", "a batch of CIFAR"):
        is_binary = part.name.endswith(".bin")
        found = _binary_rows(folder, part) if is_binary else _pickled_rows(folder, part)
        for row, (place, label) in enumerate(found):
            yield ListedInput(f"{part.stem}/{row:05d}", place, size, label_of(label, f"row {row} of {part.name}"))


def _pickled_rows(folder: Folder, part: _CifarPart) -> Iterator[tuple[Place, Any]]:
    batch = read_cifar_batch(_part_bytes(folder, part, MOST_CIFAR_BYTES))
    labels = batch.labels if batch.labels is not None else itertools.repeat(None)
    for row, label in zip(range(len(batch.images)), labels, strict=False):
        yield part.place(row), label


def _binary_rows(folder: Folder, part: _CifarPart) -> Iterator[tuple[Place, Label]]:
    """Each record is the label, for CIFAR-100 the coarse and the fine one, and then the pixels."""
    size, labels = math.prod(CIFAR_SHAPE), 2 if part.stem in CIFAR_100_BATCHES else 1
    record = labels + size
    count, rest = divmod(part.size_bytes, record)
    if rest or not count:
        raise ValueError(f"{part.size_bytes:,} bytes are not images of {record:,} bytes each")
    with plain_file(folder, part.file) as file:
        for start in range(0, count, RECORDS_AT_ONCE):
            rows = range(start, min(count, start + RECORDS_AT_ONCE))
            block = folder.read_from(file, part.first_byte + start * record, len(rows) * record)
            values = np.frombuffer(block, np.uint8).reshape(-1, record)[:, labels - 1]
            for row, label in zip(rows, values.tolist(), strict=True):
                first = part.first_byte + row * record + labels
                yield [part.file, first, size, *CIFAR_SHAPE], label
