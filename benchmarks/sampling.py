"""How fast batch sampling is beside a plain loop with the same micro-batch, worker by worker, its start left out.

Three ways alternate in rounds over the same seeds and network, one thread each: a loop that only samples; a loop that
also saves every image with Pillow; and one worker of `patchloom sample` on Ray Data, which besides hashes, writes whole
files and takes notes, timed from its first finished shard to its last. Each round compares what stood side by side, by
the clock and by a core's own time, which other work on the machine changes less.

    python benchmarks/sampling.py [--rounds 5] [--width 16] [--out benchmarks/results]
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from PIL import Image

from patchloom.models.checkpoints import Model, load_whole_model, save_model
from patchloom.models.codec import pixel_space
from patchloom.models.denoiser import build_denoiser
from patchloom.models.generate import Sampling, generate_padded, one_thread
from patchloom.pipelines.sample_shard import ShardSampler
from patchloom.platform.cluster import map_on_actors, ray_session
from patchloom.platform.tracking import tracking_uri

SIDE, BATCH, SHARD, SHARDS = 32, 8, 16, 12
SAMPLING = Sampling(steps=5)


def small_model(folder: Path, width: int) -> Path:
    """A DDPM++ that was not trained: what it makes is noise, which PNG compresses worst."""
    options = {"width": width, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
    config = {"network": "song", "network_options": options, "resolution": SIDE, "channels": 3, "classes": 0,
              "coordinates": "linear", "sigma_data": 0.5}  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir()
    card = {"name": "benchmark", "denoiser": config, "space": pixel_space().describe(), "class_names": [],
            "label_dropout": 0.0, "code_version": ""}  # fmt: skip
    save_model(folder, build_denoiser(config), card)
    return folder


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Images a second of the clock and of a core's own time."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = work()
    return {"clock": count / (time.perf_counter() - wall), "core": count / (time.process_time() - cpu)}


def plain_loop(model: Model, saved: Path | None) -> int:
    seeds = list(range(SHARD * (SHARDS - 1)))
    for start in range(0, len(seeds), BATCH):
        some = seeds[start : start + BATCH]
        images = generate_padded(model, some, [-1] * len(some), BATCH, SAMPLING)
        if saved is not None:
            for seed, image in zip(some, images, strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(saved / f"{seed:06d}.png")
    return len(seeds)


def on_ray(folder: Path, out: Path) -> dict[str, float]:
    """One worker, from its first finished shard to its last."""
    options = {"format": "png", "shard_size": None, "batch": BATCH, "outpaint": None, **asdict(SAMPLING)}
    job = {"folder": str(out), "reference": str(folder), "options": options, "sampling": SAMPLING,
           "tracking": tracking_uri(), "backbones": []}  # fmt: skip
    shards = [
        {"name": f"{first:06d}", "seeds": list(range(first, first + SHARD)), "labels": [-1] * SHARD, "known": "[]"}
        for first in range(0, SHARD * SHARDS, SHARD)
    ]
    rows = []
    for row in map_on_actors(ShardSampler, job, shards, 1, watch=lambda made: None):
        if not rows:
            began = time.perf_counter()
        rows.append(row)
    seconds = time.perf_counter() - began
    images = sum(row["images"] for row in rows[1:])
    return {"clock": images / seconds, "core": images / sum(row["cpu_seconds"] for row in rows[1:])}


def measure(scratch: Path, rounds: int, width: int) -> dict[str, Any]:
    folder = small_model(scratch / "model", width)
    model = load_whole_model(folder)
    found: list[dict[str, dict[str, float]]] = []
    with ray_session(), one_thread():
        for number in range(-1, rounds):  # the first round warms up
            (scratch / f"saved-{number}").mkdir()
            ways = {
                "plain loop": timed(lambda: plain_loop(model, None)),
                "plain loop that saves": timed(lambda number=number: plain_loop(model, scratch / f"saved-{number}")),
                "one worker on Ray Data": on_ray(folder, scratch / f"ray-{number}"),
            }
            if number >= 0:
                found.append(ways)
    rates = {way: {clock: median(one[way][clock] for one in found) for clock in ("clock", "core")} for way in found[0]}
    ratios = {
        f"over the {way}": {
            clock: [one["one worker on Ray Data"][clock] / one[way][clock] for one in found]
            for clock in ("clock", "core")
        }
        for way in ("plain loop", "plain loop that saves")
    }
    return {"images_per_second": rates, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rounds, options.width)
    for way, rate in found["images_per_second"].items():
        print(f"{way}: {rate['clock']:.1f} images/s, {rate['core']:.1f} a core's second")
    for way, ratio in found["ratios"].items():
        print(f"one worker {way}: {median(ratio['clock']):.2f}x by the clock, {median(ratio['core']):.2f}x by the core")
    record = {
        "benchmark": "sampling", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": platform.processor(),
        "cpus": os.cpu_count(), "torch": torch.__version__, "ray": ray.__version__, "resolution": SIDE,
        "width": options.width, "batch": BATCH, "shard": SHARD, "steps": SAMPLING.steps, **found,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"sampling-{record['date']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
