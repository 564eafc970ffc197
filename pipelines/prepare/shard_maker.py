"""Shards: what one worker of a preparation does with a range of inputs: read, decode, encode, write, take notes."""

import hashlib
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.prepare.images import Transform, decode
from patchloom.platform.compute.session import begin_work
from patchloom.platform.dataset.prepared import MIRRORED, open_dataset, shard_bytes
from patchloom.platform.dataset.readers import Reader
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder

if TYPE_CHECKING:
    from patchloom.models.autoencoder import Autoencoder

WORK = ".work"
PLAN, INPUTS, NOTES = f"{WORK}/plan.json", f"{WORK}/inputs", f"{WORK}/notes"
PRECISIONS = ("fp32", "bf16")
ENCODE_BATCH = 16  # fixed, and the last batch of a shard padded, so that a latent's bytes never depend on neighbours
SUMMED_AT_ONCE = 1 << 17  # uint8 values
NOT_FINITE = "its latent is not finite in float16"


class ShardMaker:
    """Makes shards of one preparation; holds the autoencoder where there is one, on a GPU where there is one."""

    def __init__(self, argument: dict[str, Any]) -> None:
        begin_work()
        allow_backbones(*argument["backbones"])
        self.folder = Folder(argument["folder"])
        self.plan = self.folder.read_json(PLAN)["plan"]
        self.source = self.plan["source"]
        self.transform = Transform(**self.plan["transform"]) if self.plan["transform"] else None
        is_dataset = self.plan["source_kind"] == "dataset"
        self.pixels = open_dataset(self.source) if is_dataset else None
        self.reader = None if is_dataset else Reader(self.plan["source_kind"], self.source)
        self.autoencoder, self.device, threads = None, "cpu", 1
        if self.plan["autoencoder"]:
            self.autoencoder, self.device = self._load_autoencoder()
            threads = max(1, (os.cpu_count() or 1) // 2) if self.device == "cuda" else 1
        self.decoders = Decoders(threads)

    def _load_autoencoder(self) -> "tuple[Autoencoder, str]":
        import torch

        from patchloom.models.autoencoder import load_autoencoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.plan["autoencoder"]["precision"] == "bf16" else torch.float32
        return load_autoencoder(local_copy(self.folder.folder("autoencoder").address), device, dtype), device

    def __call__(self, item: dict[str, int]) -> dict[str, Any]:
        """Make shard `item["shard"]`: its Arrow file, then the note that says it is finished."""
        name = f"part-{item['shard']:05d}"
        inputs = [json.loads(line) for line in self.folder.read(f"{INPUTS}/{name}.jsonl").splitlines()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: what cannot be used is listed
            keys, labels, images, skipped, digest = self._rows(inputs) if self.pixels else self._images(inputs)
        tensors = {"image": images}
        if self.autoencoder is not None and keys:
            tensors = self._encode(images)
            finite = np.logical_and.reduce([np.isfinite(t).all((1, 2, 3)) for t in tensors.values()])
            skipped += [{"key": key, "error": NOT_FINITE} for key, ok in zip(keys, finite, strict=True) if not ok]
            keys = [key for key, ok in zip(keys, finite, strict=True) if ok]
            labels = [label for label, ok in zip(labels, finite, strict=True) if ok]
            tensors = {column: values[finite] for column, values in tensors.items()}
        note: dict[str, Any] = {"inputs": len(inputs), "rows": len(keys), "skipped": skipped, "source_sha256": digest}
        if keys:
            file, content = f"shards/{name}.arrow", shard_bytes(keys, labels, tensors)
            self.folder.write(file, content)
            note |= {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            shape = next(iter(tensors.values())).shape[1:]
            note |= {"shape": list(shape), "classes": Counter(labels), "sums": sums(tensors)}
        self.folder.write_json(f"{NOTES}/{name}.json", note)
        return {"shard": item["shard"], "inputs": len(inputs)}

    def _rows(self, inputs: list[dict[str, Any]]) -> tuple[list[str], list[int], np.ndarray, list[dict[str, str]], str]:
        """Rows of a prepared dataset, some of them mirrored."""
        assert self.pixels is not None
        rows = self.pixels.rows([entry["place"][0] for entry in inputs])
        mirrored = np.array([entry.get("mirror", False) for entry in inputs])
        images = np.where(mirrored[:, None, None, None], rows["image"][..., ::-1], rows["image"])
        keys = [key + MIRRORED * bool(flip) for key, flip in zip(rows["key"], mirrored, strict=True)]
        return keys, [int(label) for label in rows["label"]], images, [], self.plan["inputs_sha256"]

    def _images(
        self, inputs: list[dict[str, Any]]
    ) -> tuple[list[str], list[int], np.ndarray, list[dict[str, str]], str]:
        """Decoded images of the source; those that cannot be used are listed with the reason."""
        assert self.transform is not None and self.reader is not None
        side, channels = self.transform.resolution, self.transform.channels
        images = np.empty((len(inputs), channels, side, side), np.uint8)
        keys, labels, skipped = list[str](), list[int](), list[dict[str, str]]()
        digest = hashlib.sha256()
        for entry, (found, content_sha256) in zip(inputs, self._found(inputs), strict=True):
            digest.update(content_sha256)
            key = entry["key"] + MIRRORED * entry.get("mirror", False)
            if isinstance(found, Exception):
                skipped.append({"key": key, "error": self._reason(found)})
                continue
            images[len(keys)] = (found[:, ::-1] if entry.get("mirror") else found).transpose(2, 0, 1)
            keys.append(key)
            labels.append(entry["label"])
        return keys, labels, images[: len(keys)], skipped, digest.hexdigest()

    def _found(self, inputs: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray | Exception, bytes]]:
        """(R, R, C) uint8, or what was wrong, of every input, and the sha256 of what its place holds."""
        assert self.transform is not None
        if self.transform.crop == "windows":
            yield from self._windows(inputs, self.transform)
            return
        transform = self.transform

        def made(content: bytes | np.ndarray) -> np.ndarray:
            return transform.apply(decode(content, transform.channels))

        yield from self.decoders.map(made, (self._content(entry) for entry in inputs))

    def _windows(
        self, inputs: list[dict[str, Any]], transform: Transform
    ) -> Iterator[tuple[np.ndarray | Exception, bytes]]:
        """Windows of photographs, each of which is read once a shard."""
        place, photograph, digest = None, None, b""
        for entry in inputs:
            try:
                if entry["place"] != place:
                    content, digest = self._content(entry)
                    if isinstance(content, Exception):
                        raise content
                    place, photograph = entry["place"], transform.photograph(decode(content, transform.channels))
                assert photograph is not None
                yield transform.window(photograph, *entry["window"]), digest
            except Exception as error:
                yield error, digest

    def _content(self, entry: dict[str, Any]) -> tuple[bytes | np.ndarray | Exception, bytes]:
        """What stands at an input's place, and its sha256."""
        assert self.reader is not None
        try:
            if "error" in entry:
                raise ValueError(entry["error"])
            content = self.reader.read(entry["place"])
        except Exception as error:
            return error, b""
        return content, hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()

    def _reason(self, error: Exception) -> str:
        """Why an input was skipped, without a word that depends on this machine."""
        message = " ".join(str(error).replace(f"{self.source}/", "").split())
        message = message.replace(self.source, "the source")
        if "BytesIO" in message:  # Pillow names the object it was given
            message = "cannot identify image file"
        return message if type(error) is ValueError else f"{type(error).__name__}: {message}"

    def _encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        assert self.autoencoder is not None
        moments: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(images), ENCODE_BATCH):
            batch = images[start : start + ENCODE_BATCH]
            padded = np.concatenate([batch, np.repeat(batch[-1:], ENCODE_BATCH - len(batch), axis=0)])
            mean, std = self.autoencoder.encode(torch.from_numpy(padded).to(self.device))
            for name, moment in (("mean", mean), ("std", std)):
                if moment is not None:  # a deterministic autoencoder has no std
                    moments.setdefault(name, []).append(moment[: len(batch)].cpu().to(torch.float16).numpy())
        return {name: np.concatenate(parts) for name, parts in moments.items()}


class Decoders:
    """Decodes in so many threads (Pillow lets go of the interpreter while it works), in order and not far ahead."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def map(
        self, function: Any, contents: Iterable[tuple[bytes | np.ndarray | Exception, bytes]]
    ) -> Iterator[tuple[np.ndarray | Exception, bytes]]:
        """`function` of each content, or the exception of it, with the digest that came along."""

        def made(content: bytes | np.ndarray | Exception) -> np.ndarray | Exception:
            if isinstance(content, Exception):
                return content
            try:
                return np.asarray(function(content))
            except Exception as error:
                return error

        if self._pool is None:
            for content, digest in contents:
                yield made(content), digest
            return
        ahead: deque[tuple[Future[np.ndarray | Exception], bytes]] = deque()
        for content, digest in contents:
            ahead.append((self._pool.submit(made, content), digest))
            if len(ahead) > 2 * self.threads:
                future, digest = ahead.popleft()
                yield future.result(), digest
        for future, digest in ahead:
            yield future.result(), digest


def sums(tensors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Per channel: how many values, their sum, and their sum of squares (for latents E[z^2] = mean^2 + std^2)."""
    values = next(iter(tensors.values()))
    count = values.size // values.shape[1]
    if values.dtype == np.uint8:  # exact, and many times faster than in floating point
        total, squares = np.array([_sums_of_levels(values[:, channel]) for channel in range(values.shape[1])]).T
    else:
        exact = values.astype(np.float64)
        total, squares = exact.sum((0, 2, 3)), (exact**2).sum((0, 2, 3))
        if "std" in tensors:
            squares = squares + (tensors["std"].astype(np.float64) ** 2).sum((0, 2, 3))
    return {"count": [count] * values.shape[1], "sum": total.tolist(), "squares": squares.tolist()}


def _sums_of_levels(levels: np.ndarray) -> tuple[int, int]:
    """The sum of (n, H, W) uint8 values and that of their squares, exactly, by Arrow's vectorised sums."""
    total = squares = 0
    images = max(1, SUMMED_AT_ONCE // levels[0].size)  # what stays in the cache is summed twice as fast
    for first in range(0, len(levels), images):
        flat = np.ascontiguousarray(levels[first : first + images]).reshape(-1)
        total += pc.sum(pa.array(flat)).as_py()
        squares += pc.sum(pa.array(np.multiply(flat, flat, dtype=np.uint16))).as_py()  # 255**2 fits
    return total, squares
