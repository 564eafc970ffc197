"""Shard sampler: the worker of `patchloom sample`. It samples the seeds of one shard and writes their files."""

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.models.generate import Sampling, generate_padded, image_size
from patchloom.models.precision import fixed_arithmetic
from patchloom.pipelines.sample.conditions import conditions_of, open_sample_conditions, texts_of
from patchloom.pipelines.sample.folder import MANIFEST, parse_entries
from patchloom.pipelines.sample.formats import FORMATS, EncodedImage, content_sha256, read_contents
from patchloom.pipelines.sample.known_images import pixels_of_png
from patchloom.pipelines.sample.sampler import load_model_for_sampling
from patchloom.pipelines.sample.seeds import SeedClasses, Seeds
from patchloom.platform.compute.jobs import NOTES_FOLDER
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.samples import ManifestEntry
from patchloom.platform.tracking.store import store_environment

KNOWN_IMAGE = "known.png"
NO_CLASSES = SeedClasses()
REMOTE_WRITERS = 16  # hides the latency of a store


@dataclass(frozen=True)
class SeedShard:
    """Seeds that one worker samples together.

    Args:
        name: the name of its note.
        seeds: the seeds of the missing images.
        classes: their classes.
        kept_lines: where the lines of the intact images of the archive, which the new archive keeps, begin in the
            manifest, and their length, in bytes.
    """

    name: str
    seeds: Seeds
    classes: SeedClasses = NO_CLASSES
    kept_lines: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """The number of images to sample."""
        return len(self.seeds)


@dataclass(frozen=True)
class ShardSamplerArgument:
    """What a worker needs to sample shards. `model`, `folder` and `stores` are addresses that work on any node.

    `device` is the kind of device that the images in the folder were sampled on; None if it is unknown.
    `known_method` is the method of in-painting, for folders with an image that is kept in part.
    `conditions` is the address of the conditions, if the model needs them.
    """

    model: str
    folder: str
    stores: dict[str, str]
    backbones: tuple[str, ...]
    sampling: Sampling
    batch: int
    format: str
    shard_size: int | None
    known_method: str | None
    device: str | None = None
    conditions: str | None = None


@dataclass(frozen=True)
class SampledShard:
    """How many images were sampled, the CPU time of the process for them, and when they were finished."""

    images: int
    cpu_seconds: float
    ended_unix_s: float


class ShardSampler:
    """Loads a model once, and samples shards of seeds into a folder."""

    def __init__(self, argument: ShardSamplerArgument) -> None:
        if store_environment() != argument.stores:  # the worker may have another working directory
            os.environ.update(argument.stores)
        allow_backbones(*argument.backbones)
        self.argument, self.folder = argument, Folder(argument.folder)
        self.format = FORMATS[argument.format]
        self.model = load_model_for_sampling(argument.model)
        self.known = None
        if argument.known_method is not None:
            self.known = pixels_of_png(self.folder.read(KNOWN_IMAGE), argument.known_method)
        self.conditions, card = None, self.model.card.condition
        if argument.conditions is not None and card is not None:
            self.conditions = open_sample_conditions(
                argument.conditions, card, image_size(self.model.card, argument.sampling)
            )
        kind = next(self.model.denoiser.parameters()).device.type
        if argument.device not in (None, kind):
            raise UserError(
                f"{self.folder} contains samples of the device {argument.device}, and this worker computes on {kind}, "
                f"which gives other bytes: choose another folder, or a machine with {argument.device}"
            )
        local = 1 if kind == "cpu" else max(1, (os.cpu_count() or 1) // 2)
        self.writers = ThreadPoolExecutor(REMOTE_WRITERS if self.folder.is_remote else local, "writer")

    @fixed_arithmetic()
    def __call__(self, shard: SeedShard, report: Callable[[int], None]) -> SampledShard:
        """Sample and write the images of a shard, then its note."""
        began = time.process_time()
        images, todo = self._existing(shard), shard.seeds.numbers()
        batch, pending = self.argument.batch, deque[Future[EncodedImage]]()
        for start in range(0, len(todo), batch):
            seeds = todo[start : start + batch].tolist()
            labels = shard.classes.of(todo[start : start + batch]).tolist()
            for seed, label, image in zip(seeds, labels, self._sample(seeds, labels), strict=True):
                pending.append(self.writers.submit(self._encode, seed, label, image))
            while len(pending) > 4 * batch:  # wait for a slow disk before memory fills up
                self._collect(pending, images)
            report(start + len(seeds))
        while pending:
            self._collect(pending, images)
        self._write(shard.name, [images[seed] for seed in sorted(images)])
        return SampledShard(len(todo), time.process_time() - began, time.time())

    def _sample(self, seeds: list[int], labels: list[int]) -> np.ndarray:
        """One batch of images, (N, C, H, W) uint8."""
        argument = self.argument
        try:
            shown = text = None
            if self.conditions is not None:
                shown = torch.from_numpy(conditions_of(self.conditions, seeds))
                text = texts_of(self.conditions, seeds) if self.model.denoiser.text_shape else None
            images = generate_padded(
                self.model, seeds, labels, argument.batch, argument.sampling, self.known, condition=shown,
                text=None if text is None else torch.from_numpy(text),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error)) from None
        return images.cpu().numpy()

    def _existing(self, shard: SeedShard) -> dict[int, EncodedImage]:
        """The intact images of an archive that is extended."""
        first, size_bytes = shard.kept_lines
        if not size_bytes:
            return {}
        lines = self.folder.read_piece(MANIFEST, first, size_bytes).splitlines()
        entries = parse_entries(lines, f"{self.folder}/{MANIFEST} from byte {first}")
        return {
            entry.seed: EncodedImage(entry.seed, entry.label, content)
            for entry, content in read_contents(self.folder, entries)
            if content is not None
        }

    def _encode(self, seed: int, label: int, image: np.ndarray) -> EncodedImage:
        """Encode an image, and write it if it is a file of its own."""
        encoded = EncodedImage(seed, label, self.format.encode(image))
        if self.format.pack is None:  # not synced to disk: the sha256 in the manifest reveals a lost write
            self.folder.write(self.format.file_of(seed), encoded.content, sync=False)
        return encoded

    @staticmethod
    def _collect(pending: "deque[Future[EncodedImage]]", images: dict[int, EncodedImage]) -> None:
        image = pending.popleft().result()
        images[image.seed] = image

    def _write(self, name: str, images: list[EncodedImage]) -> None:
        """Write the archive, if the format has archives, then the note."""
        entries = [
            ManifestEntry(
                seed=image.seed,
                label=image.label,
                file=self.format.file_of(image.seed, self.argument.shard_size),
                sha256=content_sha256(image.content),
            )
            for image in images
        ]
        if self.format.pack is not None:
            self.folder.write(entries[0].file, self.format.pack(images))
        self.folder.write(f"{NOTES_FOLDER}/{name}.jsonl", "".join(f"{entry.to_json()}\n" for entry in entries))
