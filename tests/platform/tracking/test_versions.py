"""Searches of a registry with thousands of versions: what they find, in which order, and how much they read."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy
from helpers import environment, free_port
from large_registry import fill_registry

from patchloom.errors import UserError
from patchloom.platform.tracking.client import connect
from patchloom.platform.tracking.conditions import search_query
from patchloom.platform.tracking.versions import list_versions, search_versions

POSTGRES = Path("/usr/lib/postgresql/15/bin")
MANY = 1500


@contextmanager
def filled_store(uri: str) -> Iterator[str]:
    with environment(MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="Default"):
        connect()
        fill_registry(uri, "few", 20)
        fill_registry(uri, "many", MANY)
        yield uri


@pytest.fixture(scope="module")
def sqlite_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with filled_store(f"sqlite:///{tmp_path_factory.mktemp('large') / 'mlflow.db'}") as uri:
        yield uri


@pytest.fixture
def postgres_store() -> Iterator[str]:
    """A store on a PostgreSQL server of its own; the server refuses to run as root."""
    if not (POSTGRES / "initdb").is_file():
        pytest.skip("PostgreSQL 15 is not installed")
    folder, port = Path(tempfile.mkdtemp()), free_port()  # another user cannot reach pytest's folders
    user = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.getuid() == 0 else []
    if user:
        shutil.chown(folder, "nobody")
    run = [*user, str(POSTGRES / "pg_ctl"), "-D", str(folder / "data"), "-s", "-w"]
    subprocess.run([*run, "init", "-o", "-U mlflow --auth=trust"], check=True, cwd="/", stdout=subprocess.DEVNULL)
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    subprocess.run([*run, "start", "-o", options, "-l", str(folder / "log")], check=True, cwd="/")
    try:
        with filled_store(f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres") as uri:
            yield uri
    finally:
        subprocess.run([*run, "stop", "-m", "immediate"], check=True, cwd="/")
        shutil.rmtree(folder)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Statements that MLflow sends to its database, and rows of versions, runs and tags that come back."""
    counts = {"statements": 0, "rows": 0}

    def sent(*_: object) -> None:
        counts["statements"] += 1

    def loaded(*_: object) -> None:
        counts["rows"] += 1

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", sent)
    sqlalchemy.event.listen(sqlalchemy.orm.Mapper, "load", loaded)
    yield counts
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", sent)
    sqlalchemy.event.remove(sqlalchemy.orm.Mapper, "load", loaded)


def numbers(**search: object) -> list[int]:
    page = search_versions(**{"name": "many", "limit": 5, **search})  # type: ignore[arg-type]
    return [int(version.version) for version in page.versions]


def check_searches() -> None:
    """Version V has fid V / 10, p 0.5 where V is even, and the tag `half`: first or second."""
    assert numbers() == [1500, 1499, 1498, 1497, 1496]
    assert numbers(sort="version") == [1, 2, 3, 4, 5]
    assert numbers(sort="fid") == [1, 2, 3, 4, 5] and numbers(sort="fid desc")[0] == 1500
    assert numbers(where=["fid < 12"], sort="fid desc") == [119, 118, 117, 116, 115]
    assert numbers(where=["fid >= 12", "recipe.patches.p = 0.5"], sort="fid") == [120, 122, 124, 126, 128]
    assert numbers(where=["tags.half = 'second'"], sort="version")[0] == 751
    assert numbers(where=["fid > 1", "tags.half != 'first'"], sort="fid")[0] == 751
    assert numbers(where=["version <= 3"]) == [3, 2, 1]
    assert numbers(where=["recipe.patches.p LIKE '0.2%'"], sort="fid") == [1, 3, 5, 7, 9]
    assert numbers(where=["fid < 0.35"], sort="version desc") == [3, 2, 1]
    assert numbers(sort="tags.half desc")[0] > 750 and numbers(sort="tags.nonesuch") == []
    assert numbers(where=["fid < -1e-3"]) == [] and numbers(name="none", sort="fid") == []
    assert numbers(name="few", sort="fid desc", limit=2) == [20, 19] and numbers(name="few", limit=2) == [20, 19]


def check_pages() -> None:
    seen: list[int] = []
    page = None
    for limit in (70, 5, 190, 5):  # pages may have different lengths
        found = search_versions("many", ["fid <= 27"], "fid", limit, page)
        seen += [int(version.version) for version in found.versions]
        page = found.next_page
    assert seen == list(range(1, 271)) and page is None


def test_searches_on_sqlite(sqlite_store: str) -> None:
    check_searches()
    check_pages()


@pytest.mark.slow
def test_searches_on_postgresql(postgres_store: str) -> None:
    check_searches()
    check_pages()


@pytest.mark.parametrize("search", [{}, {"sort": "fid"}, {"name": "few", "where": ["fid > 0"]}])
def test_limited_list_reads_as_much_of_a_large_registry_as_of_a_small_one(
    sqlite_store: str, search: dict[str, object]
) -> None:
    with counted() as first:
        search_versions(limit=10, **search)  # type: ignore[arg-type]
    fill_registry(sqlite_store, f"more-{len(str(search))}", MANY)
    with counted() as second:
        search_versions(limit=10, **search)  # type: ignore[arg-type]
    assert second["statements"] <= first["statements"]  # the first call also opens the store
    assert second["rows"] <= first["rows"] + 10 and first["rows"] < 1000


def test_list_without_a_limit_reads_every_version_once(sqlite_store: str) -> None:
    found = list_versions("many")
    assert [int(version.version) for version in found] == list(range(MANY, 0, -1))


@pytest.mark.parametrize(
    ("condition", "named"),
    [("fid", "fid"), ("fid < low", "low"), ("recipe.patches.p < 0.5", "recipe.patches.p"), ("version = 1.5", "1.5"),
     ("fid = nan", "nan"), ("tags.x = 'a\"b'c'", "quotes"), ("fid < 1 OR fid > 2", "fid")],
)  # fmt: skip
def test_wrong_condition_is_refused_and_named(condition: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        search_query(None, [condition], None)


def test_token_of_something_else_is_refused(sqlite_store: str) -> None:
    with pytest.raises(UserError, match="--page"):
        search_versions(page="nonsense")
