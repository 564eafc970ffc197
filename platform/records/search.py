"""Records of a search folder: `search.json`, which says what the search is, and the rows of `trials.jsonl`."""

from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.inside import inner_name
from patchloom.platform.files.storage import json_lines, whole_lines
from patchloom.platform.recipe.search import Search
from patchloom.platform.records.record import FormatVersion, Record, VersionedRecord

SEARCH_FILE, TRIALS_FILE = "search.json", "trials.jsonl"


class SearchCard(VersionedRecord):
    """`search.json`: the search, its dataset, its MLflow run, and the length of the trials of each setting.

    `added_seeds` is the number of repeats of each setting that were added to those of the search. `command` started
    the search, without secrets; it is empty where a program called a function, and in older searches.
    """

    FORMAT: ClassVar[int] = 2
    format_version: int = FORMAT
    kind: str = "search"
    run_id: str
    images: list[int | None]  # counted images of a trial, by setting; None where the setting does not fit
    search: Search
    dataset_fingerprint: str
    added_seeds: int = 0
    command: str = ""

    @property
    def seeds(self) -> int:
        """Trials of each setting."""
        return self.search.repeats + self.added_seeds

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """The card of a search folder; raises UserError where another version wrote it."""
        path, content = f"{folder}/{SEARCH_FILE}", folder.read(SEARCH_FILE)
        if FormatVersion.parse(content, path).format_version < cls.FORMAT:  # before the fields, which differ there
            raise UserError(f"{folder} was written by an older version: run the search again")
        return cls.parse(content, path)

    def write(self, folder: Folder) -> None:
        """Write `search.json`, whole or not at all."""
        folder.write_json(SEARCH_FILE, self.to_dict())


class TrialRow(Record):
    """One trial: its setting, how it ended, and the newest value of each number. Only set fields are written."""

    name: str  # of its folder
    settings: dict[str, JsonValue]  # recipe keys and their values
    repeat: int = 0
    equal: Literal["images", "updates", "flops"] | None = None  # a trial of `equal_costs`: the unit of its cost
    status: Literal["finished", "stopped", "failed"]
    error: str | None = None  # why it failed
    run_id: str | None = None
    seconds: float | None = None
    updates: int = 0
    images_seen: int = 0
    full_size_images: int = 0
    flops: float | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    held_out_loss_by_sigma: dict[str, float] = Field(default_factory=dict)
    preview_frechet_distance: float | None = None
    preview: str | None = None  # the newest preview's path in the trial's folder
    final_distance: float | None = None
    training_images: int | None = None  # rows that it was trained on
    held_out_images: int | None = None  # rows of its held-out loss
    memorised_share: float | None = None  # of the samples of its final distance
    memorised_by_chance: float | None = None  # the same share of held-out images

    def value_of(self, metric: str) -> float | None:
        """The number of that name, None where the trial has none."""
        value = self.get(metric)
        return None if value is None else float(value)

    def to_dict(self) -> dict[str, JsonValue]:
        """The fields that are set, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_trials(folder: Folder) -> list[TrialRow]:
    """The table of a search folder, empty if there is none yet; raises UserError where a line is damaged."""
    content, place = folder.read(TRIALS_FILE) if folder.has(TRIALS_FILE) else b"", f"{folder}/{TRIALS_FILE}"
    trials = [TrialRow.parse(line, place) for line in whole_lines(content)]
    for trial in trials:
        inner_name(trial.name, place)
    return trials


def write_trials(folder: Folder, trials: list[TrialRow]) -> None:
    """Write the table of a search folder, whole or not at all."""
    folder.write(TRIALS_FILE, json_lines([trial.to_dict() for trial in trials]))
