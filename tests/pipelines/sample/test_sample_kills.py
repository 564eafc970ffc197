"""Killed sampling continues and gives the same bytes, with any number of workers and any shard size."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import start_cli, wait_until

from patchloom.pipelines.sample import sample

pytestmark = pytest.mark.ray
SEEDS = 240
OPTIONS: dict[str, Any] = {"steps": 12}


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*/*.png"))}


def notes_of(folder: Path) -> list[Path]:
    return list((folder / ".work" / "notes").glob("*.jsonl"))


def seeds_of(folder: Path) -> set[int]:
    """The seeds in the manifest and in the notes."""
    seeds: set[int] = set()
    for path in [folder / "manifest.jsonl", *notes_of(folder)]:
        with suppress(FileNotFoundError):
            seeds |= {json.loads(line)["seed"] for line in path.read_text().splitlines()}
    return seeds


def assert_complete(folder: Path, seeds: int) -> None:
    """Every seed has one file and one line of the manifest, all images differ, and no other file is left."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(seeds))
    assert len({line["sha256"] for line in lines}) == seeds
    images = images_of(folder)
    assert len(images) == len(set(images.values())) == seeds
    assert sorted(line["file"].rsplit("/", 1)[1] for line in lines) == sorted(images)
    assert {path.name for path in folder.iterdir() if not path.is_dir()} - {".verified"} == {
        ".lock", "contact_sheet.png", "manifest.jsonl", "sampling.json",
    }  # fmt: skip
    assert not list(folder.rglob("*.partial")) and not (folder / ".work").exists()


@pytest.fixture(scope="module")
def whole(champion: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without interruption, by one worker, in shards of 16."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    sample(champion, str(folder), list(range(SEEDS)), shard_size=16, workers=1, **OPTIONS)
    assert_complete(folder, SEEDS)
    return folder


def kill_in_pieces(champion: str, cwd: Path, *options: str) -> list[int]:
    """Run a command three times and kill it after 32 more images; the number of finished images each time."""
    arguments = ["sample", champion, "samples", "--seeds", f"0-{SEEDS - 1}", "--steps", str(OPTIONS["steps"]), *options]
    finished: list[int] = []
    for _ in range(3):
        process = start_cli(*arguments, cwd=cwd)
        wanted = (finished or [0])[-1] + 32
        wait_until(lambda wanted=wanted: len(seeds_of(cwd / "samples")) >= wanted, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        finished.append(len(seeds_of(cwd / "samples")))
    return finished


@pytest.mark.slow
def test_three_kills_and_another_shard_size_give_the_same_bytes(champion: str, whole: Path, tmp_path: Path) -> None:
    finished = kill_in_pieces(champion, tmp_path, "--workers", "0", "--shard-size", "16")
    assert 0 < finished[0] < finished[1] < finished[2] < SEEDS, finished
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*/*.png")}
    result = sample(champion, str(tmp_path / "samples"), list(range(SEEDS)), shard_size=50, workers=2, **OPTIONS)
    assert result.made == SEEDS - finished[2]  # only seeds of unfinished shards
    again = sum(path.stat().st_mtime_ns != before[path] for path in before)
    assert again == len(before) - finished[2]
    assert_complete(tmp_path / "samples", SEEDS)
    assert images_of(tmp_path / "samples") == images_of(whole)
    assert (tmp_path / "samples" / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()


@contextmanager
def killer(root: psutil.Process, folder: Path, after: list[int]) -> Iterator[list[int]]:
    """Kill a Ray worker of a process when these numbers of shards are finished; the pids of the killed workers."""
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        for count in after:
            while len(notes_of(folder)) < count:
                if stop.wait(0.005):
                    return
            workers = [child for child in root.children(recursive=True) if "MapWorker" in " ".join(cmdline(child))]
            killed.append(workers[0].pid)
            workers[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def test_killed_worker_is_replaced(champion: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    with killer(psutil.Process(), folder, [1, 7]) as killed:
        result = sample(champion, str(folder), list(range(SEEDS)), shard_size=16, workers=1, **OPTIONS)
    assert len(set(killed)) == 2
    assert result.made == SEEDS
    assert_complete(folder, SEEDS)
    assert images_of(folder) == images_of(whole)


@pytest.mark.slow
def test_two_thousand_samples_in_one_command_with_two_kills(champion: str, tmp_path: Path) -> None:
    arguments = ["sample", champion, "samples", "--seeds", "0-1999", "--steps", "6", "--workers", "2", "--json"]
    process = start_cli(*arguments, cwd=tmp_path)
    folder = tmp_path / "samples"
    with killer(psutil.Process(process.pid), folder, [10, 60]) as killed:
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert len(set(killed)) == 2
    printed = json.loads(output.splitlines()[-1])
    assert (printed["images"], printed["made"], printed["format"], printed["model"]["name"]) == (
        2000,
        2000,
        "png",
        "tiny",
    )
    assert_complete(folder, 2000)
    print(f"2,000 samples, two kills: {printed['seconds']:.0f} s, {printed['images_per_second']:.0f} images/s")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_size", [16, 50])
def test_workers_shards_and_kills_do_not_change_a_byte(
    workers: int, shard_size: int, champion: str, whole: Path, tmp_path: Path
) -> None:
    options = {"workers": workers, "shard_size": shard_size}
    sample(champion, str(tmp_path / "one go"), list(range(SEEDS)), **options, **OPTIONS)
    assert images_of(tmp_path / "one go") == images_of(whole)
    kill_in_pieces(champion, tmp_path, "--workers", str(workers), "--shard-size", str(shard_size))
    sample(champion, str(tmp_path / "samples"), list(range(SEEDS)), **options, **OPTIONS)
    assert_complete(tmp_path / "samples", SEEDS)
    assert images_of(tmp_path / "samples") == images_of(whole)
