"""Records of a search folder: `search.json`, which says what the search is, and the rows of `trials.jsonl`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue

from patchloom.errors import UserError
from patchloom.platform.files.storage import complete_lines, write_json, write_json_lines
from patchloom.platform.recipe.search import Search
from patchloom.platform.records.record import FormatVersion, Record, VersionedRecord

SEARCH_FILE, TRIALS_FILE = "search.json", "trials.jsonl"


class SearchCard(VersionedRecord):
    """`search.json`: the search, its dataset, its MLflow run, and the length of the trials of each setting."""

    FORMAT: ClassVar[int] = 2
    format_version: int = FORMAT
    kind: str = "search"
    run_id: str
    images: list[int | None]  # counted images of a trial, by setting; None where the setting does not fit
    search: Search
    dataset_fingerprint: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The card of a search folder; raises UserError where another version wrote it."""
        path = folder / SEARCH_FILE
        content = path.read_bytes()
        if FormatVersion.parse(content, path).format_version < cls.FORMAT:  # before the fields, which differ there
            raise UserError(f"{folder} was written by an older version: run the search again")
        return cls.parse(content, path)

    def write(self, folder: Path) -> None:
        """Write `search.json`, whole or not at all."""
        write_json(folder / SEARCH_FILE, self.to_dict())


class TrialRow(Record):
    """One trial: its setting, how it ended, and the newest value of each number. Only set fields are written."""

    name: str  # of its folder
    settings: dict[str, JsonValue]  # recipe keys and their values
    repeat: int = 0
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

    def value_of(self, metric: str) -> float | None:
        """The number of that name, None where the trial has none."""
        value = self.get(metric)
        return None if value is None else float(value)

    def to_dict(self) -> dict[str, JsonValue]:
        """The fields that are set, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_trials(folder: Path) -> list[TrialRow]:
    """The table of a search folder; raises UserError where a line is damaged."""
    path = folder / TRIALS_FILE
    return [TrialRow.parse(line, path) for line in complete_lines(path)]


def write_trials(folder: Path, trials: list[TrialRow]) -> None:
    """Write the table of a search folder, whole or not at all."""
    write_json_lines(folder / TRIALS_FILE, [trial.to_dict() for trial in trials])
