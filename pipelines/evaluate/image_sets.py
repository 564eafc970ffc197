"""Image sets: images to compare, in any container, as ranges of rows that any worker can read."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.pipelines.prepare.images import decode, is_grey
from patchloom.pipelines.sample.folder import SAMPLING_CARD, read_entries, read_samples, read_sampling_card
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.listing import is_hidden, is_image
from patchloom.platform.dataset.prepared import CARD as DATASET_CARD
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.dataset.readers import npz_images
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import file_sha256, local_path

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


class ImageSet(ABC):
    """Images of one size, in a fixed order. `kind` and `details` are part of a result."""

    kind: str
    address: str  # `open_images` opens the same set on any node
    ranges: list[RowRange]
    fingerprint: str  # of all images in their order
    size: tuple[int, int, int]  # channels, height, width
    skipped: tuple[str, ...] = ()  # names of files that cannot be read

    def __len__(self) -> int:
        return self.ranges[-1].stop if self.ranges else 0

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as (N, C, H, W) uint8; raises UserError if an image is damaged or has another size."""

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
    """Images of `patchloom sample`, verified against their manifest."""

    kind = "samples"

    def __init__(self, folder: Folder) -> None:
        self.address, self.folder = folder.address, folder
        self.entries = read_entries(folder)
        self.sampling = read_sampling_card(folder)
        self.ranges = _ranges([entry.sha256 for entry in self.entries])
        self.fingerprint = _sha256(*(rows.sha256 for rows in self.ranges))
        self.size = self.read(0, 1).shape[1:] if self.entries else (0, 0, 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of their seeds."""
        return read_samples(self.folder, self.entries[start:stop])

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
        self.address, self.fingerprint = self.dataset.address, self.dataset.fingerprint
        self.kind = "pixels" if self.dataset.kind == "pixels" else "reconstructions"
        if card["mirror"]:
            raise UserError(f"{address} contains mirror images: use latents that were prepared without --mirror")
        self._autoencoder: Any = None
        self._device = own_device()
        start, self.ranges = 0, []
        for number, rows in enumerate(self.dataset.shards.rows.tolist()):
            sha256 = self.dataset.shards.sha256_of(number)
            for first in range(0, rows, RANGE_ROWS):
                last = min(first + RANGE_ROWS, rows)
                self.ranges.append(RowRange(_sha256(sha256, f"{first}-{last}"), start + first, start + last))
            start += rows
        side = card["resolution"] * (card["autoencoder"]["downscale"] if card["autoencoder"] else 1)
        self.size = (3 if card["autoencoder"] else card["channels"], side, side)

    def keys(self, start: int, stop: int) -> list[str]:
        """The keys of rows."""
        return list(self.dataset.rows(range(start, stop), ["key"])["key"])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of the dataset. Latents are decoded."""
        rows = self.dataset.rows(range(start, stop))
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
        sha256 = sha256_at(address)
        self.ranges = [
            RowRange(_sha256(sha256, str(start)), start, min(start + RANGE_ROWS, len(self.images)))
            for start in range(0, len(self.images), RANGE_ROWS)
        ]
        self.fingerprint = sha256
        self.size = self.read(0, 1).shape[1:] if len(self.images) else (0, 0, 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of the array."""
        images = self.images[start:stop]
        return np.ascontiguousarray((images[..., None] if images.ndim == 3 else images).transpose(0, 3, 1, 2))


class PngImages(ImageSet):
    """A folder of PNG files, in the order of their names, decoded as `patchloom prepare` does."""

    kind = "pictures"

    def __init__(self, folder: Path, files: list[Path], skipped: tuple[str, ...] | None) -> None:
        self.address, self.folder = str(folder), folder
        names = [file.relative_to(folder).as_posix() for file in files]
        self.skipped = tuple(name for name in names if not self._can_be_read(name)) if skipped is None else skipped
        self.names = [name for name in names if name not in self.skipped]
        self.ranges = _ranges([file_sha256(folder / name) for name in self.names])
        self.fingerprint = _sha256(*(rows.sha256 for rows in self.ranges))
        self.size = self._decoded(self.names[0]).shape if self.names else (0, 0, 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the order of the file names."""
        images = [self._decoded(name) for name in self.names[start:stop]]
        for name, image in zip(self.names[start:stop], images, strict=True):
            if image.shape != self.size:
                found, wanted = _size_text(image.shape), _size_text(self.size)
                raise UserError(
                    f"{self.folder / name} has {found}, and {self.names[0]} has {wanted}: all images need one size "
                    "and one number of channels"
                )
        return np.stack(images)

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
    names = [name for name in Folder.at(address).files(follow_links=True) if is_image(name) and not is_hidden(name)]
    files = [path / name for name in names]
    lossy = [file for file in files if file.suffix.lower() != ".png"]
    if lossy:
        raise UserError(
            f"{path} contains {len(lossy):,} files such as {lossy[0].name}, whose lossy compression would change the "
            "metrics: give PNG files, or use `patchloom prepare` for real images"
        )
    if not files:
        raise UserError(f"{path} contains no samples: give a folder of samples, a prepared dataset or an .npz")
    return PngImages(path, files, skipped)


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


def _ranges(sha256s: list[str]) -> list[RowRange]:
    starts = range(0, len(sha256s), RANGE_ROWS)
    ends = [min(start + RANGE_ROWS, len(sha256s)) for start in starts]
    return [RowRange(_sha256(*sha256s[start:end]), start, end) for start, end in zip(starts, ends, strict=True)]


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
