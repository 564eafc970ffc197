"""The records of a folder of samples: `sampling.json`, and the lines of `manifest.jsonl`."""

import json
from typing import Any, ClassVar, Literal

from patchloom.platform.records.record import Record, VersionedRecord


class SampledModel(Record):
    """The model of the samples. `autoencoder_sha256` is only written for latent models."""

    reference: str
    weights_sha256: str
    autoencoder_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that were given, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


class ModelLineage(Record):
    """Where a model comes from in MLflow; None where it comes from a folder."""

    run_id: str | None
    name: str | None
    version: str | None


class KeptImage(Record):
    """The image file that samples keep in part: its sha256, and that of the mask for in-painting."""

    sha256: str
    mask_sha256: str | None = None
    method: str = "replace"  # that of folders of earlier versions


class SampledConditions(Record):
    """The number of conditions of the samples, and the sha256 of the file that lists them, `conditions.jsonl`."""

    count: int
    sha256: str


class ConditionEntry(Record):
    """One line of `conditions.jsonl`: the key of a condition, and the sha256 of its file, or of the values of a row."""

    file: str
    sha256: str


class SamplingCard(VersionedRecord):
    """How a folder of samples was made: `sampling.json`.

    The options of the sampler (`steps`, `sampler`, ...) are declared in `models/sampling_options.py`. The card keeps
    them as further fields, and writes them after `model`. `conditions` is only written for models that need them.
    `device` is the kind of device of the workers, "cpu" or "cuda"; None in folders of earlier versions. `inpaint` is
    only written for in-painting.
    """

    FORMAT: ClassVar[int] = 1

    kind: Literal["samples"]
    model: SampledModel
    network_evaluations: int
    labels: Literal["balanced", "fixed", "file"]
    label: int | None
    outpaint: KeptImage | None
    conditions: SampledConditions | None = None
    format: str
    shard_size: int | None
    batch: int
    threads: int
    device: str | None = None
    inpaint: KeptImage | None = None
    lineage: ModelLineage

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON values, in the order of `sampling.json`."""
        values = self.model_dump(mode="json", exclude_unset=True)
        options = {name: values.pop(name) for name in self.model_extra or {}}
        first = {name: values.pop(name) for name in ("format_version", "kind", "model")}
        return first | options | values


class ManifestEntry(Record):
    """One line of `manifest.jsonl`: an image, its class (-1: none), its file and the sha256 of its content."""

    seed: int
    label: int
    file: str
    sha256: str

    def to_json(self) -> str:
        """The line, without its line break."""
        return json.dumps(self.to_dict())
