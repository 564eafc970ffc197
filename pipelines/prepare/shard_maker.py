"""Shard maker: the worker of `prepare`. It reads, decodes, encodes and writes the inputs of one shard."""

import base64
import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.prepare.images import Transform, decode, size_of
from patchloom.pipelines.prepare.notes import note_name, split_unit
from patchloom.platform.compute.devices import own_device
from patchloom.platform.compute.jobs import INPUTS_FOLDER, PLAN_FILE
from patchloom.platform.dataset.index import MIRRORED, unit_hashes
from patchloom.platform.dataset.prepared import open_dataset, shard_bytes
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.shard_table import shard_name
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.patience import StoreError
from patchloom.platform.records.dataset import DatasetAutoencoder
from patchloom.platform.records.prepare import PlanFile, PreparedInput, ShardNote, SkippedInput, parse_inputs

if TYPE_CHECKING:
    from patchloom.models.autoencoder import Autoencoder

ENCODE_BATCH = 16  # fixed, and the last batch is padded, so that a latent does not depend on its neighbours
VALUES_PER_SUM = 1 << 17  # uint8 values that fit into the cache
NOT_FINITE = "its latent is not finite in float16"


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard: its number, its number of inputs, and the file below `.work/inputs` with its part that lists them."""

    number: int
    size: int
    list_name: str
    first_byte: int
    size_bytes: int


@dataclass(frozen=True)
class ShardMakerArgument:
    """What a worker needs to make shards.

    Args:
        folder: the address of the dataset.
        backbones: the packages that it may import.
        source: the address of the source with its keys, which the plan in the folder lacks; None: as in the plan.
    """

    folder: str
    backbones: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class ShardContent:
    """The rows of a shard, its skipped inputs, and the sha256 of its part of the source."""

    keys: list[str]
    labels: list[int]
    tensors: dict[str, np.ndarray]  # by column
    skipped: list[SkippedInput]
    source_sha256: str

    def without(self, is_bad: np.ndarray, error: str) -> "ShardContent":
        """The content without the bad rows, which are skipped."""
        good = np.flatnonzero(~is_bad)
        return ShardContent(
            [self.keys[row] for row in good],
            [self.labels[row] for row in good],
            {column: values[good] for column, values in self.tensors.items()},
            self.skipped + [SkippedInput(key=self.keys[row], error=error) for row in np.flatnonzero(is_bad)],
            self.source_sha256,
        )


class PixelRows:
    """Collects the images of a shard."""

    def __init__(self, most: int, shape: tuple[int, int, int]) -> None:
        self._images, self._rows = np.empty((most, *shape), np.uint8), 0

    def add(self, image: np.ndarray) -> None:
        """Add an image, (C, H, W) uint8."""
        self._images[self._rows] = image
        self._rows += 1

    def tensors(self) -> dict[str, np.ndarray]:
        """The columns of the shard."""
        return {"image": self._images[: self._rows]}


class LatentRows:
    """Collects the latents of a shard. Only one batch of its images is in memory."""

    def __init__(self, autoencoder: "Autoencoder") -> None:
        self._autoencoder, self._images = autoencoder, list[np.ndarray]()
        self._moments: dict[str, list[np.ndarray]] = {}

    def add(self, image: np.ndarray) -> None:
        """Add an image, (C, H, W) uint8."""
        self._images.append(image)
        if len(self._images) == ENCODE_BATCH:
            self._encode()

    def _encode(self) -> None:
        import torch

        padded = np.stack(self._images + self._images[-1:] * (ENCODE_BATCH - len(self._images)))
        mean, std = self._autoencoder.encode(torch.from_numpy(padded).to(own_device()))
        for name, moment in (("mean", mean), ("std", std)):
            if moment is not None:  # a deterministic autoencoder has no std
                moments = self._moments.setdefault(name, [])
                moments.append(moment[: len(self._images)].cpu().to(torch.float16).numpy())
        self._images = []

    def tensors(self) -> dict[str, np.ndarray]:
        """The columns of the shard."""
        if self._images:
            self._encode()
        return {name: np.concatenate(parts) for name, parts in self._moments.items()}


class ShardMaker:
    """Makes shards of one preparation. It loads the autoencoder once, on a GPU if there is one."""

    def __init__(self, argument: ShardMakerArgument) -> None:
        allow_backbones(*argument.backbones)
        self.folder = Folder(argument.folder)
        plan = PlanFile.parse(self.folder.read(PLAN_FILE), f"{self.folder}/{PLAN_FILE}").plan
        self.plan = plan.model_copy(update={"source": argument.source or plan.source})
        self.transform = Transform(**self.plan.transform.to_dict()) if self.plan.transform else None
        is_dataset = self.plan.source_kind == "dataset"
        self.pixels = open_dataset(self.plan.source) if is_dataset else None
        self.reader = None if is_dataset else SourceReader(self.plan.source_kind, self.plan.source)
        self.split_by = split_unit(self.plan, self.pixels.card if self.pixels else None)
        self.autoencoder, threads = None, 1
        if self.plan.autoencoder:
            self.autoencoder = self._load_autoencoder(self.plan.autoencoder)
            threads = max(1, (os.cpu_count() or 1) // 2) if own_device().type == "cuda" else 1
        self.decoders = Decoders(threads)

    def _load_autoencoder(self, card: DatasetAutoencoder) -> "Autoencoder":
        import torch

        from patchloom.models.autoencoder import load_autoencoder

        dtype = torch.bfloat16 if card.precision == "bf16" else torch.float32
        return load_autoencoder(local_copy(self.folder.folder("autoencoder").address), own_device(), dtype)

    def __call__(self, shard: PlannedShard, report: Callable[[int], None]) -> str:
        """Write the Arrow file of a shard, then its note. Returns the note as JSON."""
        name = f"{INPUTS_FOLDER}/{shard.list_name}"
        inputs = parse_inputs(self.folder.read_piece(name, shard.first_byte, shard.size_bytes), f"{self.folder}/{name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: inputs that cannot be used are listed
            content = self._rows(inputs) if self.pixels else self._images(inputs)
        if self.autoencoder is not None and content.keys:
            values = content.tensors.values()
            is_bad = ~np.logical_and.reduce([np.isfinite(moment).all((1, 2, 3)) for moment in values])
            content = content.without(is_bad, NOT_FINITE)
        note = ShardNote(
            inputs=len(inputs),
            rows=len(content.keys),
            skipped=content.skipped,
            source_sha256=content.source_sha256,
            **self._write(shard_name(shard.number), content),
        )
        self.folder.write_json(note_name(shard.number), note.to_dict())
        return note.to_json()

    def _write(self, file: str, content: ShardContent) -> dict[str, Any]:
        """Write the rows, if there are any; returns the fields of the note that describe the file."""
        if not content.keys:
            return {}
        written = shard_bytes(content.keys, content.labels, content.tensors)
        self.folder.write(file, written)
        return {
            "file": file,
            "bytes": len(written),
            "sha256": hashlib.sha256(written).hexdigest(),
            "shape": list(next(iter(content.tensors.values())).shape[1:]),
            "classes": Counter(content.labels),
            "sums": sums(content.tensors),
            "hashes": base64.b64encode(unit_hashes(content.keys, self.split_by).tobytes()).decode(),
        }

    def _collector(self, most: int, shape: tuple[int, int, int]) -> PixelRows | LatentRows:
        return PixelRows(most, shape) if self.autoencoder is None else LatentRows(self.autoencoder)

    def _rows(self, inputs: list[PreparedInput]) -> ShardContent:
        """Rows of a prepared dataset, and mirrored rows."""
        assert self.pixels is not None
        card = self.pixels.card
        collected = self._collector(len(inputs), (card.channels, card.resolution, card.resolution))
        keys, labels = list[str](), list[int]()
        for first in range(0, len(inputs), ENCODE_BATCH):
            batch = inputs[first : first + ENCODE_BATCH]
            rows = self.pixels.rows([entry.place[0] for entry in batch])
            for entry, key, label, image in zip(batch, rows["key"], rows["label"], rows["image"], strict=True):
                collected.add(image[..., ::-1] if entry.mirror else image)
                keys.append(key + MIRRORED * entry.mirror)
                labels.append(int(label))
        return ShardContent(keys, labels, collected.tensors(), [], self.plan.inputs_sha256)

    def _images(self, inputs: list[PreparedInput]) -> ShardContent:
        """Images of the source. Those that cannot be used are skipped with the reason."""
        assert self.transform is not None and self.reader is not None
        side, channels = self.transform.resolution, self.transform.channels
        collected = self._collector(len(inputs), (channels, side, side))
        keys, labels, skipped = list[str](), list[int](), list[SkippedInput]()
        digest = hashlib.sha256()
        self.reader.expect(entry.place for entry in inputs if entry.error is None)
        for entry, (found, content_digest) in zip(inputs, self._decoded(inputs), strict=True):
            digest.update(content_digest)
            key = entry.key + MIRRORED * entry.mirror
            if isinstance(found, Exception):
                skipped.append(SkippedInput(key=key, error=self._reason(found)))
                continue
            collected.add((found[:, ::-1] if entry.mirror else found).transpose(2, 0, 1))
            keys.append(key)
            labels.append(entry.label)
        return ShardContent(keys, labels, collected.tensors(), skipped, digest.hexdigest())

    def _decoded(self, inputs: list[PreparedInput]) -> Iterator[tuple[np.ndarray | Exception, bytes]]:
        """(R, R, C) uint8, or the error, of every input, with the sha256 of its bytes in the source."""
        assert self.transform is not None
        if self.transform.crop == "windows":
            yield from self._windows(inputs, self.transform)
            return
        transform = self.transform

        def apply(content: bytes | np.ndarray) -> np.ndarray:
            return transform.apply(decode(content, transform.channels))

        yield from self.decoders.map(apply, (self._content(entry) for entry in inputs))

    def _windows(
        self, inputs: list[PreparedInput], transform: Transform
    ) -> Iterator[tuple[np.ndarray | Exception, bytes]]:
        """Windows of photographs. Each photograph is read once per shard."""
        place, photograph, digest = None, None, b""
        for entry in inputs:
            if entry.place != place:
                content, digest = self._content(entry)
            try:
                if entry.place != place:
                    if isinstance(content, Exception):
                        raise content
                    if entry.window is None:  # planning could not divide it, and this says why
                        transform.windows(size_of(content))
                    place, photograph = entry.place, transform.photograph(decode(content, transform.channels))
                assert photograph is not None and entry.window is not None
                yield transform.window(photograph, *entry.window), digest
            except Exception as error:
                yield error, digest

    def _content(self, entry: PreparedInput) -> tuple[bytes | np.ndarray | Exception, bytes]:
        """The content of an input, or the error, and its sha256."""
        assert self.reader is not None
        try:
            if entry.error is not None:
                raise ValueError(entry.error)
            content = self.reader.read(entry.place)
        except Exception as error:
            if isinstance(error, StoreError) and error.is_passing:  # the store is down; the image may be fine
                raise
            return error, b""
        return content, hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()

    def _reason(self, error: Exception) -> str:
        """Why an input was skipped, without anything that depends on this machine."""
        message = " ".join(str(error).split())
        for source in (self.plan.source, str(Folder(self.plan.source))):
            message = message.replace(f"{source}/", "").replace(source, "the source")
        if "BytesIO" in message:  # Pillow's message contains the address of the object
            message = "cannot identify image file"
        return message if type(error) in (ValueError, UserError) else f"{type(error).__name__}: {message}"


class Decoders:
    """Decodes images in several threads, in order, with a bounded number of prefetched images.

    Pillow releases the interpreter's lock while it decodes.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def map(
        self,
        function: Callable[[Any], np.ndarray],
        contents: Iterable[tuple[bytes | np.ndarray | Exception, bytes]],
    ) -> Iterator[tuple[np.ndarray | Exception, bytes]]:
        """`function` of each content, or its exception, with the digest of the content."""

        def apply(content: bytes | np.ndarray | Exception) -> np.ndarray | Exception:
            if isinstance(content, Exception):
                return content
            try:
                return np.asarray(function(content))
            except Exception as error:
                return error

        if self._pool is None:
            for content, digest in contents:
                yield apply(content), digest
            return
        prefetched: deque[tuple[Future[np.ndarray | Exception], bytes]] = deque()
        for content, digest in contents:
            prefetched.append((self._pool.submit(apply, content), digest))
            if len(prefetched) > 2 * self.threads:
                future, digest = prefetched.popleft()
                yield future.result(), digest
        for future, digest in prefetched:
            yield future.result(), digest


def sums(tensors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Count, sum and sum of squares of the values of each channel (for latents E[z^2] = mean^2 + std^2)."""
    values = next(iter(tensors.values()))
    count = values.size // values.shape[1]
    if values.dtype == np.uint8:  # exact, and much faster than in floating point
        total, squares = np.array([_sums_of_levels(values[:, channel]) for channel in range(values.shape[1])]).T
    else:
        exact = values.astype(np.float64)
        total, squares = exact.sum((0, 2, 3)), (exact**2).sum((0, 2, 3))
        if "std" in tensors:
            squares = squares + (tensors["std"].astype(np.float64) ** 2).sum((0, 2, 3))
    return {"count": [count] * values.shape[1], "sum": total.tolist(), "squares": squares.tolist()}


def _sums_of_levels(levels: np.ndarray) -> tuple[int, int]:
    """The exact sum of (n, H, W) uint8 values and of their squares, by Arrow's vectorised sums."""
    total = squares = 0
    images = max(1, VALUES_PER_SUM // levels[0].size)  # twice as fast as without regard to the cache
    for first in range(0, len(levels), images):
        flat = np.ascontiguousarray(levels[first : first + images]).reshape(-1)
        total += pc.sum(pa.array(flat)).as_py()
        squares += pc.sum(pa.array(np.multiply(flat, flat, dtype=np.uint16))).as_py()  # 255**2 fits
    return total, squares
