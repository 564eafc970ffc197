"""Sections of recipes and searches: YAML read into frozen values. Errors name the path of the key."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from patchloom.errors import UserError
from patchloom.platform.files.storage import whole_number

_Number = TypeVar("_Number", int, float)
SHOWN_PROBLEMS = 4


def _fraction(value: float) -> float:
    if not 0 <= value <= 1:
        raise PydanticCustomError("fraction", f"{value:g} is not between 0 and 1")
    return value


def _above_zero(value: _Number) -> _Number:
    if not value > 0:
        raise PydanticCustomError("above_zero", f"{value:g} is not above 0")
    return value


Fraction = Annotated[float, AfterValidator(_fraction), Field(json_schema_extra={"minimum": 0, "maximum": 1})]
Positive = Annotated[float, AfterValidator(_above_zero), Field(json_schema_extra={"exclusiveMinimum": 0})]
Count = Annotated[int, AfterValidator(_above_zero), Field(json_schema_extra={"minimum": 1})]


class Section(BaseModel):
    """The base of all sections: frozen, without unknown keys, without NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a key such as `a.b.0.c` in nested dictionaries and lists.

    Raises:
        UserError: the path leads through a single value, or to a position that a list does not have.
    """
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        if isinstance(place, list):
            place = place[_list_index(place, part, key)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise UserError(f"{key}: {part} is below a single value; check the key")
    if isinstance(place, list):
        place[_list_index(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(f"{key}: {last} is below a single value; check the key")


def _list_index(place: list[Any], part: str, key: str) -> int:
    index = whole_number(part)
    if index is None or index >= len(place):
        raise UserError(f"{key}: {part} is not a position in this list of {len(place)}; positions start at 0")
    return index


def parse_value(text: str, key: str) -> Any:
    """The value of `--set key=text`, read as YAML; raises UserError if it is not YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {key}={text}: the value is not valid YAML; put it in quotes") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; raises UserError if it has no keys."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = str(error).replace("\n", " ")
        raise UserError(f"{path} is not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} contains no keys; a recipe starts with `name:`")
    return values


def checked(kind: type[SectionType], values: Mapping[str, object]) -> SectionType:
    """Build a section from plain values; raises UserError with the path of each problem."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, item) for item in error.errors(include_url=False)]
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise UserError("; ".join(problems[:SHOWN_PROBLEMS] + more)) from None


def _problem(kind: type[Section], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(kind, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: this key is required"
    message = item["msg"]
    if item["type"] == "literal_error":
        message = f"{item['input']!r} is not one of {item['ctx']['expected']}"
    elif "valid" in message.lower():
        message = f"{item['input']!r} is not valid: {message[0].lower()}{message[1:]}"
    return f"{path}: {message}" if path else message


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The known keys of the section at a path, which may lead through lists and dictionaries of sections."""
    current: type[BaseModel] = kind
    for part in location:
        if part not in current.model_fields:
            continue  # a position in a list, or a key of a dictionary
        annotation = current.model_fields[part].annotation
        sections = [inner for inner in (annotation, *get_args(annotation)) if _is_section(inner)]
        if not sections:
            break
        current = sections[0]
    return list(current.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
