"""Sample: seeds in, a folder of images out, on Ray Data; a second call does only what is missing."""

import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.backbones import allowed_backbones
from patchloom.models.checkpoints import verified_card
from patchloom.models.generate import Sampling, check_fit, one_thread
from patchloom.pipelines.pages.pictures import png_bytes
from patchloom.pipelines.sample.folder import (
    MANIFEST,
    SHEET,
    check_classes,
    finish,
    finished,
    held,
    open_folder,
    read_samples,
)
from patchloom.pipelines.sample.formats import choose_format
from patchloom.pipelines.sample.seeds import choose_labels, parse_levels, parse_seeds, parse_size
from patchloom.pipelines.sample.shard_sampler import OUTPAINT, ShardSampler
from patchloom.platform.compute.cluster import Tally, map_on_actors
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.tracking.registry import FetchedModel, fetch_model
from patchloom.platform.tracking.runs import tracking_uri

__all__ = ["MANIFEST", "SampleResult", "parse_levels", "parse_seeds", "parse_size", "read_samples", "sample"]

ARCHIVE_IMAGES = 1000  # in an archive, unless told otherwise
PNG_IMAGES, PNG_TASKS = 16, 1000  # of PNG files, a task has at least so many, and there are at most so many tasks


@dataclass(frozen=True)
class SampleResult:
    """A finished sample folder, and what this call did for it."""

    folder: str
    format: str
    model: dict[str, Any]
    images: int  # in the folder
    made: int  # by this call
    seconds: float  # of this call
    images_per_second: float  # without the start of the workers
    manifest: str
    contact_sheet: str


def sample(
    model: str,
    out: str,
    seeds: str | list[int] = "0-63",
    *,
    steps: int = 18,
    sampler: str = "heun",
    ladder: str = "karras",
    churn: float = 0.0,
    churn_between: tuple[float, float] | None = None,
    churn_noise: float = 1.0,
    guidance: float = 1.0,
    guidance_between: tuple[float, float] | None = None,
    label: str | None = None,
    labels: str | None = None,
    size: tuple[int, int] | None = None,
    canvas: str = "rescale",
    outpaint: str | None = None,
    format: str = "png",
    shard_size: int | None = None,
    batch: int = 8,
    workers: int | None = None,
) -> SampleResult:
    """Sample one image a seed into the folder `out`, here or far away, with a manifest and a contact sheet.

    model: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder. label: one class for all, by name or
    number; labels: a file with the class of each seed; all classes in turn by default. size: (height, width) in
    pixels. outpaint: an image file that stays in the middle of a larger canvas, so that its surroundings are
    sampled. format: png (a file each), zip, webdataset, parquet or npz. shard_size: images an archive, and what one
    worker makes at a time. batch: the compute batch; the same batch gives the same bytes for any workers, shards and
    order. workers: all GPUs or CPUs by default; 0 is this process, without Ray. The other options are those of
    `Sampling`. Asking for more seeds extends the folder. Raises UserError for an unknown model or class, options that
    do not fit the model, or a folder sampled with other options.
    """
    began = time.monotonic()
    wanted = parse_seeds(seeds) if isinstance(seeds, str) else sorted(set(seeds))
    for option, number in (("--batch", batch), ("--shard-size", 1 if shard_size is None else shard_size)):
        if number < 1:
            raise UserError(f"{option} {number} is below 1")
    is_archive = choose_format(format).pack is not None
    fetched = fetch_model(model)
    card = verified_card(fetched.folder)
    classes, chosen = choose_labels(wanted, card["class_names"], label, labels)
    try:
        sampling = Sampling(
            sampler, steps, ladder, churn, churn_between, churn_noise, guidance, guidance_between, size, canvas
        )
        check_fit(sampling, card)
    except ValueError as error:
        raise UserError(str(error)) from None
    reference = None if outpaint is None else _reference(outpaint, sampling, card)
    options = {
        "model": _model(fetched, card),
        **asdict(sampling),
        "network_evaluations": sampling.network_evaluations,
        **chosen,
        "outpaint": None if reference is None else {"sha256": reference[1]},
        "format": format,
        "shard_size": (shard_size or ARCHIVE_IMAGES) if is_archive else None,
        "batch": batch,
        "threads": 1,
    }
    options = json.loads(json.dumps(options))  # as they will be read again: lists for tuples
    folder = Folder.at(out)
    job = {"folder": folder.address, "reference": fetched.reference, "options": options, "sampling": sampling}
    with held(folder), progress("sampling", len(wanted), "images") as meter:
        open_folder(folder, options, _lineage(fetched))
        if reference is not None:
            folder.write(OUTPAINT, png_bytes(reference[0]))
        made = _fill(folder, job, classes, shard_size, workers, meter)
        images = finish(folder, options)
    say(f"  {images} images and {SHEET} in {folder}")
    return SampleResult(
        str(folder), format, options["model"] | _lineage(fetched), images, made, time.monotonic() - began,
        meter.rate, f"{folder}/{MANIFEST}", f"{folder}/{SHEET}",
    )  # fmt: skip


def _fill(
    folder: Folder,
    job: dict[str, Any],
    classes: dict[int, int],
    shard_size: int | None,
    workers: int | None,
    meter: Meter,
) -> int:
    """Sample what is missing of the seeds in `classes`; how many that were."""
    done = finished(folder)
    check_classes(folder, done, classes)
    todo = [seed for seed in classes if seed not in done]
    if job["options"]["shard_size"]:
        shards = _archives(todo, classes, done, job["options"]["shard_size"])
    else:
        shards = _tasks(todo, classes, shard_size or _task_size(len(todo), job["options"]["batch"]))
    meter.begin(len(classes) - len(todo))
    _run(job, shards, len(todo), workers, meter)
    return len(todo)


def _run(job: dict[str, Any], shards: list[dict[str, Any]], count: int, workers: int | None, meter: Meter) -> None:
    """Sample the shards, `count` images in all, on workers, or without Ray in this process."""
    before = meter.done

    def watch(made: int) -> None:
        meter.update(before + made)

    job |= {"tracking": tracking_uri(), "backbones": allowed_backbones()}
    if workers == 0:
        _run_here(job, shards, watch)
    else:
        for _ in map_on_actors(ShardSampler, job, shards, workers, on_gpus=True, watch=watch):
            pass
    watch(count)


def _run_here(job: dict[str, Any], shards: list[dict[str, Any]], watch: Callable[[int], None]) -> None:
    if not shards:
        return
    tally = Tally()

    def count(name: str, done: int) -> None:
        tally.count(name, done)
        watch(tally.total())

    with one_thread():
        sampler = ShardSampler(job)
        sampler.count = count
        for shard in shards:
            sampler(shard)


def _model(fetched: FetchedModel, card: dict[str, Any]) -> dict[str, Any]:
    model = {"reference": fetched.reference, "weights_sha256": card["weights_sha256"]}
    if "autoencoder" in card:
        model["autoencoder_sha256"] = card["autoencoder"].get("weights_sha256")
    return model


def _lineage(fetched: FetchedModel) -> dict[str, str | None]:
    return {"run_id": fetched.run_id, "name": fetched.name, "version": fetched.version}


def _reference(address: str, sampling: Sampling, card: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The (C, H, W) uint8 image that stays in the middle, once it is known to fit there, and its file's sha256."""
    if sampling.size is None:
        raise UserError("--outpaint keeps an image in the middle of a larger canvas: give its --size HxW too")
    image, sha256 = _read_image(address, card["space"]["kind"] == "pixels" and card["denoiser"]["channels"] == 1)
    height, width = image.shape[1:]
    downscale = card.get("autoencoder", {}).get("downscale", 1)
    for inner, outer in ((height, sampling.size[0]), (width, sampling.size[1])):
        if inner > outer or (outer - inner) % (2 * downscale) or inner % downscale:
            raise UserError(
                f"--outpaint {address} has {height}x{width} pixels, which cannot stand in the middle of "
                f"{sampling.size[0]}x{sampling.size[1]}: both margins must be multiples of {downscale} pixels"
            )
    return image, sha256


def _read_image(address: str, is_grey: bool) -> tuple[np.ndarray, str]:
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--outpaint {address} is not a file: give an image")
    content = folder.read(name)
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = np.asarray(image.convert("L" if is_grey else "RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"--outpaint {address} is not an image that can be read ({error})") from None
    return found[None] if is_grey else found.transpose(2, 0, 1), hashlib.sha256(content).hexdigest()


def _task_size(count: int, batch: int) -> int:
    """PNG files a task: whole batches, few enough for all workers to have some, many enough to be worth the way."""
    least = -(-PNG_IMAGES // batch)
    return batch * max(least, min(count // (PNG_TASKS * batch), 1000 // batch))


def _tasks(todo: list[int], classes: dict[int, int], size: int) -> list[dict[str, Any]]:
    """Files of their own need no fixed places: what is missing is dealt out in its order."""
    return [
        _shard(f"{some[0]:06d}", some, classes, [])
        for some in (todo[at : at + size] for at in range(0, len(todo), size))
    ]


def _archives(
    todo: list[int], classes: dict[int, int], done: dict[int, dict[str, Any]], size: int
) -> list[dict[str, Any]]:
    """An archive holds a fixed range of seeds; one that is extended takes over what it holds."""
    there = {number: list(lines) for number, lines in groupby(done.values(), key=lambda entry: entry["seed"] // size)}
    return [
        _shard(f"{number:06d}", list(some), classes, there.get(number, []))
        for number, some in groupby(todo, key=lambda seed: seed // size)
    ]


def _shard(name: str, seeds: list[int], classes: dict[int, int], known: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "seeds": seeds, "labels": [classes[seed] for seed in seeds], "known": json.dumps(known)}
