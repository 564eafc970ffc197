"""Records of a run folder: `run.json` and the lines of `progress.jsonl`."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, JsonValue

from patchloom.errors import UserError
from patchloom.platform.files.storage import complete_lines, write_atomic, write_json
from patchloom.platform.records.record import Record, VersionedRecord

RUN_FILE = "run.json"
PROGRESS_FILE = "progress.jsonl"
LineFields = dict[str, int | float | str | dict[str, float] | None]  # part of a progress line


class RunCard(VersionedRecord):
    """`run.json`: which dataset and code a run uses, and the MLflow run that mirrors it.

    The format is also the version of the random draws and of the order of rows: a run of format 1 keeps those of
    version 0.1.0 when it is continued.
    """

    FORMAT: ClassVar[int] = 2
    format_version: int = 1
    kind: str = "train"
    run_id: str | None = None  # of MLflow; None until the tracking store has answered
    tracking_uri: str | None = None  # the store of the MLflow run; older runs do not store it
    dataset: str | None = None  # its address; older autoencoder runs do not store it
    dataset_fingerprint: str
    code_version: str = ""
    code_commit: str = ""  # where the code is a checkout
    command: str = ""  # that started the run, without secrets; empty where a program called a function
    continued: list[str] = Field(default_factory=list)  # the commands that made it longer
    base_sha256: str | None = None  # of the weights of a ControlNet's base

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the card of a run folder.

        Raises:
            UserError: the file is missing or damaged, or has a newer format.
        """
        path = folder / RUN_FILE
        if not path.is_file():
            raise UserError(f"{path}: not found; pass the --out folder of a run")
        return cls.from_file(path)

    def write(self, folder: Path) -> None:
        """Write `run.json` atomically, with the fields that are set."""
        write_json(folder / RUN_FILE, self.model_dump(mode="json", exclude_unset=True))


class ProgressLine(Record):
    """One line of `progress.jsonl`. Only the fields that are set are written.

    A run of the denoiser fills in all counts and rates. An autoencoder's lines have `step`, `images_seen`,
    `loss`, `images_per_second` and `time_unix_s`.
    """

    step: int
    updates: int = 0
    images_seen: int = 0  # crops, counted as the paper does
    full_size_images: int = 0
    pixel_equivalent_images: float = 0.0
    flops: int | float = 0
    learning_rate: float = 0.0
    loss: float | None = None  # None where it was not finite
    loss_by_patch_size: dict[str, float] = Field(default_factory=dict)
    loss_by_sigma: dict[str, float] = Field(default_factory=dict)
    bad_crops: int = 0  # crops whose loss was not finite
    loss_scale: float | None = None  # of fp16
    images_per_second: float = 0.0
    updates_per_second: float = 0.0
    flops_per_second: float = 0.0
    images_per_second_by_patch_size: dict[str, float] = Field(default_factory=dict)
    data_wait_share: float = 0.0
    reduce_wait_share: float = 0.0
    straggler_loss: float | None = None
    eta_seconds: float = 0.0
    peak_memory_bytes: int = 0
    model_flops_utilisation: float = 0.0
    peak_flops_per_second: float = 0.0
    peak_flops_source: str = ""
    system: dict[str, float] = Field(default_factory=dict)
    preview: str | None = None  # the picture's path in the run folder
    preview_frechet_distance: float | None = None
    held_out_loss: float | None = None
    held_out_loss_by_sigma: dict[str, float] = Field(default_factory=dict)
    time_unix_s: float = 0.0

    @property
    def has_utilisation(self) -> bool:
        """Whether the peak FLOP/s of the devices is known, and not below the rate of the run."""
        return 0 < self.model_flops_utilisation <= 1

    def append_to(self, folder: Path) -> None:
        """Add the line to a run's `progress.jsonl`."""
        with (folder / PROGRESS_FILE).open("a") as file:
            file.write(self.to_json() + "\n")

    def to_dict(self) -> dict[str, JsonValue]:
        """The fields that are set, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)

    def to_json(self) -> str:
        """The fields that are set, as one line of JSON."""
        return json.dumps(self.model_dump(exclude_unset=True))


def read_progress(folder: Path) -> list[ProgressLine]:
    """Read the progress lines of a run folder. An incomplete last line is skipped.

    Raises:
        UserError: a line is damaged.
    """
    path = folder / PROGRESS_FILE
    return [ProgressLine.parse(line, path) for line in complete_lines(path)]


def training_seconds(lines: Sequence[ProgressLine]) -> list[float]:
    """The time of all steps until each line, without what happened between lines: previews, held-out losses, pauses."""
    starts = [0, *(line.images_seen for line in lines)]
    intervals = (
        (line.images_seen - start) / line.images_per_second for start, line in zip(starts, lines, strict=False)
    )
    return list(itertools.accumulate(intervals))


def last_progress(folder: Path) -> ProgressLine:
    """The newest progress line of a run folder; raises UserError if there is none."""
    lines = read_progress(folder)
    if not lines:
        raise UserError(
            f"{folder / PROGRESS_FILE} has no line, and the run has taken its steps: restore the file; the weights are "
            f"in {folder}/model and {folder}/checkpoints"
        )
    return lines[-1]


def write_progress(folder: Path, lines: list[ProgressLine]) -> None:
    """Replace a run's `progress.jsonl`."""
    write_atomic(folder / PROGRESS_FILE, "".join(line.to_json() + "\n" for line in lines))
