"""The base of all records: frozen, checked when read, and readable for as long as their format is known."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from patchloom.errors import UserError


class Record(BaseModel):
    """A frozen value with typed fields. Fields that this version does not know are kept.

    `record["rows"]` and `record.get("rows")` read a field by its name, as from a dictionary.
    """

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants", protected_namespaces=())

    def __getitem__(self, key: str) -> Any:
        try:
            return getattr(self, key)
        except AttributeError:
            raise KeyError(key) from None

    def get(self, key: str, default: Any = None) -> Any:
        """The field of that name, or the default."""
        return getattr(self, key, default)

    @classmethod
    def parse(cls, content: bytes | str, place: object) -> Self:
        """The record in JSON text.

        Args:
            content: JSON, as `to_json` wrote it.
            place: where it was read from, for the error.

        Raises:
            UserError: the text is not JSON, or a field is missing or has the wrong type.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            problem = f"{field}: {first['msg']}" if field else first["msg"]
            raise UserError(f"{place} cannot be read as {cls.__name__} ({problem}): restore the file") from None

    def to_json(self) -> str:
        """The record as one line of JSON, in the order of its fields."""
        return self.model_dump_json()


class VersionedRecord(Record):
    """A record that is a file, or a line of one: it says which format it has.

    A subclass sets `FORMAT`, the newest format that it reads and the one that it writes.
    """

    FORMAT: ClassVar[int] = 1
    format_version: int

    @classmethod
    def parse(cls, content: bytes | str, place: object) -> Self:
        """As `Record.parse`; also raises UserError for a format that is newer than this version knows."""
        record = super().parse(content, place)
        if record.format_version > cls.FORMAT:
            raise UserError(
                f"{place} has format {record.format_version}, and this version reads up to {cls.FORMAT}: "
                "update patchloom"
            )
        return record
