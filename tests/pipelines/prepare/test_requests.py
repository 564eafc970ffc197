"""Requests of a preparation to an S3 server: few for each shard, none twice."""

import re
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from helpers import environment, shard_hashes
from sources_on_disk import png, write_tar, write_zip

from patchloom.errors import UserError
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.preparing import PrepareJob
from patchloom.platform.files.folder import Folder

ROWS, SHARDS = 10, 40
REQUEST = re.compile(r'"(?:\x1b\[[0-9;]*m)*([A-Z]+) (\S+) HTTP')


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images for 40 shards, of which one row cannot be used in every third shard."""
    images = np.random.default_rng(0).integers(0, 256, (ROWS * SHARDS, 8, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("source") / "images.npz"
    np.savez(path, images=images)
    return path


def requests_since(log: Path, start: int, folder: str = "prepared") -> Counter[str]:
    """How often each kind of file in a folder was asked for, by method and the name without its number."""
    time.sleep(0.2)  # the server writes its line after its answer
    text = log.read_bytes()[start:].decode()
    return Counter(
        f"{method} {re.sub('-[0-9]+', '', path.partition('?')[0])}"
        for method, path in REQUEST.findall(text)
        if f"/{folder}/" in path
    )


def test_a_remote_preparation_needs_four_requests_per_shard(s3: str, s3_log: Path, array: Path, tmp_path: Path) -> None:
    start = s3_log.stat().st_size
    there = Folder.at(f"{s3}/prepared/{tmp_path.name}")
    dataset = prepare(str(array), there.address, resolution=8, shard_rows=ROWS, workers=0)
    found = requests_since(s3_log, start)
    prefix = f"/patchloom/prepared/{re.sub('-[0-9]+', '', tmp_path.name)}"
    assert found[f"PUT {prefix}/shards/part.arrow"] == found[f"PUT {prefix}/.work/notes/part.json"] == SHARDS
    assert (
        found[f"GET {prefix}/.work/inputs/list.jsonl"] == SHARDS and found[f"PUT {prefix}/.work/inputs/list.jsonl"] == 1
    )
    assert not [
        name for name in found if name.startswith(("POST", "DELETE", "HEAD")) and ("part" in name or "list" in name)
    ]
    assert found.total() <= 4 * SHARDS  # with those of the fence, the plan, the card, skipped.jsonl and lists of files
    assert f"GET {prefix}/shards/part.arrow" not in found and len(dataset) == ROWS * SHARDS  # nothing came back
    prepare(str(array), str(tmp_path / "here"), resolution=8, shard_rows=ROWS, workers=0)
    for name in ("dataset.json", "skipped.jsonl", *(f"shards/{name}" for name in shard_hashes(tmp_path / "here"))):
        assert there.read(name) == (tmp_path / "here" / name).read_bytes()
    assert sorted(there.files()) == sorted(Folder.at(tmp_path / "here").files().keys() - {".lock"})


@pytest.mark.parametrize("kind", ["tar", "zip", "shards"])
def test_images_of_a_remote_archive_come_with_one_request_per_shard(
    kind: str, s3: str, s3_log: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    members = [
        (f"{number:04d}.png", png(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
        for number in range(ROWS * SHARDS)
    ]
    labelled = [one for name, content in members for one in ((f"{name[:-4]}.cls", b"3"), (name, content))]
    (tmp_path / "source").mkdir()
    if kind == "zip":
        write_zip(tmp_path / "source/images.zip", members)
    elif kind == "tar":
        write_tar(tmp_path / "source/images.tar", members)
    else:
        for part in range(4):
            write_tar(tmp_path / f"source/{part}.tar", labelled[part * len(labelled) // 4 :][: len(labelled) // 4])
    there = Folder.at(f"{s3}/sources/{tmp_path.name}")
    for path in (tmp_path / "source").iterdir():
        there.put(path, path.name)
    name = "" if kind == "shards" else f"/images.{kind}"
    start = s3_log.stat().st_size
    target = Folder.at(f"{s3}/prepared/{tmp_path.name}")
    prepare(there.address + name, target.address, resolution=8, shard_rows=ROWS, workers=0)
    found = requests_since(s3_log, start, "sources")
    assert SHARDS <= sum(count for request, count in found.items() if request.startswith("GET")) <= SHARDS + 12
    assert found.total() + requests_since(s3_log, start).total() <= 4 * SHARDS + 50  # those for the whole
    prepare(f"{tmp_path}/source{name}", str(tmp_path / "here"), resolution=8, shard_rows=ROWS, workers=0)
    assert target.read("dataset.json") == (tmp_path / "here" / "dataset.json").read_bytes()


@pytest.mark.slow
def test_no_image_is_skipped_when_the_store_fails(
    s3: str, s3_environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = png(np.zeros((8, 8, 3), np.uint8))
    write_tar(tmp_path / "images.tar", [(f"{number}.png", image) for number in range(20)])
    Folder.at(f"{s3}/sources/{tmp_path.name}").put(tmp_path / "images.tar", "images.tar")
    with FaultyProxy(s3_environment) as proxy, environment(PATCHLOOM_STORE_WAIT_S="0.1"):
        server = proxy.address.removeprefix("http://")
        source = f"{s3}/sources/{tmp_path.name}/images.tar?scheme=http&endpoint_override={server}"
        make = partial(prepare, source, str(tmp_path / "data"), resolution=8, shard_rows=5, workers=0)
        with monkeypatch.context() as patch:  # the store fails after the images were listed
            start = PrepareJob.start
            patch.setattr(PrepareJob, "start", lambda job: (start(job), proxy.set("503"))[0])
            with pytest.raises(UserError, match="cannot be reached"):
                make()
        proxy.set("ok")
        dataset = make()
    assert len(dataset) == 20 and dataset.card.skipped.count == 0


def test_the_call_after_an_interruption_reads_the_notes_of_the_first(
    s3: str, s3_log: Path, array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Folder.at(f"{s3}/prepared/{tmp_path.name}")
    with monkeypatch.context() as patch:  # like a kill between the last shard and the card
        patch.setattr(PrepareJob, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(array), there.address, resolution=8, shard_rows=ROWS, workers=0)
    there.remove(".work/notes/part-00003.json")  # as if this shard were unfinished
    start = s3_log.stat().st_size
    prepare(str(array), there.address, resolution=8, shard_rows=ROWS, workers=0)
    found = requests_since(s3_log, start)
    prefix = f"/patchloom/prepared/{re.sub('-[0-9]+', '', tmp_path.name)}"
    assert found[f"PUT {prefix}/shards/part.arrow"] == 1
    prepare(str(array), str(tmp_path / "here"), resolution=8, shard_rows=ROWS, workers=0)
    assert there.read("dataset.json") == (tmp_path / "here" / "dataset.json").read_bytes()
