"""The record of a reproduction of the paper: `reproduction.json`."""

from pydantic import Field

from patchloom.platform.files.folder import Folder
from patchloom.platform.records.record import Record, VersionedRecord
from patchloom.redaction import redacted_values

REPRODUCTION_FILE = "reproduction.json"


class FinishedStage(Record):
    """A command that has ended well."""

    command: str
    seconds: float


class Reproduction(VersionedRecord):
    """What is reproduced, from which data, with which options, and the commands that have finished."""

    format_version: int = 1
    kind: str = "reproduction"
    table: str
    small: bool
    data: dict[str, str]  # source by name of the data; empty for the photographs
    autoencoder: str | None = None
    features: str
    model: str | None = None
    stages: list[FinishedStage] = Field(default_factory=list)
    finished: bool = False

    def same_work(self, other: "Reproduction") -> bool:
        """Whether another one has the same commands, as far as they are finished or not."""
        begin = {"stages": [], "finished": False}
        mine, theirs = (redacted_values(one.model_copy(update=begin).to_dict()) for one in (self, other))
        return bool(mine == theirs)

    def seconds(self, command: str) -> float | None:
        """How long a command took; None if it has not finished."""
        return next((stage.seconds for stage in self.stages if stage.command == command), None)

    def with_stage(self, command: str, seconds: float) -> "Reproduction":
        """It with one more finished command."""
        return self.model_copy(update={"stages": [*self.stages, FinishedStage(command=command, seconds=seconds)]})

    def write(self, folder: Folder) -> None:
        """Write `reproduction.json`, whole or not at all, and without keys."""
        folder.write_json(REPRODUCTION_FILE, redacted_values(self.to_dict()))

    @classmethod
    def read(cls, folder: Folder) -> "Reproduction":
        """The record of a folder; raises UserError where it is damaged."""
        return cls.parse(folder.read(REPRODUCTION_FILE), f"{folder}/{REPRODUCTION_FILE}")
