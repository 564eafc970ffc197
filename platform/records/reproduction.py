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
    machine: str = ""  # where it began, in words
    code_version: str = ""
    code_commit: str = ""  # where the code is a checkout
    stages: list[FinishedStage] = Field(default_factory=list)
    finished: bool = False

    def same_work(self, other: "Reproduction") -> bool:
        """Whether another one has the same commands, as far as they are finished or not."""
        mine, theirs = (
            redacted_values(one.model_copy(update={"finished": False}).continuing(_NOTHING_DONE).to_dict())
            for one in (self, other)
        )
        return bool(mine == theirs)

    @property
    def origin(self) -> str:
        """The machine and the code in a line; empty where an older version did not store them."""
        parts = [self.machine, f"patchloom {self.code_version}", f"commit {self.code_commit[:12]}"]
        known = [self.machine, self.code_version, self.code_commit]
        return ", ".join(part for part, is_known in zip(parts, known, strict=True) if is_known)

    def continuing(self, begun: "Reproduction") -> "Reproduction":
        """It with what an earlier call has done, and where."""
        done = ("stages", "machine", "code_version", "code_commit")
        return self.model_copy(update={name: getattr(begun, name) for name in done})

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


_NOTHING_DONE = Reproduction(table="", small=False, data={}, features="")
