"""Image sets: images to compare, in any container, as ranges of rows that any worker can read."""

import hashlib
import io
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.pipelines.prepare.images import decode, is_grey
from patchloom.pipelines.sample.folder import (
    MANIFEST,
    SAMPLING_CARD,
    parse_entries,
    read_samples,
    read_sampling_card,
)
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.image_names import is_hidden, is_image
from patchloom.platform.dataset.label_files import opened_here
from patchloom.platform.dataset.prepared import CARD as DATASET_CARD
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.dataset.readers import npz_images
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool
from patchloom.platform.files.storage import file_sha256, local_path
from patchloom.platform.records.samples import ManifestEntry

NOT_SAMPLES = {"run.json": "run", "search.json": "search", "model.json": "model"}  # what a folder with this file is
RANGE_ROWS = 128  # about a minute of Inception on a CPU core


@dataclass(frozen=True)
class RowRange:
    """A range of rows of an image set, with the sha256 of its images. Equal sha256s have equal features."""

    sha256: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.stop - self.start


class RowRanges(Sequence[RowRange]):
    """The ranges of rows of an image set, made when they are needed.

    Args:
        starts: (R + 1,) int64, where each range begins, and the number of rows.
        sha256_of: the sha256 of the images of a range, by its number.
    """

    def __init__(self, starts: np.ndarray, sha256_of: Callable[[int], str]) -> None:
        self.starts, self.sha256_of = starts, sha256_of

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, number: int) -> RowRange: ...

    @overload
    def __getitem__(self, number: slice) -> list[RowRange]: ...

    def __getitem__(self, number: int | slice) -> RowRange | list[RowRange]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        at = range(len(self))[number]
        return RowRange(self.sha256_of(at), int(self.starts[at]), int(self.starts[at + 1]))

    @property
    def fingerprint(self) -> str:
        """The sha256 of all images in their order."""
        digest = hashlib.sha256()
        for number in range(len(self)):
            digest.update(f"{chr(10) * (number > 0)}{self.sha256_of(number)}".encode())
        return digest.hexdigest()


class ImageSet(ABC):
    """Images of one size, in a fixed order. `kind` and `details` are part of a result.

    There may be many millions of images, so a set keeps no Python object per image.
    """

    kind: str
    address: str  # `open_images` opens the same set on any node
    size: tuple[int, int, int]  # channels, height, width
    skipped: tuple[str, ...] = ()  # names of files that cannot be read

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @property
    @abstractmethod
    def ranges(self) -> RowRanges:
        """The ranges of rows, whose features are computed together."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of all images in their order."""
        return self.ranges.fingerprint

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as (N, C, H, W) uint8; raises UserError if an image is damaged or has another size."""

    def name_of(self, row: int) -> str:
        """How a person finds the image of a row."""
        return "an image"

    @property
    def details(self) -> dict[str, Any]:
        """What else a result depends on: the transform of a dataset, the options of samples."""
        return {}

    @property
    def features_folder(self) -> Folder | None:
        """Where the features may be kept, if the images are in a folder of Patchloom."""
        return None

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Single rows as (N, C, H, W) uint8."""
        return np.concatenate([self.read(int(row), int(row) + 1) for row in rows])


class SampleImages(ImageSet):
    """Images of `patchloom sample`, verified against their manifest.

    Of the manifest, only the places of every `RANGE_ROWS`th line are in memory, and what is read of it.
    """

    kind = "samples"

    def __init__(self, folder: Folder) -> None:
        self.address, self.folder = folder.address, folder
        self.sampling = read_sampling_card(folder)
        self._lines = opened_here(folder, MANIFEST) if folder.has(MANIFEST) else io.BytesIO()
        self._places, self._rows = _places_of_lines(self._lines)
        self.size = self.read(0, 1).shape[1:] if self._rows else (0, 0, 0)

    def __len__(self) -> int:
        return self._rows

    def entries(self, start: int, stop: int) -> list[ManifestEntry]:
        """The lines of the manifest of some rows."""
        first = start // RANGE_ROWS
        self._lines.seek(self._places[first])
        lines = islice(self._lines, start - first * RANGE_ROWS, stop - first * RANGE_ROWS)
        return list(parse_entries(lines, f"{self.folder}/{MANIFEST}", start + 1))

    def seeds(self) -> Iterator[int]:
        """The seeds in the order of the rows."""
        for start in range(0, self._rows, RANGE_ROWS):
            for entry in self.entries(start, min(start + RANGE_ROWS, self._rows)):
                yield entry.seed

    @cached_property
    def ranges(self) -> RowRanges:
        """Ranges of `RANGE_ROWS` images; the sha256 of one is that of the checksums in the manifest."""
        starts = _starts(self._rows)
        digests = bytearray()
        for start, stop in pairwise(starts.tolist()):
            digests += hashlib.sha256("\n".join(entry.sha256 for entry in self.entries(start, stop)).encode()).digest()
        return _known_ranges(starts, digests)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of their seeds."""
        return read_samples(self.folder, self.entries(start, stop))

    def name_of(self, row: int) -> str:
        """The seed of the image."""
        return f"seed {self.entries(row, row + 1)[0].seed}"

    @property
    def details(self) -> dict[str, Any]:
        """The options of sampling, and the model."""
        return {
            key: value
            for key, value in self.sampling.to_dict().items()
            if key not in ("format_version", "kind", "lineage")
        }

    @property
    def features_folder(self) -> Folder:
        """`.features` in the folder of samples."""
        return self.folder.folder(".features")


class DatasetImages(ImageSet):
    """A prepared dataset: its pixels, or the decoded means of its latents."""

    def __init__(self, address: str) -> None:
        self.dataset = open_dataset(address)
        card = self.dataset.card
        self.address, self._fingerprint = self.dataset.address, self.dataset.fingerprint
        self.kind = "pixels" if self.dataset.kind == "pixels" else "reconstructions"
        if card["mirror"]:
            raise UserError(f"{address} contains mirror images: use latents that were prepared without --mirror")
        self._autoencoder: Any = None
        self._device = own_device()
        side = card["resolution"] * (card["autoencoder"]["downscale"] if card["autoencoder"] else 1)
        self.size = (3 if card["autoencoder"] else card["channels"], side, side)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        """That of the dataset."""
        return self._fingerprint

    @cached_property
    def ranges(self) -> RowRanges:
        """Ranges of up to `RANGE_ROWS` rows of one shard; the sha256 of one is that of the shard and the rows."""
        shards = self.dataset.shards
        counts = -(-shards.rows // RANGE_ROWS)  # ranges of each shard
        before = np.concatenate([[0], np.cumsum(counts)])
        in_shard = np.arange(before[-1]) - np.repeat(before[:-1], counts)
        firsts = np.repeat(np.cumsum(shards.rows) - shards.rows, counts) + RANGE_ROWS * in_shard

        def sha256_of(number: int) -> str:
            shard = int(np.searchsorted(before, number, side="right")) - 1
            first = RANGE_ROWS * int(in_shard[number])
            last = min(first + RANGE_ROWS, int(shards.rows[shard]))
            return _sha256(shards.sha256_of(shard), f"{first}-{last}")

        return RowRanges(np.append(firsts, len(self.dataset)), sha256_of)

    def name_of(self, row: int) -> str:
        """The key of the row."""
        return self.keys(row, row + 1)[0]

    def keys(self, start: int, stop: int) -> list[str]:
        """The keys of rows."""
        return list(self.dataset.rows(range(start, stop), ["key"])["key"])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of the dataset. Latents are decoded."""
        rows = self.dataset.rows(range(start, stop))
        self.dataset.forget_before(stop)
        if self.kind == "pixels":
            return rows["image"]
        if self._autoencoder is None:
            from patchloom.models.autoencoder import load_autoencoder

            self._autoencoder = load_autoencoder(self.dataset.path / "autoencoder", self._device)
        means = torch.from_numpy(rows["mean"]).float().split(16)
        return np.concatenate([self._autoencoder.decode(batch.to(self._device)).cpu().numpy() for batch in means])

    @property
    def details(self) -> dict[str, Any]:
        """The transform of the images, and the autoencoder of latents."""
        card = self.dataset.card
        return {
            "transform": card.transform.to_dict() if card.transform else None,
            "autoencoder": card.autoencoder.weights_sha256 if card.autoencoder else None,
        }

    @property
    def features_folder(self) -> Folder:
        """`.features` in the folder of the dataset."""
        return Folder(self.address).folder(".features")


class ArrayImages(ImageSet):
    """The images of an `.npz`: `arr_0` (ADM's) or `images`, (N, H, W, C) uint8."""

    kind = "npz"

    def __init__(self, address: str) -> None:
        self.address = address
        self.images = npz_images(*Folder.of_file(address))
        self.size = self.read(0, 1).shape[1:] if len(self.images) else (0, 0, 0)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the file."""
        return sha256_at(self.address)

    @cached_property
    def ranges(self) -> RowRanges:
        """Ranges of `RANGE_ROWS` images; the sha256 of one is that of the file and its first row."""
        return RowRanges(_starts(len(self)), lambda number: _sha256(self.fingerprint, str(RANGE_ROWS * number)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of the array."""
        images = self.images[start:stop]
        return np.ascontiguousarray((images[..., None] if images.ndim == 3 else images).transpose(0, 3, 1, 2))


class PngImages(ImageSet):
    """A folder of PNG files, in the order of their names, decoded as `patchloom prepare` does."""

    kind = "pictures"

    def __init__(self, folder: Path, names: Iterable[str], skipped: tuple[str, ...] | None) -> None:
        self.address, self.folder = str(folder), folder
        self._names, unreadable = RowSpool(), list(skipped or ())
        left_out = frozenset(unreadable)
        for name in names:
            if skipped is None and not self._can_be_read(name):
                unreadable.append(name)
            elif name not in left_out:
                self._names.append((name,))
        self.skipped = tuple(unreadable)
        self.size = self._decoded(self._names[0][0]).shape if len(self._names) else (0, 0, 0)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def ranges(self) -> RowRanges:
        """Ranges of `RANGE_ROWS` files; the sha256 of one is that of the checksums of the files."""
        digests, names = bytearray(), (name for (name,) in self._names)
        while batch := list(islice(names, RANGE_ROWS)):
            digests += hashlib.sha256("\n".join(file_sha256(self.folder / name) for name in batch).encode()).digest()
        return _known_ranges(_starts(len(self)), digests)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all files in their order."""
        return self.ranges.fingerprint

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of the file names."""
        names = [self.name_of(row) for row in range(start, stop)]
        images = [self._decoded(name) for name in names]
        for name, image in zip(names, images, strict=True):
            if image.shape != self.size:
                found, wanted = _size_text(image.shape), _size_text(self.size)
                raise UserError(
                    f"{self.folder / name} has {found}, and {self.name_of(0)} has {wanted}: all images need one size "
                    "and one number of channels"
                )
        return np.stack(images)

    def name_of(self, row: int) -> str:
        """The name of the file, relative to the folder."""
        name: str = self._names[row][0]
        return name

    def _can_be_read(self, name: str) -> bool:
        try:
            self._decoded(name)
        except UserError:
            return False
        return True

    def _decoded(self, name: str) -> Any:
        """(C, H, W) uint8, one channel for grey."""
        try:
            content = (self.folder / name).read_bytes()
            pixels = np.asarray(decode(content, 1 if is_grey(content) else 3))
        except Exception as error:  # Pillow raises many types
            raise UserError(f"{self.folder / name} cannot be read ({error}): remove or replace it") from None
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size_text(size: tuple[int, ...]) -> str:
    """`32x32 pixels in 3 channels`, width first."""
    return f"{size[2]}x{size[1]} pixels in {size[0]} channel{'s' * (size[0] != 1)}"


def open_images(address: str, skipped: tuple[str, ...] | None = None) -> ImageSet:
    """Open samples, a prepared dataset, an `.npz`, or a folder of PNG files.

    Args:
        address: where the images are.
        skipped: names of files in a folder to leave out. None: those that cannot be read, which reads every file.

    Raises:
        UserError: the address contains something else. JPEG files are refused: compression would change the metrics.
    """
    if address.endswith(".npz"):
        return ArrayImages(address)
    folder = Folder.at(address)
    if folder.has(DATASET_CARD):
        return DatasetImages(address)
    if folder.has(SAMPLING_CARD):
        return SampleImages(folder)
    path = local_path(address)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a folder of `patchloom sample`, a prepared dataset or an .npz")
    for card, what in NOT_SAMPLES.items():
        if (path / card).is_file():
            raise UserError(f"{path} is a {what}, not samples: make samples with `patchloom sample MODEL FOLDER` first")
    names = RowSpool()
    lossy, first_lossy = 0, ""
    for name, _ in Folder.at(address).walk(follow_links=True):
        if is_image(name) and not is_hidden(name):
            names.append((name,))
            if not name.lower().endswith(".png"):
                lossy, first_lossy = lossy + 1, first_lossy or name.rpartition("/")[2]
    if lossy:
        raise UserError(
            f"{path} contains {lossy:,} files such as {first_lossy}, whose lossy compression would change the "
            "metrics: give PNG files, or use `patchloom prepare` for real images"
        )
    if not len(names):
        raise UserError(f"{path} contains no samples: give a folder of samples, a prepared dataset or an .npz")
    return PngImages(path, (name for (name,) in names), skipped)


def check_pair(samples: ImageSet, reference: ImageSet | None) -> None:
    """Raise UserError if two sets cannot be compared. A reference may be None: only its statistics are known."""
    for images in filter(None, (samples, reference)):
        if len(images) < 2:
            count = "1 image" if len(images) == 1 else "no images"
            raise UserError(f"{images.address} contains {count}; a distance needs at least 2: sample more seeds")
        if images.size[0] not in (1, 3):
            raise UserError(f"{images.address} has {images.size[0]} channels, not 1 (grey) or 3 (RGB)")
    if reference is None:
        return
    if samples.size[1:] != reference.size[1:]:
        found, wanted = (f"{width}x{height}" for _, height, width in (samples.size, reference.size))
        raise UserError(f"the samples are {found} and the reference is {wanted}: give a reference of the same size")
    fewest = min(samples, reference, key=lambda images: images.size[0])
    if samples.size[0] != reference.size[0] and fewest.kind != PngImages.kind:  # grey files may be anything in grey
        found, wanted = (f"{images.address} has {images.size[0]}" for images in (samples, reference))
        raise UserError(f"{found} and {wanted} channels: prepare the reference with the --channels of the samples")


def _starts(rows: int) -> np.ndarray:
    """Where ranges of `RANGE_ROWS` rows begin, and the number of rows."""
    return np.append(np.arange(0, rows, RANGE_ROWS), rows)


def _known_ranges(starts: np.ndarray, digests: bytearray) -> RowRanges:
    """Ranges whose sha256s, of 32 bytes each, are known."""
    return RowRanges(starts, lambda number: digests[32 * number : 32 * number + 32].hex())


def _places_of_lines(file: BinaryIO) -> tuple[np.ndarray, int]:
    """Where every `RANGE_ROWS`th line of a file begins, int64, and the number of lines."""
    places, lines, place = array("q"), 0, 0
    for line in file:
        if lines % RANGE_ROWS == 0:
            places.append(place)
        lines, place = lines + 1, place + len(line)
    return np.array(places, np.int64), lines


def sha256_at(address: str) -> str:
    """The sha256 of a local or remote file."""
    folder, name = Folder.of_file(address)
    digest = hashlib.sha256()
    with folder.open(name) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
