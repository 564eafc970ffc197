"""Versions: registered versions by conditions and in an order, read page by page from MLflow's server."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from patchloom.errors import UserError
from patchloom.platform.tracking.client import open_registry, open_store
from patchloom.platform.tracking.conditions import SearchQuery, quoted, search_query

if TYPE_CHECKING:
    from mlflow import MlflowClient

NEWEST_OF_EACH_NAME = "name ASC", "version_number DESC"
PAGE = 1000  # versions per request of a search without a limit, and versions whose runs can be searched for
VERSIONS_PER_PAGE = 200
RUNS_PER_PAGE = 50  # their ids must fit into one address
NAMES_PER_REQUEST = 50


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model, as MLflow stores it."""

    name: str
    version: str
    aliases: list[str]
    run_id: str | None
    created_unix_s: float
    description: str
    tags: dict[str, str]


@dataclass(frozen=True)
class VersionPage:
    """Some of the versions that a search finds, and the token of the next page; None after the last."""

    versions: list[RegisteredVersion]
    next_page: str | None


@dataclass(frozen=True)
class _Position:
    """Where a page begins: the token of MLflow's page, and how many of its versions were shown already."""

    token: str | None = None
    skip: int = 0

    def encoded(self) -> str:
        return base64.urlsafe_b64encode(json.dumps([self.token, self.skip]).encode()).rstrip(b"=").decode()


def search_versions(
    name: str | None = None,
    where: Sequence[str] = (),
    sort: str | None = None,
    limit: int = 100,
    page: str | None = None,
) -> VersionPage:
    """One page of the versions that meet all conditions. MLflow's server filters and sorts.

    Args:
        name: only versions of this model.
        where: conditions on metrics of the version's run (`fid < 12`), parameters of its recipe
            (`recipe.patches.p = 0.5`), its tags (`tags.kind = 'latents'`), and `name`, `version` and `run_id`.
        sort: `name`, `version`, `created`, `updated`, or a metric, parameter or tag, followed by `desc` for a falling
            order; versions without it are left out. MLflow cannot sort by tags, so all versions that meet the
            conditions are read. Default: by name, newest version first; with a condition on a metric or parameter,
            newest run first.
        limit: how many versions at most.
        page: the `next_page` of the page before, of the same search.

    Raises:
        UserError: a condition is invalid, the token is not one of this search, or MLflow does not answer.
    """
    query = search_query(name, where, sort)
    with _opened_for(query) as client:
        found = list(islice(_search(client, query, _position(page)), limit + 1))
        more = found[limit][0].encoded() if len(found) > limit else None
        return VersionPage(_with_aliases(client, [version for _, version in found[:limit]]), more)


def list_versions(
    name: str | None = None, *, where: Sequence[str] = (), sort: str | None = None, limit: int | None = None
) -> list[RegisteredVersion]:
    """The versions of the registered models, newest first for each name.

    Args:
        name: list only the versions of this model.
        where: conditions that all have to hold, such as "fid < 12", "recipe.patches.p = 0.5" or "tags.kind = 'pixels'".
        sort: a metric, parameter, tag, `version` or `created`; followed by " desc" for a falling order.
        limit: how many versions at most; None reads all.

    Raises:
        UserError: a condition is invalid, or MLflow does not answer.

    Example:
        for version in patchloom.list_versions("my-model", where=["tags.kind = 'pixels'"]):
            print(version.name, version.version, version.aliases, version.tags.get("quality"))
    """
    query = search_query(name, where, sort)
    with _opened_for(query) as client:
        found = islice(_search(client, query, _Position(), VERSIONS_PER_PAGE if limit else PAGE), limit)
        return _with_aliases(client, [version for _, version in found])


@contextmanager
def _opened_for(query: SearchQuery) -> Iterator["MlflowClient"]:
    """A client of the stores that a query needs."""
    with open_registry() as client, open_store() if query.needs_runs else nullcontext():
        yield client


def _position(page: str | None) -> _Position:
    if page is None:
        return _Position()
    try:
        token, skip = json.loads(base64.urlsafe_b64decode(page + "=" * (-len(page) % 4)))
        return _Position(None if token is None else str(token), int(skip))
    except (ValueError, TypeError):
        raise UserError(f"--page: {page[:80]} is not the token of a page: copy it from the list before") from None


def _search(
    client: "MlflowClient", query: SearchQuery, begin: _Position, page_size: int = VERSIONS_PER_PAGE
) -> Iterator[tuple[_Position, Any]]:
    """MLflow's entities of the versions that a query finds, each with its position, from a position on."""
    if query.local_order:
        yield from _sorted_here(client, query, begin.skip)
        return
    token, skip = begin.token, begin.skip
    while True:
        if query.needs_runs:
            versions, following = _page_of_runs(client, query, token)
        else:
            versions, following = _page_of_versions(client, query, token, page_size)
        for number, version in enumerate(versions[skip:], start=skip):
            yield _Position(token, number), version
        token, skip = following, 0
        if not token:
            return


def _page_of_versions(
    client: "MlflowClient", query: SearchQuery, token: str | None, page_size: int
) -> tuple[list[Any], str | None]:
    order = [query.version_order] if query.version_order else []
    # a key can be in an order only once
    order += [clause for clause in NEWEST_OF_EACH_NAME if not order or clause.split()[0] != order[0].split()[0]]
    found = client.search_model_versions(
        " AND ".join(query.of_versions) or None, max_results=page_size, order_by=order, page_token=token
    )
    return list(found), _token_of(found)


def _page_of_runs(client: "MlflowClient", query: SearchQuery, token: str | None) -> tuple[list[Any], str | None]:
    """The versions of a page of runs, in the order of the runs. Runs without a version are skipped.

    MLflow cannot join runs and versions. If only some versions meet the conditions on versions, only their runs are
    searched; otherwise all runs are, and the versions of each page of runs are looked up.
    """
    few = _few_versions(client, query)
    if few == []:
        return [], None
    of_runs = [*query.of_runs, *([_ids_in(version.run_id for version in few)] if few else [])]
    runs = client.search_runs(
        [experiment.experiment_id for experiment in _all_of(client.search_experiments)],
        " AND ".join(of_runs),
        max_results=RUNS_PER_PAGE,
        order_by=[query.run_order] if query.run_order else None,
        page_token=token,
    )
    place = {run.info.run_id: number for number, run in enumerate(runs)}
    if few is None and place:
        few = list(_all_of(client.search_model_versions, " AND ".join([*query.of_versions, _ids_in(place)])))
    found = [version for version in few or () if version.run_id in place]
    found.sort(key=lambda version: (place[version.run_id], version.name, -int(version.version)))
    return found, _token_of(runs)


def _few_versions(client: "MlflowClient", query: SearchQuery) -> list[Any] | None:
    """The versions that meet the conditions on versions; None if there are no such conditions, or many versions."""
    if not query.of_versions:
        return None
    found = client.search_model_versions(" AND ".join(query.of_versions), max_results=PAGE)
    return None if found.token else [version for version in found if version.run_id]


def _ids_in(run_ids: Iterable[str]) -> str:
    return f"run_id IN ({', '.join(map(quoted, run_ids))})"


def _sorted_here(client: "MlflowClient", query: SearchQuery, skip: int) -> Iterator[tuple[_Position, Any]]:
    """All versions that a query finds and that have its key, in an order that MLflow does not have."""
    assert query.local_order is not None
    key, is_falling = query.local_order
    everything = _search(client, replace(query, local_order=None), _Position(), PAGE)
    found = [(value, version) for _, version in everything if (value := _value_of(version, key)) is not None]
    found.sort(key=lambda pair: _sort_value(pair[0]), reverse=is_falling)
    for number, (_, version) in enumerate(found[skip:], start=skip):
        yield _Position(None, number), version


def _value_of(version: Any, key: str) -> str | None:
    if key.startswith("tags."):
        value: str | None = version.tags.get(key.removeprefix("tags."))
        return value
    return str(getattr(version, "version" if key == "version_number" else key))


def _sort_value(value: str) -> tuple[bool, float, str]:
    """Numbers come before texts."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def _with_aliases(client: "MlflowClient", versions: Sequence[Any]) -> list[RegisteredVersion]:
    """MLflow's versions with their aliases, which MLflow stores with the names."""
    aliases = _aliases_of(client, dict.fromkeys(version.name for version in versions))
    return [registered_version(version, aliases.get(version.name, {})) for version in versions]


def _aliases_of(client: "MlflowClient", names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The aliases of each name, with the numbers of their versions."""
    plain = [name for name in names if not set(name) & set("'\"\\")]
    models = [client.get_registered_model(name) for name in names if name not in plain]
    for begin in range(0, len(plain), NAMES_PER_REQUEST):
        chunk = plain[begin : begin + NAMES_PER_REQUEST]
        models += _all_of(client.search_registered_models, f"name IN ({', '.join(map(quoted, chunk))})")
    return {model.name: model.aliases for model in models}


def registered_version(version: Any, aliases: Mapping[str, str]) -> RegisteredVersion:
    """The record of a version of MLflow; `aliases` of its name, with the numbers of their versions."""
    number = str(version.version)
    return RegisteredVersion(
        name=version.name,
        version=number,
        aliases=sorted(alias for alias, aliased in aliases.items() if str(aliased) == number),
        run_id=version.run_id,
        created_unix_s=version.creation_timestamp / 1000,
        description=version.description or "",
        tags=dict(version.tags),
    )


def _token_of(page: Any) -> str | None:
    """The token of MLflow's next page as text; a store in a database returns bytes."""
    token: bytes | str | None = page.token
    return token.decode() if isinstance(token, bytes) else token or None


def _all_of(search: Callable[..., Any], *query: str) -> Iterator[Any]:
    """All results of a search of MLflow, page by page."""
    token = None
    while True:
        page = search(*query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
