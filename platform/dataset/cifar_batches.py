"""CIFAR batches: pickled dictionaries of pixels and labels, read as data (Krizhevsky 2009, "python version")."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from patchloom.platform.files.pickled import PickledArray, read_pickled

CIFAR_SHAPE = (3, 32, 32)  # red, green and blue, row by row
MOST_CIFAR_BYTES = 1 << 29  # the largest one, the training images of CIFAR-100, has 155 MB


@dataclass(frozen=True)
class CifarBatch:
    """A batch.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: the number of the class of each image; of CIFAR-100, the fine one. None if there are none.
    """

    images: np.ndarray
    labels: list[Any] | None


def read_cifar_batch(content: bytes) -> CifarBatch:
    """The images and labels in a batch; raises ValueError if it is no batch."""
    entries = _entries(content)
    data = entries.get("data")
    pixels = data.values if isinstance(data, PickledArray) else None
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != np.prod(CIFAR_SHAPE):
        raise ValueError("it has no array `data` of uint8 with 3,072 values per image")
    labels = entries.get("fine_labels", entries.get("labels"))
    if isinstance(labels, PickledArray) and labels.values is not None and labels.values.shape == pixels.shape[:1]:
        labels = labels.values.tolist()
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(pixels)):
        raise ValueError(f"it has {len(pixels):,} images and not one label for each")
    return CifarBatch(pixels.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1), labels)


def read_cifar_names(content: bytes) -> list[str]:
    """The names of the classes in `batches.meta` or `meta`; raises ValueError if it has none."""
    entries = _entries(content)
    names = entries.get("fine_label_names", entries.get("label_names"))
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError("it has no list `label_names`")
    return [_text(name) for name in names]


def _entries(content: bytes) -> dict[str, Any]:
    value = read_pickled(content)
    if not isinstance(value, dict):
        raise ValueError("it has no dictionary")
    return {_text(key): entry for key, entry in value.items() if isinstance(key, bytes | str)}


def _text(text: bytes | str) -> str:
    return text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
