"""The records of an unfinished preparation, below `.work/` of the dataset, and the lines of `skipped.jsonl`."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from patchloom.errors import UserError
from patchloom.platform.records.dataset import DatasetAutoencoder, DatasetText, ImageTransform
from patchloom.platform.records.record import Record

# fields of a plan; the bytes of a dataset do not depend on them
PLAN_ADDRESSES = ("source", "condition_source", "text_source")


def _is_none(value: object) -> bool:
    return value is None


class ConditionPlan(Record):
    """The conditions of a dataset, as in its card. `source_kind` is the kind of their own source, if they have one."""

    kind: Literal["edges", "low-res", "images"]
    factor: int | None = Field(default=None, exclude_if=_is_none)
    channels: int
    dtype: Literal["uint8", "float16", "float32"]
    downscale: int = 1
    source_kind: str | None = Field(default=None, exclude_if=_is_none)


class TextPlan(DatasetText):
    """The text embeddings of a dataset, as in its card.

    `sha256` is of their file, or of the captions; None for those of a dataset. `no_text_sha256` is empty where
    an encoder makes them: another machine may get other last bits, and `encoder_sha256` identifies them.
    """

    sha256: str | None = Field(default=None, exclude_if=_is_none)

    @property
    def has_captions(self) -> bool:
        """Whether an encoder makes the embeddings from captions."""
        return not self.no_text_sha256


class PreparationPlan(Record):
    """Everything that the bytes of the shards depend on.

    `source_kind` is a kind of `platform/dataset/sources.py`, or "dataset". A prepared dataset as the source has no
    transform. `inputs_sha256` covers the keys, labels and sizes of the inputs and of their conditions.
    """

    source: str
    source_kind: str
    transform: ImageTransform | None
    class_names: list[str]
    autoencoder: DatasetAutoencoder | None = None
    mirror: bool = False
    shard_rows: int = 0
    inputs_sha256: str
    condition: ConditionPlan | None = Field(default=None, exclude_if=_is_none)
    condition_source: str | None = Field(default=None, exclude_if=_is_none)
    text: TextPlan | None = Field(default=None, exclude_if=_is_none)
    text_source: str | None = Field(default=None, exclude_if=_is_none)

    def identity(self) -> str:
        """A hash of the plan without the addresses of sources. Calls with equal identities continue each other."""
        values = {name: value for name, value in self.to_dict().items() if name not in PLAN_ADDRESSES}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class PlanFile(Record):
    """`.work/plan.json`: a plan and its identity."""

    identity: str
    plan: PreparationPlan


@dataclass(frozen=True, slots=True)
class PreparedInput:
    """One input of a preparation: a line of `.work/inputs/part-00000.jsonl`.

    Args:
        place: where it is in the source; for a prepared dataset, the number of its row.
        key: its key; empty for a prepared dataset.
        label: its class number, -1 if unlabelled.
        window: (y, x) of the window of a photograph.
        mirror: whether the image is mirrored.
        error: why it is skipped without being read.
        condition: where its condition is in the source of conditions, if there is one.
        caption: its text, where an encoder makes its embedding.
    """

    place: list[Any]
    key: str = ""
    label: int = -1
    window: tuple[int, int] | None = None
    mirror: bool = False
    error: str | None = None
    condition: list[Any] | None = None
    caption: str | None = None


_INPUT = TypeAdapter(PreparedInput)


def input_lines(inputs: Iterable[PreparedInput]) -> bytes:
    """Inputs as lines of JSON, without default values."""
    return b"".join(_INPUT.dump_json(entry, exclude_defaults=True) + b"\n" for entry in inputs)


def parse_inputs(content: bytes, place: object) -> list[PreparedInput]:
    """The inputs in lines of JSON; raises UserError, with the place, if a line is damaged."""
    try:
        return [_INPUT.validate_json(line) for line in content.splitlines()]
    except ValidationError as error:
        raise UserError(f"{place} is damaged ({error.errors()[0]['msg']}): remove .work and prepare again") from None


class SkippedInput(Record):
    """One line of `skipped.jsonl`: the key of an input that cannot be used, and why."""

    key: str
    error: str

    def to_json(self) -> str:
        """The line, without its line break."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


class ChannelSums(Record):
    """Sums over the values of each channel: their number, their sum, and the sum of their squares."""

    count: list[int | float]
    sum: list[int | float]
    squares: list[int | float]


class ShardNote(Record):
    """The note of a finished shard. The fields of the file are None if no input of the shard can be used.

    `hashes` are those of the keys of its rows, 8 bytes each, as base64. Notes of older versions have none.
    `condition_sums` are those of the conditions, if there are any.
    """

    inputs: int
    rows: int
    skipped: list[SkippedInput]
    source_sha256: str
    file: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    shape: list[int] | None = None
    classes: dict[int, int] | None = None
    sums: ChannelSums | None = None
    hashes: str | None = None
    condition_sums: ChannelSums | None = Field(default=None, exclude_if=_is_none)
