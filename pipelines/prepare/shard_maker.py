"""Shard maker: the worker of `prepare`. It reads, decodes, encodes and writes the inputs of one shard."""

import base64
import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.prepare.conditions import ConditionMaker
from patchloom.pipelines.prepare.images import Transform, decode, photograph_key, size_of
from patchloom.pipelines.prepare.notes import note_name, split_unit
from patchloom.platform.compute.devices import own_device
from patchloom.platform.compute.jobs import INPUTS_FOLDER, PLAN_FILE, TEXT_ENCODER_FOLDER
from patchloom.platform.dataset.index import MIRRORED, unit_hashes
from patchloom.platform.dataset.prepared import open_dataset, shard_bytes
from patchloom.platform.dataset.readers import SourceReader, is_of_node_or_store
from patchloom.platform.dataset.shard_table import shard_name
from patchloom.platform.dataset.texts import TextEmbeddings
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.dataset import DatasetAutoencoder
from patchloom.platform.records.prepare import (
    PlanFile,
    PreparedInput,
    ShardNote,
    SkippedInput,
    TextPlan,
    parse_inputs,
)

if TYPE_CHECKING:
    from patchloom.models.autoencoder import Autoencoder
    from patchloom.models.text_encoder import TextEncoder

ENCODE_BATCH = 16  # fixed, and the last batch is padded, so that a latent does not depend on its neighbours
VALUES_PER_SUM = 1 << 17  # uint8 values that fit into the cache
NOT_FINITE = "its latent is not finite in float16"
Content = TypeVar("Content")
Result = TypeVar("Result")


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
        condition_source: the address of the source of conditions, likewise.
        text_source: the address of the file of text embeddings, likewise.
    """

    folder: str
    backbones: tuple[str, ...] = ()
    source: str | None = None
    condition_source: str | None = None
    text_source: str | None = None


@dataclass(frozen=True)
class InputContent:
    """An image, and its condition if that has a source of its own, as the sources have them."""

    image: bytes | np.ndarray
    condition: bytes | np.ndarray | None = None


@dataclass(frozen=True)
class DecodedInput:
    """An image as (R, R, C) uint8, and its condition, if there is one, as (R, R, K)."""

    image: np.ndarray
    condition: np.ndarray | None = None


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


class ConditionRows:
    """Collects the conditions of a shard."""

    def __init__(self, maker: ConditionMaker, most: int, side: int) -> None:
        self._maker, self._rows = maker, 0
        self._conditions = np.empty((most, maker.plan.channels, side, side), maker.plan.dtype)

    def add(self, condition: np.ndarray) -> None:
        """Add a condition, (K, H, W)."""
        self._conditions[self._rows] = condition
        self._rows += 1

    def tensors(self) -> dict[str, np.ndarray]:
        """The column of the shard."""
        return {"condition": self._maker.stored(self._conditions[: self._rows])}


class TextRows:
    """Collects the text embeddings of a shard, if the dataset has them.

    Args:
        plan: what they are; None for a dataset without.
        texts: the embeddings by key; None for those of the dataset that is encoded.
        most: the number of rows at most.
    """

    def __init__(self, plan: TextPlan | None, texts: TextEmbeddings | None, most: int) -> None:
        self._texts, self._rows = texts, 0
        self._values = None if plan is None else np.empty((most, plan.tokens, plan.width), np.float16)

    def add(self, key: str, entry: PreparedInput, known: np.ndarray | None = None) -> None:
        """Add the embedding for the key of an input, or the known one of a row; raises ValueError if there is none."""
        # a window has the text of its photograph, unless it has one of its own
        photograph = () if entry.window is None else (photograph_key(key),)
        text = known if self._texts is None else self._texts.of(key, *photograph)
        if self._values is not None:
            self._values[self._rows] = text
            self._rows += 1

    def tensors(self) -> dict[str, np.ndarray]:
        """The column of the shard."""
        return {} if self._values is None else {"text": self._values[: self._rows]}


class CaptionRows:
    """Collects the captions of a shard, and embeds them: equal ones, as those of the windows of a photograph, once."""

    def __init__(self, encoder: "TextEncoder") -> None:
        self._encoder, self._captions = encoder, list[str]()

    def add(self, key: str, entry: PreparedInput, known: np.ndarray | None = None) -> None:
        """Add the caption of an input; raises ValueError if there is none."""
        if entry.caption is None:
            raise ValueError("has no text")
        self._captions.append(entry.caption)

    def tensors(self) -> dict[str, np.ndarray]:
        """The column of the shard."""
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self._captions))}
        return {"text": self._encoder.encode(list(numbers))[[numbers[caption] for caption in self._captions]]}


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
        condition_source = argument.condition_source or plan.condition_source
        self.transform = Transform(**self.plan.transform.to_dict()) if self.plan.transform else None
        is_dataset = self.plan.source_kind == "dataset"
        self.pixels = open_dataset(self.plan.source) if is_dataset else None
        self.reader = None if is_dataset else SourceReader(self.plan.source_kind, self.plan.source)
        self.conditions = self.condition_reader = None
        if plan.condition is not None:
            self.conditions = ConditionMaker(plan.condition, self.transform or Transform(0))
            if condition_source is not None:
                self.condition_reader = SourceReader(plan.condition.source_kind or "files", condition_source)
        text_source = argument.text_source or plan.text_source
        self.texts = TextEmbeddings(text_source) if text_source is not None else None
        self.text_encoder = self._load_text_encoder() if plan.text and plan.text.has_captions else None
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

    def _load_text_encoder(self) -> "TextEncoder":
        from patchloom.models.text_encoder import TextEncoder

        return TextEncoder(local_copy(self.folder.folder(TEXT_ENCODER_FOLDER).address), own_device())

    def __call__(self, shard: PlannedShard, report: Callable[[int], None]) -> str:
        """Write the Arrow file of a shard, then its note. Returns the note as JSON."""
        name = f"{INPUTS_FOLDER}/{shard.list_name}"
        inputs = parse_inputs(self.folder.read_piece(name, shard.first_byte, shard.size_bytes), f"{self.folder}/{name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: inputs that cannot be used are listed
            content = self._rows(inputs) if self.pixels else self._images(inputs)
        if self.autoencoder is not None and content.keys:
            values = [content.tensors[name] for name in ("mean", "std") if name in content.tensors]
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
            **(
                {"condition_sums": condition_sums(content.tensors, plan.channels)}
                if (plan := self.plan.condition)
                else {}
            ),
            "hashes": base64.b64encode(unit_hashes(content.keys, self.split_by).tobytes()).decode(),
        }

    def _collector(self, most: int, shape: tuple[int, int, int]) -> PixelRows | LatentRows:
        return PixelRows(most, shape) if self.autoencoder is None else LatentRows(self.autoencoder)

    def _text_rows(self, most: int) -> "TextRows | CaptionRows":
        if self.text_encoder is None:
            return TextRows(self.plan.text, self.texts, most)
        return CaptionRows(self.text_encoder)

    def _rows(self, inputs: list[PreparedInput]) -> ShardContent:
        """Rows of a prepared dataset, and mirrored rows."""
        assert self.pixels is not None
        card = self.pixels.card
        collected = self._collector(len(inputs), (card.channels, card.resolution, card.resolution))
        conditions = ConditionRows(self.conditions, len(inputs), card.resolution) if self.conditions else None
        keys, labels, skipped = list[str](), list[int](), list[SkippedInput]()
        texts = self._text_rows(len(inputs))
        for first in range(0, len(inputs), ENCODE_BATCH):
            batch = inputs[first : first + ENCODE_BATCH]
            rows = self.pixels.rows([entry.place[0] for entry in batch])
            for number, (entry, key, label) in enumerate(zip(batch, rows["key"], rows["label"], strict=True)):
                image, known = rows["image"][number], rows["text"][number] if "text" in rows else None
                try:
                    texts.add(key, entry, known)
                except ValueError as error:
                    skipped.append(SkippedInput(key=key + MIRRORED * entry.mirror, error=str(error)))
                    continue
                collected.add(image[..., ::-1] if entry.mirror else image)
                if conditions is not None and self.conditions is not None:
                    if "condition" in rows:
                        condition = rows["condition"][number]
                    else:
                        condition = self.conditions.of_pixels(image.transpose(1, 2, 0)).transpose(2, 0, 1)
                    conditions.add(condition[..., ::-1] if entry.mirror else condition)
                keys.append(key + MIRRORED * entry.mirror)
                labels.append(int(label))
        shown = conditions.tensors() if conditions is not None else {}
        tensors = collected.tensors() | shown | texts.tensors()
        return ShardContent(keys, labels, tensors, skipped, self.plan.inputs_sha256)

    def _images(self, inputs: list[PreparedInput]) -> ShardContent:
        """Images of the source. Those that cannot be used are skipped with the reason."""
        assert self.transform is not None and self.reader is not None
        side, channels = self.transform.resolution, self.transform.channels
        collected = self._collector(len(inputs), (channels, side, side))
        conditions = ConditionRows(self.conditions, len(inputs), side) if self.conditions else None
        keys, labels, skipped = list[str](), list[int](), list[SkippedInput]()
        digest, texts = hashlib.sha256(), self._text_rows(len(inputs))
        self.reader.expect(entry.place for entry in inputs if entry.error is None)
        if self.condition_reader is not None:
            self.condition_reader.expect(entry.condition for entry in inputs if entry.error is None and entry.condition)
        for entry, (found, content_digest) in zip(inputs, self._decoded(inputs), strict=True):
            digest.update(content_digest)
            key = entry.key + MIRRORED * entry.mirror
            try:
                if isinstance(found, Exception):
                    raise found
                texts.add(entry.key, entry)
            except Exception as error:
                skipped.append(SkippedInput(key=key, error=self._reason(error)))
                continue
            collected.add(_planes(found.image, entry.mirror))
            if conditions is not None and found.condition is not None:
                conditions.add(_planes(found.condition, entry.mirror))
            keys.append(key)
            labels.append(entry.label)
        shown = conditions.tensors() if conditions is not None else {}
        tensors = collected.tensors() | shown | texts.tensors()
        return ShardContent(keys, labels, tensors, skipped, digest.hexdigest())

    def _decoded(self, inputs: list[PreparedInput]) -> Iterator[tuple[DecodedInput | Exception, bytes]]:
        """Every input, or the error, with the sha256 of its bytes in the source."""
        assert self.transform is not None
        if self.transform.crop == "windows":
            yield from self._windows(inputs, self.transform)
            return
        transform, conditions = self.transform, self.conditions

        def apply(content: InputContent) -> DecodedInput:
            image = decode(content.image, transform.channels)
            pixels = transform.apply(image)
            if conditions is None:
                return DecodedInput(pixels)
            if content.condition is None:
                return DecodedInput(pixels, conditions.of_pixels(pixels))
            return DecodedInput(pixels, conditions.of_file(content.condition, image.size))

        yield from self.decoders.map(apply, (self._content(entry) for entry in inputs))

    def _windows(
        self, inputs: list[PreparedInput], transform: Transform
    ) -> Iterator[tuple[DecodedInput | Exception, bytes]]:
        """Windows of photographs. Each photograph is read once per shard."""
        place, photograph, shown, digest = None, None, None, b""
        for entry in inputs:
            if entry.place != place:
                content, digest = self._content(entry)
            try:
                if entry.place != place:
                    if isinstance(content, Exception):
                        raise content
                    if entry.window is None:  # planning could not divide it, and this says why
                        transform.windows(size_of(content.image))
                    image = decode(content.image, transform.channels)
                    if self.conditions is not None and content.condition is not None:
                        shown = self.conditions.photograph(content.condition, image.size)
                    place, photograph = entry.place, transform.photograph(image)
                assert photograph is not None and entry.window is not None
                yield self._window(transform, photograph, shown, *entry.window), digest
            except Exception as error:
                yield error, digest

    def _window(
        self, transform: Transform, photograph: np.ndarray, shown: np.ndarray | None, y: int, x: int
    ) -> DecodedInput:
        """A window with its condition, which is computed from the window or is that of a condition (H, W, K)."""
        pixels, side = transform.window(photograph, y, x), transform.resolution
        if self.conditions is None:
            return DecodedInput(pixels)
        return DecodedInput(
            pixels, self.conditions.of_pixels(pixels) if shown is None else shown[y : y + side, x : x + side]
        )

    def _content(self, entry: PreparedInput) -> tuple[InputContent | Exception, bytes]:
        """The content of an input, or the error, and its sha256."""
        assert self.reader is not None
        try:
            if entry.error is not None:
                raise ValueError(entry.error)
            image, condition = self.reader.read(entry.place), None
            if self.condition_reader is not None and entry.condition is not None:
                condition = self.condition_reader.read(entry.condition)
        except Exception as error:
            if is_of_node_or_store(error):
                raise
            return error, b""
        return InputContent(image, condition), _digest(image) + (b"" if condition is None else _digest(condition))

    def _reason(self, error: Exception) -> str:
        """Why an input was skipped, without anything that depends on this machine."""
        message = " ".join(str(error).split())
        addresses = [address for address in (self.plan.source, self.plan.condition_source) if address]
        for source in [form for address in addresses for form in (address, str(Folder(address)))]:
            message = message.replace(f"{source}/", "").replace(source, "the source")
        if "BytesIO" in message:  # Pillow's message contains the address of the object
            message = "cannot identify image file"
        return message if type(error) in (ValueError, UserError) else f"{type(error).__name__}: {message}"


def _digest(content: bytes | np.ndarray) -> bytes:
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()


def _planes(pixels: np.ndarray, mirror: bool) -> np.ndarray:
    """(H, W, C) -> (C, H, W), mirrored if wanted."""
    return (pixels[:, ::-1] if mirror else pixels).transpose(2, 0, 1)


class Decoders:
    """Decodes images in several threads, in order, with a bounded number of prefetched images.

    Pillow releases the interpreter's lock while it decodes.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def map(
        self,
        function: Callable[[Content], Result],
        contents: Iterable[tuple[Content | Exception, bytes]],
    ) -> Iterator[tuple[Result | Exception, bytes]]:
        """`function` of each content, or its exception, with the digest of the content."""

        def apply(content: Content | Exception) -> Result | Exception:
            if isinstance(content, Exception):
                return content
            try:
                return function(content)
            except Exception as error:
                return error

        if self._pool is None:
            for content, digest in contents:
                yield apply(content), digest
            return
        prefetched: deque[tuple[Future[Result | Exception], bytes]] = deque()
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


def condition_sums(tensors: dict[str, np.ndarray], channels: int) -> dict[str, list[float]]:
    """`sums` of the column `condition` by channel of the condition images, of which the column may have parts."""
    values = tensors["condition"]
    return sums({"condition": values.reshape(len(values), channels, -1, values.shape[-1])})


def _sums_of_levels(levels: np.ndarray) -> tuple[int, int]:
    """The exact sum of (n, H, W) uint8 values and of their squares, by Arrow's vectorised sums."""
    total = squares = 0
    images = max(1, VALUES_PER_SUM // levels[0].size)  # twice as fast as without regard to the cache
    for first in range(0, len(levels), images):
        flat = np.ascontiguousarray(levels[first : first + images]).reshape(-1)
        total += pc.sum(pa.array(flat)).as_py()
        squares += pc.sum(pa.array(np.multiply(flat, flat, dtype=np.uint16))).as_py()  # 255**2 fits
    return total, squares
