"""How fast the data path is: preparation against a plain Pillow loop, and random reads of latents for training.

Four ways to the same pixels alternate in rounds over one archive of PNG files: a loop that opens, decodes and keeps
the pixels; a worker of a preparation, which also hashes, counts and writes shards, alone; one such worker a core on
Ray; and the whole call, its workers' start included. The first three are a core's own time, which other work on the
machine does not change; the last is a clock's. Reads are of random rows from memory-mapped
shards of (4, 32, 32) moments.

    python benchmarks/data_path.py [--rounds 5] [--images 8000] [--archive some.zip] [--out benchmarks/results]
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import skimage
from PIL import Image

from patchloom.pipelines.prepare import SHARD_ROWS, _plan_images, _start_work, _transform, prepare
from patchloom.pipelines.shards import ShardMaker
from patchloom.platform.cluster import map_on_actors, ray_session
from patchloom.platform.dataset import Dataset, write_shard
from patchloom.platform.folder import Folder
from patchloom.platform.sources import open_source
from patchloom.platform.storage import file_sha256

SIDE, ROWS, BATCH, BATCHES = 64, 20_000, 64, 300


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


def pillow_loop(archive: Path) -> int:
    count = 0
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if name.endswith(".png"):
                with Image.open(io.BytesIO(opened.read(name))) as image:
                    count += len(np.asarray(image.convert("RGB"))) > 0
    return count


def begun(archive: Path, scratch: Path) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """A preparation that is written down and not yet worked on: what a worker is made of, and its shards."""
    transform = _transform(SIDE, "center", "lanczos", 3, 0, None, None)
    inputs, plan = _plan_images(open_source(str(archive)), transform)
    folder = Folder(str(scratch))
    _start_work(folder, replace(plan, shard_rows=SHARD_ROWS), inputs, None)
    shards = [{"shard": shard} for shard in range(-(-len(inputs) // SHARD_ROWS))]
    return {"folder": folder.address, "backbones": []}, shards


def timed(work: Callable[[], int], clock: Callable[[], float] = time.perf_counter) -> float:
    """Units a second of a clock."""
    began = clock()
    return work() / (clock() - began)


def workers_on_ray(argument: dict[str, Any], shards: list[dict[str, int]]) -> float:
    """Images a second of a core's time, with one worker a core at work."""
    made = list(map_on_actors(ShardMaker, argument, shards, None))
    return float(sum(row["inputs"] for row in made) / sum(row["cpu_seconds"] for row in made))


def measure_preparation(archive: Path, scratch: Path, rounds: int) -> dict[str, float]:
    cpus = os.cpu_count() or 1
    argument, shards = begun(archive, scratch / "work")
    alone = ShardMaker(argument)
    rates: dict[str, list[float]] = {"pillow": [], "worker_alone": [], "worker_on_ray": [], "prepare": []}
    with ray_session():
        for number in range(-1, rounds):  # the first round warms up
            again = str(scratch / f"whole-{number}")
            found = {
                "pillow": timed(lambda: pillow_loop(archive), time.process_time),
                "worker_alone": timed(lambda: sum(alone(shard)["inputs"] for shard in shards), time.process_time),
                "worker_on_ray": workers_on_ray(argument, shards),
                "prepare": timed(lambda again=again: len(prepare(str(archive), again, resolution=SIDE))),
            }
            if number >= 0:
                for name, rate in found.items():
                    rates[name].append(rate)
    over = {
        f"{name}_over_pillow": median(a / p for a, p in zip(rates[name], rates["pillow"], strict=True))
        for name in ("worker_alone", "worker_on_ray", "prepare")
    }
    over["prepare_per_core_over_pillow"] = over.pop("prepare_over_pillow") / cpus
    return {f"{name}_images_per_second": median(some) for name, some in rates.items()} | over


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
    print(f"a Pillow loop: {prepared['pillow_images_per_second']:,.0f} images/s a core")
    print(f"one worker of prepare alone: {prepared['worker_alone_over_pillow']:.2f}x of it")
    print(f"each of {os.cpu_count()} workers on Ray: {prepared['worker_on_ray_over_pillow']:.2f}x of it")
    print(f"the whole call on {os.cpu_count()} cores, its workers' start included: "
          f"{prepared['prepare_per_core_over_pillow']:.2f}x of it a core")  # fmt: skip
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
