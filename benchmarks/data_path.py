"""How fast the data path is: preparation against a plain Pillow loop, and random reads of latents for training.

Over one archive of PNG files, in rounds: a loop in one process that opens, decodes and keeps the pixels; a worker of a
preparation, which also hashes, counts and writes shards, alone; a preparation of the archive several times over by a
worker a core on Ray; and the same loop in such workers, which have the same neighbours. All of these are a core's own
time: of the workers but for the first shard of each (which imports what it needs), of the workers from their start, and
of workers and command together. The whole call is also timed by the clock, its workers' start included. Reads are of
random rows from memory-mapped shards of (4, 32, 32) moments.

    python benchmarks/data_path.py [--rounds 5] [--images 8000] [--archive some.zip] [--out benchmarks/results]
"""

import argparse
import io
import json
import os
import platform
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import skimage
from PIL import Image

from patchloom.pipelines.prepare import SHARD_ROWS, Plan, _finish, _plan_images, _start_work, _transform, prepare
from patchloom.pipelines.shards import ShardMaker
from patchloom.platform.cluster import map_on_actors, ray_session
from patchloom.platform.dataset import Dataset, write_shard
from patchloom.platform.folder import Folder
from patchloom.platform.sources import open_source
from patchloom.platform.storage import file_sha256

SIDE, COPIES, ROWS, BATCH, BATCHES = 64, 4, 20_000, 64, 300


def archive_of_windows(path: Path, images: int) -> None:
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


def decoded(archive: zipfile.ZipFile, names: list[str]) -> int:
    """How many images were opened, decoded and kept for a moment."""
    count = 0
    for name in names:
        with Image.open(io.BytesIO(archive.read(name))) as image:
            count += len(np.asarray(image.convert("RGB"))) > 0
    return count


def images_in(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".png")]


def pillow_loop(archive: Path) -> int:
    with zipfile.ZipFile(archive) as opened:
        return decoded(opened, images_in(opened))


class PillowLoop:
    """The same loop in a worker, over the images of a shard."""

    is_first = True

    def __init__(self, archive: str) -> None:
        self.archive = zipfile.ZipFile(archive)
        self.names = images_in(self.archive)

    def __call__(self, item: dict[str, int]) -> dict[str, Any]:
        began = time.process_time()
        first = item["shard"] * SHARD_ROWS
        made = {"inputs": decoded(self.archive, self.names[first : first + SHARD_ROWS])}
        made |= {"cpu_seconds": time.process_time() - began, "is_first": self.is_first}
        self.is_first = False
        return made


def several_times(archive: Path, path: Path) -> None:
    """The images of an archive again and again, under other names: so many that a start is a small part of it."""
    with zipfile.ZipFile(archive) as once, zipfile.ZipFile(path, "w") as many:
        for copy in range(COPIES):
            for name in images_in(once):
                many.writestr(f"{copy}/{name}", once.read(name))


class Timed(ShardMaker):
    """A worker that says what a shard cost it, and whether it is its first."""

    is_first = True

    def __call__(self, item: dict[str, int]) -> dict[str, Any]:
        began = time.process_time()
        made = super().__call__(item) | {"cpu_seconds": time.process_time() - began, "is_first": self.is_first}
        self.is_first = False
        return made


@dataclass(frozen=True)
class Begun:
    """A preparation that is written down and not yet worked on."""

    folder: Folder
    plan: Plan
    inputs: int

    @staticmethod
    def of(archive: Path, scratch: Path) -> "Begun":
        inputs, plan = _plan_images(open_source(str(archive)), _transform(SIDE, "center", "lanczos", 3, 0, None, None))
        begun = Begun(Folder(str(scratch)), replace(plan, shard_rows=SHARD_ROWS), len(inputs))
        _start_work(begun.folder, begun.plan, inputs, None)
        return begun

    @property
    def argument(self) -> dict[str, Any]:
        return {"folder": self.folder.address, "backbones": []}

    @property
    def shards(self) -> list[dict[str, int]]:
        return [{"shard": shard} for shard in range(-(-self.inputs // SHARD_ROWS))]


def timed(work: Callable[[], int], clock: Callable[[], float] = time.perf_counter) -> float:
    """Units a second of a clock."""
    began = clock()
    return work() / (clock() - began)


def warm_rate(made: list[dict[str, Any]]) -> float:
    """Images a second of the workers' time, but for the first shard of each."""
    later = [row for row in made if not row["is_first"]]
    return float(sum(row["inputs"] for row in later) / sum(row["cpu_seconds"] for row in later))


def on_ray(archive: Path, scratch: Path) -> dict[str, float]:
    """Images a second of a core's time, of a preparation with one worker a core at work, and of the loop there."""
    began = time.process_time()
    begun = Begun.of(archive, scratch)
    made = list(map_on_actors(Timed, begun.argument, begun.shards, None))
    _finish(begun.folder, begun.plan, begun.inputs)
    command = time.process_time() - began
    shutil.rmtree(scratch)
    spent = sum(row["cpu_seconds"] for row in made)
    return {
        "pillow_on_ray": warm_rate(list(map_on_actors(PillowLoop, str(archive), begun.shards, None))),
        "workers_on_ray": warm_rate(made),
        "workers_on_ray_from_the_start": begun.inputs / spent,
        "workers_and_command": begun.inputs / (spent + command),
    }


def measure_preparation(archive: Path, scratch: Path, rounds: int) -> dict[str, float]:
    several_times(archive, scratch / "several.zip")
    alone = Begun.of(archive, scratch / "alone")
    worker = ShardMaker(alone.argument)
    rates: dict[str, list[float]] = {}
    with ray_session():
        for number in range(-1, rounds):  # the first round warms up
            again = str(scratch / f"whole-{number}")
            found = {
                "pillow": timed(lambda: pillow_loop(archive), time.process_time),
                "worker_alone": timed(
                    lambda: sum(worker(shard)["inputs"] for shard in alone.shards), time.process_time
                ),
                **on_ray(scratch / "several.zip", scratch / f"several-{number}"),
                "prepare_by_clock": timed(lambda again=again: len(prepare(str(archive), again, resolution=SIDE))),
            }
            for name, rate in found.items() if number >= 0 else ():
                rates.setdefault(name, []).append(rate)
    rates["prepare_by_clock"] = [rate / (os.cpu_count() or 1) for rate in rates["prepare_by_clock"]]  # a core
    over = {f"{name}_over_pillow": ratio(rates, name, "pillow") for name in rates if name != "pillow"}
    over["workers_on_ray_over_pillow_on_ray"] = ratio(rates, "workers_on_ray", "pillow_on_ray")
    return {f"{name}_images_per_second": median(some) for name, some in rates.items()} | over


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    """The median over rounds of one rate over another of the same round."""
    return median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def measure_reads(scratch: Path) -> dict[str, float]:
    generator = np.random.default_rng(0)
    moments = {name: generator.standard_normal((512, 4, 32, 32)).astype(np.float16) for name in ("mean", "std")}
    (scratch / "shards").mkdir()
    shards = []
    for number in range(-(-ROWS // 512)):
        path = scratch / "shards" / f"part-{number:05d}.arrow"
        write_shard(path, [f"{number}-{row}" for row in range(512)], [0] * 512, moments)
        shards.append({"file": f"shards/{path.name}", "rows": 512, "bytes": path.stat().st_size,
                       "sha256": file_sha256(path)})  # fmt: skip
    dataset = Dataset(scratch, {"shards": shards})
    dataset.rows(np.arange(0, len(dataset), 512))  # verifies every shard, once

    def read() -> int:
        for _ in range(BATCHES):
            dataset.rows(generator.integers(0, len(dataset), BATCH))
        return BATCH * BATCHES

    rates = [timed(read) for _ in range(5)]
    return {"latents_per_second": median(rates), "slowest_latents_per_second": min(rates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        archive = options.archive or scratch / "windows.zip"
        if options.archive is None:
            archive_of_windows(archive, options.images)
        found = {"preparation": measure_preparation(archive, scratch, options.rounds)}
        found["reads"] = measure_reads(scratch)
    prepared, reads = found["preparation"], found["reads"]
    print(f"a Pillow loop in one process: {prepared['pillow_images_per_second']:,.0f} images/s of a core's time")
    print(f"one worker of prepare alone: {prepared['worker_alone_over_pillow']:.2f}x of it")
    print(f"each of {os.cpu_count()} workers on Ray: {prepared['workers_on_ray_over_pillow']:.2f}x of it, and "
          f"{prepared['workers_on_ray_over_pillow_on_ray']:.2f}x of the loop in as many workers on Ray")  # fmt: skip
    print(f"workers and command together: {prepared['workers_and_command_over_pillow']:.2f}x of it")
    print(f"the whole call a core by the clock, its workers' start included: "
          f"{prepared['prepare_by_clock_over_pillow']:.2f}x of it")  # fmt: skip
    print(f"random reads: {reads['latents_per_second']:,.0f} latents/s of (4, 32, 32), mean and std")
    record = {
        "benchmark": "data_path", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": platform.processor(),
        "cpus": os.cpu_count(), "pillow": PIL.__version__, "pyarrow": pa.__version__,
        "archive": archive.name, **found,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"data_path-{record['date']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
