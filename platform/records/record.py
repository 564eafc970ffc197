"""The base classes of all records: frozen values that are checked when they are read."""

from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from patchloom.errors import UserError


class Record(BaseModel):
    """A frozen value with typed fields. It keeps fields that this version does not know.

    A record can be read like the dictionary in its JSON file: `record["rows"]`, `record.get("rows")`,
    `"rows" in record`, `dict(record)`, and `record == {...}`.
    """

    model_config = ConfigDict(
        frozen=True, extra="allow", populate_by_name=True, ser_json_inf_nan="constants", protected_namespaces=()
    )

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        return getattr(self, self._field_names().get(key, key))

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other if isinstance(other, Mapping) else super().__eq__(other)

    def get(self, key: str, default: Any = None) -> Any:
        """The field of that name, or the default."""
        try:
            return self[key]
        except KeyError:
            return default

    def keys(self) -> KeysView[str]:
        """The names of the fields in the JSON file."""
        return dict.fromkeys([*self._field_names(), *(self.model_extra or {})]).keys()

    @classmethod
    def _field_names(cls) -> dict[str, str]:
        """The Python name of each field by its name in the JSON file (`class_name` is `class` there)."""
        return {field.alias or name: name for name, field in cls.model_fields.items()}

    @classmethod
    def parse(cls, content: bytes | str, place: object) -> Self:
        """Read a record from JSON text.

        Args:
            content: JSON, as `to_json` writes it.
            place: where the text was read from, for the error message.

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

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a record from a JSON file, as `parse` does."""
        return cls.parse(path.read_bytes(), path)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values, in the order of its fields."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """The record as one line of JSON, in the order of its fields."""
        return self.model_dump_json(by_alias=True)


class FormatVersion(Record):
    """The format of a record, whatever else the record holds; 0 where it is not given."""

    model_config = ConfigDict(extra="ignore")
    format_version: int = 0


class VersionedRecord(Record):
    """A record that is a file, or a line of a file, with a format version.

    A subclass sets `FORMAT`: the format that it writes, and the newest format that it reads.
    """

    FORMAT: ClassVar[int] = 1
    format_version: int

    @classmethod
    def parse(cls, content: bytes | str, place: object) -> Self:
        """Read a record from JSON text, as `Record.parse` does.

        Raises:
            UserError: as in `Record.parse`, or the record has a newer format than this version reads.
        """
        version = FormatVersion.parse(content, place).format_version
        if version > cls.FORMAT:
            raise UserError(
                f"{place} has format {version}, and this version reads up to {cls.FORMAT}: update patchloom"
            )
        return super().parse(content, place)


def flat_values(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested values by dotted names such as `patches.p`."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= flat_values(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
