"""The record of a comparison of training speeds: `speed.json`. Its pages are made from it alone."""

from typing import Self

from pydantic import Field

from patchloom.platform.files.folder import Folder
from patchloom.platform.records.record import Record, VersionedRecord

SPEED_FILE = "speed.json"


class MeasuredSamples(Record):
    """The metrics of the samples of a trial, by name."""

    count: int
    features: str
    metrics: dict[str, float]


class HeldOutPoint(Record):
    """A held-out loss during a training; the seconds are those of its steps."""

    seconds: float
    images: int
    loss: float


class SpeedTrial(Record):
    """A training of the comparison.

    `seconds` are those of its steps, `trial_seconds` also have its start, previews and held-out losses.
    """

    name: str  # of its folder
    setting: str  # in words, without the share of the time
    share: float = 1.0  # of the time; 1 for equal counted images
    repeat: int
    images: int
    flops: float
    seconds: float
    trial_seconds: float
    held_out_loss: float
    held_out: list[HeldOutPoint] = Field(default_factory=list)
    samples: MeasuredSamples
    end: MeasuredSamples | None = None  # of more samples, for those that had the whole time


class SpeedResults(VersionedRecord):
    """Trainings of one network on patches and on full images, for equal time and for equal counted images."""

    format_version: int = 1
    kind: str = "speed"
    date: str
    code_version: str
    code_commit: str
    machine: str
    small: bool
    recipe: str
    data: str  # in words
    held_out_images: int
    sampler: str  # in words
    by_time: list[SpeedTrial]
    by_images: list[SpeedTrial]
    failed: int = 0  # trainings that have no result

    @property
    def trials(self) -> list[SpeedTrial]:
        """All trainings."""
        return [*self.by_time, *self.by_images]

    def write(self, folder: Folder) -> None:
        """Write `speed.json`, whole or not at all."""
        folder.write_json(SPEED_FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """The record of a folder; raises UserError where it is damaged."""
        return cls.parse(folder.read(SPEED_FILE), f"{folder}/{SPEED_FILE}")
