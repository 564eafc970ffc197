"""Sections of recipes and searches: YAML read into frozen values. Errors name the path of the key."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from patchloom.errors import UserError, did_you_mean
from patchloom.platform.files.storage import whole_number

_Number = TypeVar("_Number", int, float)
SHOWN_PROBLEMS, SHOWN_TEXT = 4, 120
MOST_YAML_BYTES, MOST_YAML_VALUES, MOST_YAML_LEVELS = 1 << 20, 100_000, 64
TOO_DEEP = f"it has values inside of themselves, or more than {MOST_YAML_LEVELS} levels"


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


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Aliases can stand for any number of values, also for the values that they are in, so what they stand for is counted
    before anything is made of it.

    Raises:
        ValueError: the text is not YAML, or has too many values or levels.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        AttributeError,
    ) as error:  # of a constructor
        raise ValueError(" ".join(str(error).split())) from None


def _count_values(node: yaml.Node, counted: dict[int, int], above: tuple[int, ...] = ()) -> int:
    """The number of values in a node with those that aliases stand for. `counted` has the nodes that are done."""
    if id(node) in above or len(above) > MOST_YAML_LEVELS:
        raise ValueError(TOO_DEEP)
    if id(node) not in counted:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_count_values(part, counted, (*above, id(node))) for part in inner)
        if counted[id(node)] > MOST_YAML_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_YAML_VALUES:,} values")
    return counted[id(node)]


def parse_value(text: str, key: str) -> Any:
    """The value of `--set key=text`, read as YAML; raises UserError if it is not YAML."""
    try:
        return parse_yaml(text)
    except ValueError as error:
        shown = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."
        raise UserError(f"--set {key}={shown}: the value is not valid YAML ({error}); put it in quotes") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; raises UserError if it has no keys."""
    try:
        if path.stat().st_size > MOST_YAML_BYTES:
            raise ValueError(f"it has more than {MOST_YAML_BYTES >> 20} MiB")
        values = parse_yaml(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
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
        expected = item["ctx"]["expected"]
        similar = did_you_mean(item["input"], re.findall(r"'([^']+)'", expected))
        message = f"{item['input']!r} is not one of {expected}{similar}"
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
