"""Conditions of samples: the image that each seed follows, from a folder of images or from a prepared dataset."""

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.cards import ConditionCard
from patchloom.models.conditions import depth_to_space
from patchloom.pipelines.prepare.conditions import ENLARGE, condition_planes, joined
from patchloom.pipelines.prepare.images import FILTERS, Transform, decode
from patchloom.platform.dataset.condition_source import ConditionSource
from patchloom.platform.dataset.prepared import is_dataset, open_dataset
from patchloom.platform.files.arrays import MAGIC
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool, sorted_rows
from patchloom.platform.progress import progress
from patchloom.platform.records.prepare import ConditionPlan
from patchloom.platform.records.samples import ConditionEntry

CONDITIONS_FILE = "conditions.jsonl"
SQUARE_CROPS = ("center", "dhariwal")


class SampleConditions(Protocol):
    """The condition images of samples, by number."""

    def __len__(self) -> int:
        """The number of conditions."""

    def read(self, number: int) -> tuple[ConditionEntry, np.ndarray]:
        """A condition as (K, H, W), and its line in `conditions.jsonl`; raises UserError if it cannot be used."""

    def text(self, number: int) -> np.ndarray | None:
        """The text embedding (tokens, width) of a condition; None if there are none."""


def open_sample_conditions(address: str, card: ConditionCard, size: tuple[int, int]) -> SampleConditions:
    """The conditions at an address.

    Args:
        address: a folder or another source of images or arrays, or a prepared dataset with conditions.
        card: the condition of the model.
        size: height and width of the samples.

    Raises:
        UserError: there are no conditions, or those of the dataset are of another kind.
    """
    if is_dataset(Folder.at(address)):
        return _DatasetConditions(address, card, size)
    return _FileConditions(address, card, size)


def conditions_of(conditions: SampleConditions, seeds: list[int]) -> np.ndarray:
    """(n, K, H, W), the conditions of seeds: seed i has condition i modulo their number."""
    return np.stack([conditions.read(seed % len(conditions))[1] for seed in seeds])


def texts_of(conditions: SampleConditions, seeds: list[int]) -> np.ndarray | None:
    """(n, tokens, width), the text embeddings of the conditions of seeds; None if there are none."""
    texts = [conditions.text(seed % len(conditions)) for seed in seeds]
    return None if texts[0] is None else np.stack([text for text in texts if text is not None])


def condition_lines(conditions: SampleConditions) -> Iterator[bytes]:
    """The lines of `conditions.jsonl`. Every condition is read, so that a wrong one ends the command at its start."""
    with progress("reading", len(conditions), "conditions") as meter:
        for number in range(len(conditions)):
            yield f"{conditions.read(number)[0].to_json()}\n".encode()
            meter.update(number + 1)


class _DatasetConditions:
    """Those of the rows of a prepared dataset."""

    def __init__(self, address: str, card: ConditionCard, size: tuple[int, int]) -> None:
        self._dataset = open_dataset(address)
        found = self._dataset.card.condition
        wanted = (card.kind, card.factor, card.channels, card.dtype)
        given = (found.kind, found.factor, found.channels, found.dtype) if found else None
        if found is None or given != wanted:
            shown = f"conditions of {given}" if given else "no conditions"
            raise UserError(
                f"--conditions {address} has {shown}, and the model needs {wanted}: prepare it with --condition"
            )
        self._downscale, side = found.downscale, self._dataset.card.resolution * found.downscale
        if size != (side, side):
            raise UserError(f"--conditions {address} has {side}x{side} pixels, and the samples {size[0]}x{size[1]}")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, number: int) -> tuple[ConditionEntry, np.ndarray]:
        """The condition of a row."""
        row = self._dataset.rows([number], ["key", "condition", "text"])
        (condition,) = depth_to_space(row["condition"], self._downscale)
        text = row["text"].tobytes() if "text" in row else b""  # samples may follow it, too
        return ConditionEntry(file=row["key"][0], sha256=_sha256(condition.tobytes() + text)), condition

    def text(self, number: int) -> np.ndarray | None:
        """The text of a row, if the dataset has texts."""
        if self._dataset.card.text is None:
            return None
        found: np.ndarray = self._dataset.rows([number], ["text"])["text"][0]
        return found


class _FileConditions:
    """Those of a folder or another source, in the order of their names."""

    def __init__(self, address: str, card: ConditionCard, size: tuple[int, int]) -> None:
        source = ConditionSource(address, "--conditions")
        self._name, self._rows = source.name, RowSpool.of(sorted_rows(source.rows()))
        self._reader, self._card, self._size = source.reader(), card, size

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> tuple[ConditionEntry, np.ndarray]:
        """The condition in a file."""
        key, place, _, problem = self._rows[number]
        try:
            if problem:
                raise ValueError(problem)
            content = self._reader.read(place)
            condition = finished_condition(content, self._card, self._size)
        except UserError:
            raise
        except Exception as error:  # Pillow raises many types
            raise UserError(f"--conditions {self._name}: {key} {' '.join(str(error).split())[:300]}") from None
        return ConditionEntry(file=key, sha256=_sha256(content)), condition

    def text(self, number: int) -> None:
        """Files of images have no texts."""


def finished_condition(content: bytes | np.ndarray, card: ConditionCard, size: tuple[int, int]) -> np.ndarray:
    """A condition image as the model needs it: of the size of the sample, or cropped and resized as in training.

    Nothing is computed from a photograph: the file has the edges, the low resolution or the mask itself. An image at
    the low resolution is enlarged as in training.

    Args:
        content: an encoded image or `.npy` array, or the pixels of an image.
        card: the condition of the model.
        size: height and width of the sample.

    Returns:
        (K, H, W) of the type of the card.

    Raises:
        ValueError: it cannot be read, or has another shape or type.
    """
    planes = _planes(content, card)
    change = _change_of_size(planes[0].size, card, size)
    values = joined(planes, change, card.dtype).transpose(2, 0, 1)
    return np.where(values < 128, 0, 255).astype(np.uint8) if card.kind == "edges" else values


def _planes(content: bytes | np.ndarray, card: ConditionCard) -> list[Image.Image]:
    if card.kind == "edges" and not (isinstance(content, bytes) and content.startswith(MAGIC)):
        return [decode(content, 1)]  # edges are often saved in RGB
    plan = ConditionPlan.model_validate({"kind": card.kind, "channels": card.channels, "dtype": card.dtype})
    return condition_planes(content, plan)


def _change_of_size(found: tuple[int, int], card: ConditionCard, size: tuple[int, int]) -> Any:
    """What gives the (width, height) of a condition the size of the sample."""
    height, width = size
    if found == (width, height):
        return np.asarray
    if card.factor and (width, height) == (found[0] * card.factor, found[1] * card.factor):
        return lambda plane: np.asarray(plane.resize((width, height), ENLARGE))
    if height == width and card.crop in SQUARE_CROPS and card.resize in FILTERS and not card.factor:
        return Transform(height, card.crop, card.resize).apply
    smaller = f", or {width // card.factor}x{height // card.factor}" if card.factor else ""
    raise ValueError(f"has {found[0]}x{found[1]} pixels, and must have {width}x{height}{smaller}")


def _sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()
