"""Records of an evaluation: `metrics.json`, with everything that its numbers depend on."""

import hashlib
import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, JsonValue

from patchloom.errors import UserError
from patchloom.platform.records.record import Record, VersionedRecord

MetricValue = float | list[JsonValue] | None  # a list is an interval: its lower and upper end


class EvaluationIdentity(Record):
    """Everything that metrics depend on, except the model: two results compare if their identities are equal.

    The options of the samples (sampler, steps, guidance, ...) are further fields.
    """

    features: str
    n_samples: int
    n_reference: int | None = None  # None where only the statistics of the reference are known
    reference: str  # fingerprint of the reference images, or sha256 of the statistics
    width: int = 0  # values per image in the features
    images: str = ""  # what kind of images was measured
    seeds: str | None = None

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits; equal for equal identities."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def to_dict(self) -> dict[str, JsonValue]:
        """The fields that are set, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


class EvaluationResult(VersionedRecord):
    """`metrics.json`: the metrics by name, what they depend on, and what a reader must know about them."""

    FORMAT: ClassVar[int] = 2
    format_version: int = FORMAT
    metrics: dict[str, MetricValue]
    identity: EvaluationIdentity
    digest: str
    model: dict[str, JsonValue] | None = None
    notes: list[str] = Field(default_factory=list)
    pictures: list[str] = Field(default_factory=list)
    code_version: str = ""
    command: str = ""  # without secrets; empty where a program called a function, and in older results

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result in a JSON file; raises UserError where it cannot be read."""
        content = path.read_bytes()
        if b'"identity"' not in content:
            raise UserError(f"{path} was written by an older version: run `patchloom evaluate` again")
        return cls.parse(content, path)

    def to_dict(self) -> dict[str, JsonValue]:
        """The record as plain JSON values."""
        return {**super().to_dict(), "identity": self.identity.to_dict()}
