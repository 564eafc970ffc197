"""Preparing: images a second of a core that `patchloom prepare` makes, beside a plain loop that decodes with Pillow."""

import contextlib
import io
import shutil
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.paired import Work, in_turns
from patchloom.pipelines.prepare.preparing import (
    SHARD_ROWS,
    Plan,
    _finish,
    _plan_images,
    _start_work,
    _transform,
    prepare,
)
from patchloom.pipelines.prepare.shard_maker import ShardMaker
from patchloom.platform.compute.cluster import map_on_actors, ray_session
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.files.folder import Folder

SIDE = 64
COPIES = 4  # of the images for workers on Ray, so that their start is a small part
LEAST_SHARDS = 16  # of a preparation on Ray
WORKER_WANTED = 0.8


def beside_pillow(scale: Scale, say: Say) -> list[Finding]:
    """Workers of a preparation, alone and one a core on Ray, beside a loop that opens, decodes and keeps the pixels.

    A worker also hashes, counts and writes shards. Rates are of a core's own time: of the loop in this process, of
    workers but for the first shard of each (which imports what it needs), of the loop in such workers, which have
    the same neighbours, and of workers and command together. The whole call is by the clock.
    """
    with tempfile.TemporaryDirectory() as folder, ray_session(), contextlib.redirect_stdout(io.StringIO()):
        scratch = Path(folder)
        archive = archive_of_windows(scratch / "windows.zip", scale.images)
        many = several_times(archive, scratch / "several.zip")
        shard_rows = min(SHARD_ROWS, max(1, COPIES * scale.images // LEAST_SHARDS))
        alone = Begun.of(archive, scratch / "alone", shard_rows)
        maker, on_ray = ShardMaker(alone.argument), OnRay(many, scratch / "many", shard_rows)

        def whole_call() -> int:
            with removed(scratch / "whole"):
                return len(prepare(str(archive), str(scratch / "whole"), resolution=SIDE))

        ways: dict[str, Work] = {
            "worker alone": lambda: sum(maker(shard)["inputs"] for shard in alone.shards),
            "loop": lambda: pillow_loop(archive),
            "workers": on_ray.workers, "loops": on_ray.loops, "whole call": whole_call,
        }  # fmt: skip
        turns = in_turns(ways, scale.rounds, 1, say)
    turns.by_core.update({way: rates[-scale.rounds :] for way, rates in on_ray.by_core.items()})
    limit = "the loop itself"
    ratios = {
        "a worker on Ray over a Pillow loop": ("workers", "loop", WORKER_WANTED),
        "  over the loop in such workers": ("workers", "loops", None),
        "  from its start": ("workers from their start", "loop", None),
        "  and the command's own work": ("workers and command", "loop", None),
        "a worker alone over a Pillow loop": ("worker alone", "loop", None),
    }
    return [
        *(Finding(f"{what}, a core's time", turns.ratio(way, other, of_core=True), "x", 1.0, limit, wanted)
          for what, (way, other, wanted) in ratios.items()),
        Finding(f"the whole call, {scale.images:,} images, by the clock", turns.ratio("whole call", "loop"), "x"),
        Finding("a Pillow loop", turns.rate("loop"), "images/s"),
        Finding("the whole call", turns.rate("whole call"), "images/s"),
    ]  # fmt: skip


def archive_of_windows(path: Path, images: int) -> Path:
    """PNG files of 64 x 64, windows of a photograph that ships with scikit-image."""
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as opened:
        photograph = np.asarray(opened.convert("RGB"))
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(images):
            y, x = generator.integers(0, 512 - SIDE, 2)
            png = io.BytesIO()
            Image.fromarray(photograph[y : y + SIDE, x : x + SIDE]).save(png, "PNG")
            archive.writestr(f"{number:06d}.png", png.getvalue())
    return path


def several_times(archive: Path, path: Path) -> Path:
    """The images of an archive again and again, under other names."""
    with zipfile.ZipFile(archive) as once, zipfile.ZipFile(path, "w") as many:
        for copy in range(COPIES):
            for name in once.namelist():
                many.writestr(f"{copy}/{name}", once.read(name))
    return path


def pillow_loop(archive: Path) -> int:
    """The plain loop, over all images."""
    with zipfile.ZipFile(archive) as opened:
        return decoded(opened, opened.namelist())


def decoded(archive: zipfile.ZipFile, names: list[str]) -> int:
    """How many images were opened, decoded and kept for a moment."""
    count = 0
    for name in names:
        with Image.open(io.BytesIO(archive.read(name))) as image:
            count += len(np.asarray(image.convert("RGB"))) > 0
    return count


class PillowLoop:
    """The plain loop in a worker, over the images of a shard."""

    is_first = True

    def __init__(self, argument: tuple[str, int]) -> None:
        self.archive, self.shard_rows = zipfile.ZipFile(argument[0]), argument[1]
        self.names = self.archive.namelist()

    def __call__(self, item: dict[str, int]) -> dict[str, Any]:
        began, first = time.process_time(), item["shard"] * self.shard_rows
        made = {"inputs": decoded(self.archive, self.names[first : first + self.shard_rows])}
        is_first, self.is_first = self.is_first, False
        return made | {"cpu_seconds": time.process_time() - began, "is_first": is_first}


class Timed(ShardMaker):
    """A worker of a preparation that says what a shard cost it, and whether it is its first."""

    is_first = True

    def __call__(self, item: dict[str, int]) -> dict[str, Any]:
        began = time.process_time()
        made = super().__call__(item)
        is_first, self.is_first = self.is_first, False
        return made | {"cpu_seconds": time.process_time() - began, "is_first": is_first}


@dataclass(frozen=True)
class Begun:
    """A preparation that is written down and not yet worked on."""

    folder: Folder
    plan: Plan
    inputs: int

    @staticmethod
    def of(archive: Path, scratch: Path, shard_rows: int) -> "Begun":
        inputs, plan = _plan_images(open_source(str(archive)), _transform(SIDE, "center", "lanczos", 3, 0, None, None))
        begun = Begun(Folder(str(scratch)), replace(plan, shard_rows=shard_rows), len(inputs))
        _start_work(begun.folder, begun.plan, inputs, None)
        return begun

    @property
    def argument(self) -> dict[str, Any]:
        return {"folder": self.folder.address, "backbones": []}

    @property
    def shards(self) -> list[dict[str, int]]:
        return [{"shard": shard} for shard in range(-(-self.inputs // self.plan.shard_rows))]


@dataclass(frozen=True)
class OnRay:
    """A preparation, and the loop, by a worker a core on Ray; notes images a second of a core's own time."""

    archive: Path
    scratch: Path
    shard_rows: int
    by_core: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def workers(self) -> int:
        """Prepare the archive."""
        with removed(self.scratch):
            began = time.process_time()
            begun = Begun.of(self.archive, self.scratch, self.shard_rows)
            made = list(map_on_actors(Timed, begun.argument, begun.shards, None))
            _finish(begun.folder, begun.plan, begun.inputs)
            command = time.process_time() - began
        spent = sum(row["cpu_seconds"] for row in made)
        self.by_core["workers"].append(warm_rate(made))
        self.by_core["workers from their start"].append(begun.inputs / spent)
        self.by_core["workers and command"].append(begun.inputs / (spent + command))
        return begun.inputs

    def loops(self) -> int:
        """Decode its images and no more."""
        with zipfile.ZipFile(self.archive) as opened:
            images = len(opened.namelist())
        shards = [{"shard": shard} for shard in range(-(-images // self.shard_rows))]
        made = list(map_on_actors(PillowLoop, (str(self.archive), self.shard_rows), shards, None))
        self.by_core["loops"].append(warm_rate(made))
        return images


def warm_rate(made: list[dict[str, Any]]) -> float:
    """Images a second of the workers' time, but for the first shard of each where there are others."""
    later = [row for row in made if not row["is_first"]] or made
    return float(sum(row["inputs"] for row in later) / sum(row["cpu_seconds"] for row in later))


@contextlib.contextmanager
def removed(folder: Path) -> Iterator[None]:
    """A folder that is not there after the block."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
