"""Conditions: `--where` and `--sort` of a search of the registry, as filters and orders of MLflow's server."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from patchloom.errors import UserError

CONDITION = re.compile(r"\s*(`[^`]+`|[^\s`<>=!]+)\s*(<=|>=|!=|=|<|>|\b(?:I?LIKE)\b)\s*(.+?)\s*", re.IGNORECASE)
ORDER_KEY = re.compile(r"\s*(`[^`]+`|[^\s`]+)(?:\s+(asc|desc))?\s*", re.IGNORECASE)
# attributes of a version that MLflow can filter and sort by, by their names here
FILTERED = {"name": "name", "version": "version_number", "run_id": "run_id"}
SORTED = {
    "name": "name",
    "version": "version_number",
    "created": "creation_timestamp",
    "updated": "last_updated_timestamp",
}
NUMBER_SIGNS = ("<", "<=", ">", ">=", "=", "!=")
TEXT_SIGNS = ("=", "!=", "LIKE", "ILIKE")
LEAST_NUMBER = "-" + "9" * 30  # MLflow does not read exponents
MOST_DIGITS = 300
EXAMPLES = 'such as "fid < 12", "recipe.patches.p = 0.5" or "tags.kind = \'latents\'"'


@dataclass(frozen=True)
class SearchQuery:
    """What to ask MLflow for. `of_runs` and `of_versions` are clauses of filters, which all have to hold.

    `run_order` and `version_order` are clauses of orders. `local_order` is a tag (`tags.kind`) or an attribute by which
    MLflow cannot sort this search, with True for a falling order.
    """

    of_versions: tuple[str, ...] = ()
    of_runs: tuple[str, ...] = ()
    version_order: str | None = None
    run_order: str | None = None
    local_order: tuple[str, bool] | None = None

    @property
    def needs_runs(self) -> bool:
        """Whether MLflow has to search runs, which have the metrics and parameters."""
        return bool(self.of_runs or self.run_order)


def search_query(name: str | None, where: Sequence[str], sort: str | None) -> SearchQuery:
    """The query of a search.

    Args:
        name: only versions of this model.
        where: conditions, all of which have to hold: `fid < 12`, `recipe.patches.p = 0.5`, `tags.kind = 'latents'`.
        sort: a key of the same form, followed by `desc` for a falling order.

    Raises:
        UserError: a condition or the key cannot be read, or MLflow cannot compare it so.
    """
    of_versions = [f"name = {quoted(name)}"] if name is not None else []
    of_runs: list[str] = []
    for condition in where:
        is_of_run, clause = _clause(condition)
        (of_runs if is_of_run else of_versions).append(clause)
    query = SearchQuery(tuple(of_versions), tuple(of_runs))
    return _sorted_query(query, sort) if sort else query


def _clause(condition: str) -> tuple[bool, str]:
    """Whether a condition is one of runs (not of versions), and MLflow's clause for it."""
    match = CONDITION.fullmatch(condition)
    if not match:
        raise UserError(f"--where: {condition!r} is not KEY SIGN VALUE, {EXAMPLES}")
    key, sign, value = match[1], match[2].upper(), match[3]
    kind, name = _kind_and_name(key)
    if kind == "attribute" and name not in FILTERED:
        kind = "metrics"
    signs = NUMBER_SIGNS if kind == "metrics" or (name == "version" and kind == "attribute") else TEXT_SIGNS
    if sign not in signs:
        why = "" if kind == "metrics" else " (MLflow compares it as text)"
        raise UserError(f"--where: {condition!r}: {key} cannot be compared by {sign}{why}: use {' '.join(signs)}")
    if signs is NUMBER_SIGNS:
        value = _number(condition, value, whole=kind == "attribute")
        return kind == "metrics", f"{_mlflow_key(kind, name)} {sign} {value}"
    return kind == "params", f"{_mlflow_key(kind, name)} {sign} {quoted(_text(value))}"


def _sorted_query(query: SearchQuery, sort: str) -> SearchQuery:
    match = ORDER_KEY.fullmatch(sort)
    if not match:
        raise UserError(f"--sort: {sort!r} is not KEY or KEY desc, such as fid, 'precision desc' or created")
    kind, name = _kind_and_name(match[1])
    direction = "DESC" if (match[2] or "").lower() == "desc" else "ASC"
    if kind == "tags":
        return replace(query, local_order=(f"tags.{name}", direction == "DESC"))
    if kind == "attribute" and name in SORTED:
        if query.needs_runs:
            return replace(query, local_order=(SORTED[name], direction == "DESC"))
        return replace(query, version_order=f"{SORTED[name]} {direction}")
    kind = "metrics" if kind == "attribute" else kind
    key = _mlflow_key(kind, name)
    # a run without the key would be listed last, and there can be any number of them
    has_key = f"{key} >= {LEAST_NUMBER}" if kind == "metrics" else f"{key} LIKE '%'"
    return replace(query, of_runs=(*query.of_runs, has_key), run_order=f"{key} {direction}")


def _kind_and_name(key: str) -> tuple[str, str]:
    """`recipe.patches.p` -> ("params", "patches.p"); a key without a prefix is an attribute or a metric."""
    if key.startswith("`"):
        return "metrics", key.strip("`")
    prefix, dot, name = key.partition(".")
    kinds = {"metrics": "metrics", "metric": "metrics", "params": "params", "recipe": "params", "tags": "tags"}
    if dot and name and prefix in kinds:
        return kinds[prefix], name.strip("`")
    return "attribute", key


def _mlflow_key(kind: str, name: str) -> str:
    return FILTERED[name] if kind == "attribute" else f"{kind}.`{name}`"


def _number(condition: str, value: str, whole: bool) -> str:
    try:
        number = Decimal(int(value)) if whole else Decimal(value)
    except (ValueError, ArithmeticError):
        number = Decimal("nan")
    if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
        raise UserError(f"--where: {condition!r}: {value} is not a {'whole ' if whole else ''}number")
    return f"{number:f}"


def _text(value: str) -> str:
    """A value without the quotes around it."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def quoted(text: str) -> str:
    """A text in a filter of MLflow, which knows two kinds of quotes and no escapes."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise UserError(f"{text!r} has both kinds of quotes, and MLflow cannot search for it")
