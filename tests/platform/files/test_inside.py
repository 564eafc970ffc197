"""Names from cards, manifests, archives and listings: none of them leaves its folder, by `..`, a link or a device."""

import os
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import dataset_card, within

from patchloom.errors import UserError
from patchloom.pipelines.report import report
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.files.copies import pull_folder
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.inside import inner_name, inner_path
from patchloom.platform.records.reference import StoredFile, StoredModel
from patchloom.platform.records.run import ProgressLine, RunCard
from patchloom.platform.records.search import read_trials
from patchloom.platform.tracking.references import fetch_stored

OUTSIDE = ["/etc/passwd", "../x", "a/../../x", "a/..", "..", "", "a//b", "a/", "a\0b", "C:/x", "C:\\x", "a\\..\\..\\x"]
ESCAPE = "a/../../../../PWN"


def refusal_of(work: object) -> str:
    """The one line with which work is refused."""
    with pytest.raises(UserError) as refused:
        work()  # type: ignore[operator]
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_a_folder_are_refused(name: str) -> None:
    assert "outside" in refusal_of(lambda: inner_name(name, "card"))


@pytest.mark.parametrize("name", ["a", "./a", "a/b.c", "..a/b..", "a:b", "Läufe/ε 日本", "a\\b", "...", "a?b"])
def test_other_names_are_kept(name: str) -> None:
    assert inner_name(name, "card") == name


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_no_method_of_a_folder_leaves_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    there = request.getfixturevalue("there") if kind == "s3" else Folder(str(tmp_path / "in"))
    (tmp_path / "file").write_text("x")
    for work in (
        lambda: there.open("../file"),
        lambda: there.read("../file"),
        lambda: there.read_piece("../file", 0, 1),
        lambda: there.has("../file"),
        lambda: there.size("../file"),
        lambda: there.write("../new/file", "x"),
        lambda: there.put(tmp_path / "file", "../new/file"),
        lambda: there.fetch("../file", tmp_path / "in" / "../new/file"),
        lambda: there.remove("../file"),
        lambda: there.remove_folder("../in"),
        lambda: there.folder("../in"),
    ):
        assert "outside" in refusal_of(work)
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "new").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "shards").symlink_to(tmp_path / "elsewhere")
    assert "link" in refusal_of(lambda: Folder(str(tmp_path / "out")).write("shards/part", b"x"))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("field", ["shard_list", "index"])
def test_card_of_a_remote_dataset_writes_nothing_outside_the_cache(
    field: str, there: Folder, cache: Path, tmp_path: Path
) -> None:
    listed = {"file": ESCAPE, "shards": 1, "rows": 1, "bytes": 1, "sha256": "0" * 64}
    there.write_json("dataset.json", dataset_card([], **{field: listed}))
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    assert ESCAPE in refusal_of(lambda: open_dataset(there.address))
    shard = {"file": ESCAPE, "rows": 1, "bytes": 1, "sha256": "0" * 64}
    there.write_json("dataset.json", dataset_card([shard]))
    assert ESCAPE in refusal_of(lambda: open_dataset(there.address))
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} == before | {cache}


def test_listing_of_a_store_is_checked(there: Folder, here: Path, tmp_path: Path, s3_environment: str) -> None:
    key = f"{there.address.removeprefix('s3://patchloom/')}/..%2F..%2Fevil.png"
    request = urllib.request.Request(f"{s3_environment}/patchloom/{key}", b"evil", method="PUT")
    urllib.request.urlopen(request, timeout=20).close()
    assert "evil.png" in refusal_of(there.files)
    assert "evil.png" in refusal_of(lambda: pull_folder(there, here))
    assert "evil.png" in refusal_of(lambda: open_source(there.address))
    assert not list(here.glob("**/*.png")) and not (tmp_path / "evil.png").exists()


def test_registered_version_cannot_refer_to_files_of_this_machine(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "private").write_text("x")
    stored = StoredModel(address=str(tmp_path), files={"private": StoredFile(size_bytes=1, sha256="0" * 64)})
    assert "object store" in refusal_of(lambda: fetch_stored(stored))


def table_of(folder: Path, path: str) -> SourceReader:
    """A reader of a table whose only row is a path."""
    pa.parquet.write_table(pa.table({"image": [path]}), folder / "a.parquet")
    source = open_source(str(folder / "a.parquet"))
    return SourceReader(source.kind, source.address)


def test_cell_of_a_table_reads_only_regular_files_in_its_folder(here: Path, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(b"private")
    (here / "link.png").symlink_to(tmp_path / "private.png")
    (here / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(here / "pipe.png")
    (here / "real.png").write_bytes(b"real")
    (here / "inner.png").symlink_to("real.png")
    for name in ("/etc/passwd", "../private.png", "link.png", "zero.png", "pipe.png"):
        reader = table_of(here, name)
        assert name in within(10, lambda reader=reader: refusal_of(lambda: reader.read(["a.parquet", "image", 0])))
    for name in ("real.png", "inner.png", "./real.png"):
        assert table_of(here, name).read(["a.parquet", "image", 0]) == b"real"


def test_pipe_and_device_among_images_are_not_read(here: Path) -> None:
    os.mkfifo(here / "pipe.png")
    (here / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(OSError, match="regular"):
            within(10, lambda name=name: _result_of(lambda: Folder(str(here)).read(name)))()


def _result_of(work: object) -> object:
    """A function that returns or raises what work does, which has been done."""
    try:
        value = work()  # type: ignore[operator]
    except Exception as error:
        found = error

        def fail() -> None:
            raise found

        return fail
    return lambda: value


@pytest.mark.parametrize("preview", ["/etc/passwd", "../private.png", "link.png", "text.png"])
def test_page_shows_no_file_outside_of_the_run(preview: str, here: Path, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(b"\x89PNG\r\n\x1a\nprivate")
    (here / "link.png").symlink_to(tmp_path / "private.png")
    (here / "text.png").write_text("private")
    RunCard(dataset_fingerprint="0").write(here)
    ProgressLine(step=1, loss=1.0, preview=preview).append_to(here)
    refusal_of(lambda: report(str(here), str(tmp_path / "page.html")))
    assert not (tmp_path / "page.html").exists()


def test_names_of_trials_stay_in_their_search(here: Path) -> None:
    (here / "trials.jsonl").write_text('{"name": "../../x", "settings": {}, "status": "finished"}\n')
    assert "../../x" in refusal_of(lambda: read_trials(Folder(str(here))))


def test_links_inside_a_folder_are_followed(here: Path) -> None:
    (here / "a").mkdir()
    (here / "a" / "real").write_text("x")
    (here / "link").symlink_to("a/real")
    assert inner_path(here, "link", "card").read_text() == "x"
