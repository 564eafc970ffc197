"""Preparation benchmark: images per second of CPU time of `patchloom prepare`, compared with a plain Pillow loop."""

import contextlib
import io
import shutil
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

from patchloom.benchmarks.findings import Finding, Say, Scale
from patchloom.benchmarks.interleaved import Work, interleave
from patchloom.pipelines.prepare.images import Transform
from patchloom.pipelines.prepare.planning import SHARD_ROWS, plan_images
from patchloom.pipelines.prepare.preparing import PrepareJob, prepare
from patchloom.pipelines.prepare.shard_maker import PlannedShard, ShardMaker, ShardMakerArgument
from patchloom.platform.compute.actors import map_on_actors
from patchloom.platform.compute.jobs import run_job
from patchloom.platform.compute.session import ray_session
from patchloom.platform.files.folder import Folder

SIDE = 64
COPIES = 4  # of the images for workers on Ray, so that their start is a small part of the time
MIN_SHARDS = 16  # of a preparation on Ray
WORKER_WANTED = 0.8


def against_pillow(scale: Scale, say: Say) -> list[Finding]:
    """Workers of `prepare`, alone and one per core on Ray, compared with a loop that opens and decodes images.

    A worker also hashes, counts and writes shards. Rates are per second of CPU time: of the loop in this process, of
    workers without the first shard of each (which includes imports), of the loop in such workers, and of workers and
    command together. Only the rate of the whole call is per second of elapsed time.
    """
    with tempfile.TemporaryDirectory() as folder, ray_session(), contextlib.redirect_stdout(io.StringIO()):
        scratch = Path(folder)
        archive = make_archive(scratch / "windows.zip", scale.images)
        copies = repeat_archive(archive, scratch / "copies.zip")
        shard_rows = min(SHARD_ROWS, max(1, COPIES * scale.images // MIN_SHARDS))
        alone = TimedPreparation(archive, scratch / "alone", shard_rows)
        alone.start()
        planned = alone.missing()
        maker = ShardMaker(ShardMakerArgument(alone.folder.address))
        ray_preparation = RayPreparation(copies, scratch / "copies", shard_rows)

        def worker_alone() -> int:
            for shard in planned:
                maker(shard, ignore)
            return alone.total

        def whole_call() -> int:
            with remove_after(scratch / "whole"):
                return len(prepare(str(archive), str(scratch / "whole"), resolution=SIDE))

        alternatives: dict[str, Work] = {
            "worker alone": worker_alone,
            "loop": lambda: pillow_loop(archive),
            "workers": ray_preparation.workers, "loops": ray_preparation.loops, "whole call": whole_call,
        }  # fmt: skip
        timings = interleave(alternatives, scale.rounds, 1, say)
    timings.cpu_rates.update({name: rates[-scale.rounds :] for name, rates in ray_preparation.cpu_rates.items()})
    ratios = {
        "a worker on Ray over a Pillow loop": ("workers", "loop", WORKER_WANTED),
        "  over the loop in such workers": ("workers", "loops", None),
        "  including its start": ("workers with their start", "loop", None),
        "  including the work of the command": ("workers and command", "loop", None),
        "a worker alone over a Pillow loop": ("worker alone", "loop", None),
    }
    return [
        *(Finding(f"{what}, CPU time", timings.ratio(name, other, cpu_time=True), "x", 1.0, "the loop", wanted)
          for what, (name, other, wanted) in ratios.items()),
        Finding(f"the whole call, {scale.images:,} images, elapsed time", timings.ratio("whole call", "loop"), "x"),
        Finding("a Pillow loop", timings.rate("loop"), "images/s"),
        Finding("the whole call", timings.rate("whole call"), "images/s"),
    ]  # fmt: skip


def make_archive(path: Path, images: int) -> Path:
    """Write PNG files of 64 x 64, windows of a photograph of scikit-image, into a zip. Returns its path."""
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png", formats=["PNG"]) as opened:
        photograph = np.asarray(opened.convert("RGB"))
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(images):
            y, x = generator.integers(0, 512 - SIDE, 2)
            png = io.BytesIO()
            Image.fromarray(photograph[y : y + SIDE, x : x + SIDE]).save(png, "PNG")
            archive.writestr(f"{number:06d}.png", png.getvalue())
    return path


def repeat_archive(archive: Path, path: Path) -> Path:
    """Write the images of an archive `COPIES` times under different names. Returns the path."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for copy in range(COPIES):
            for name in source.namelist():
                target.writestr(f"{copy}/{name}", source.read(name))
    return path


def pillow_loop(archive: Path) -> int:
    """The plain loop over all images. Returns their number."""
    with zipfile.ZipFile(archive) as opened:
        return decode_images(opened, opened.namelist())


def decode_images(archive: zipfile.ZipFile, names: list[str]) -> int:
    """Open and decode images. Returns their number."""
    count = 0
    for name in names:
        with Image.open(io.BytesIO(archive.read(name)), formats=["PNG", "JPEG"]) as image:
            count += len(np.asarray(image.convert("RGB"))) > 0
    return count


@dataclass(frozen=True)
class TimedShard:
    """What a shard took, and whether it was the first of its worker."""

    images: int
    cpu_seconds: float
    is_first: bool


class PillowLoop:
    """The plain loop in a worker, over the images of one shard."""

    is_first = True

    def __init__(self, argument: tuple[str, int]) -> None:
        self.archive, self.shard_rows = zipfile.ZipFile(argument[0]), argument[1]
        self.names = self.archive.namelist()

    def __call__(self, shard: PlannedShard, report: Callable[[int], None]) -> TimedShard:
        start, first = time.process_time(), shard.number * self.shard_rows
        images = decode_images(self.archive, self.names[first : first + self.shard_rows])
        is_first, self.is_first = self.is_first, False
        return TimedShard(images, time.process_time() - start, is_first)


class TimedShardMaker:
    """A worker of `prepare` that also returns the CPU time of a shard."""

    is_first = True

    def __init__(self, argument: ShardMakerArgument) -> None:
        self.maker = ShardMaker(argument)

    def __call__(self, shard: PlannedShard, report: Callable[[int], None]) -> TimedShard:
        start = time.process_time()
        self.maker(shard, report)
        is_first, self.is_first = self.is_first, False
        return TimedShard(shard.size, time.process_time() - start, is_first)


class TimedPreparation(PrepareJob):
    """A preparation that keeps the timings of its shards."""

    worker = TimedShardMaker

    def __init__(self, archive: Path, scratch: Path, shard_rows: int) -> None:
        preparation = plan_images(str(archive), None, None, Transform(SIDE), None, "fp32")
        super().__init__(Folder(str(scratch)), preparation.with_shards(shard_rows))
        self.head_start_s, self.timings = 0.0, list[TimedShard]()

    def keep(self, unit: PlannedShard, result: Any) -> None:
        self.timings.append(result)


def ignore(images: int) -> None:
    """Take a report of progress and do nothing."""


@dataclass(frozen=True)
class RayPreparation:
    """A preparation and the plain loop, each by one worker per core on Ray; records images per second of CPU time."""

    archive: Path
    scratch: Path
    shard_rows: int
    cpu_rates: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def workers(self) -> int:
        """Prepare the archive. Returns the number of images."""
        with remove_after(self.scratch):
            start = time.process_time()
            job = TimedPreparation(self.archive, self.scratch, self.shard_rows)
            run_job(job, workers=None)
            command = time.process_time() - start
        spent = sum(shard.cpu_seconds for shard in job.timings)
        self.cpu_rates["workers"].append(warm_rate(job.timings))
        self.cpu_rates["workers with their start"].append(job.total / spent)
        self.cpu_rates["workers and command"].append(job.total / (spent + command))
        return job.total

    def loops(self) -> int:
        """Decode the images with the plain loop. Returns their number."""
        with zipfile.ZipFile(self.archive) as opened:
            images = len(opened.namelist())
        shards = [PlannedShard(number, self.shard_rows, "", 0, 0) for number in range(-(-images // self.shard_rows))]
        made = [timed for _, timed in map_on_actors(PillowLoop, (str(self.archive), self.shard_rows), shards, None)]
        self.cpu_rates["loops"].append(warm_rate(made))
        return images


def warm_rate(made: list[TimedShard]) -> float:
    """Images per second of the workers' CPU time, without the first shard of each worker if there are others."""
    later = [shard for shard in made if not shard.is_first] or made
    return float(sum(shard.images for shard in later) / sum(shard.cpu_seconds for shard in later))


@contextlib.contextmanager
def remove_after(folder: Path) -> Iterator[None]:
    """Remove a folder at the end of the block."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
