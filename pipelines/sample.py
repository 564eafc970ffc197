"""Sample: seeds in, a folder of PNG files out, on Ray Data; a second call does only what is missing."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchloom.models.checkpoints import load_whole_model, read_card
from patchloom.models.generate import default_labels, generate_padded
from patchloom.pipelines.pictures import contact_sheet, save_png
from patchloom.pipelines.pyfunc import png_bytes
from patchloom.platform.cluster import map_on_actors, quiet_environment
from patchloom.platform.errors import UserError
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.registry import FetchedModel, fetch_model
from patchloom.platform.storage import (
    local_path,
    locked,
    make_folder,
    read_json,
    read_json_lines,
    write_atomic,
    write_json,
    write_json_lines,
)
from patchloom.platform.tracking import tracking_uri

SAMPLES_FORMAT = 1
MANIFEST = "manifest.jsonl"
SHEET_IMAGES = 64
SAMPLERS = ("heun",)


@dataclass(frozen=True)
class SampleResult:
    """A finished sample folder."""

    folder: Path
    images: int
    contact_sheet: Path


def parse_seeds(text: str) -> list[int]:
    """`0-63`, `0,5,9`, both mixed, or a file with one seed a line; sorted, without repeats."""
    path = Path(text)
    parts = path.read_text().split() if path.is_file() else text.split(",")
    seeds: set[int] = set()
    for part in parts:
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--seeds {text}: {part!r} is not a seed; write 0-63, 0,5,9 or a file of seeds")
        seeds.update(range(int(first), int(last) + 1) if dash else [int(first)])
    if not seeds:
        raise UserError(f"--seeds {text} names no seed: write 0-63, 0,5,9 or a file of seeds")
    return sorted(seeds)


def sample(
    model: str,
    out: str,
    seeds: str | list[int] = "0-63",
    *,
    steps: int = 18,
    sampler: str = "heun",
    guidance: float = 1.0,
    label: str | None = None,
    batch: int = 8,
    workers: int | None = None,
) -> SampleResult:
    """Sample one image a seed into the folder `out`, with a manifest and a contact sheet.

    model: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder. label: a class by name or
    number; all classes in turn by default. guidance: 1 is none. batch: the compute batch; the same batch
    gives the same bytes for any workers and order. Asking for more seeds extends the folder. Raises
    UserError for an unknown model or class, or a folder sampled with other options.
    """
    wanted = parse_seeds(seeds) if isinstance(seeds, str) else sorted(set(seeds))
    if sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler} is unknown: choose one of {', '.join(SAMPLERS)}")
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise UserError(f"--{name} {value} is below 1")
    fetched = fetch_model(model)
    card = read_card(fetched.folder, "denoiser")
    class_number = _class_number(label, card)
    if guidance != 1 and not (card["class_names"] and card["label_dropout"] > 0):
        raise UserError(
            f"--guidance {guidance:g} needs a model trained with classes and label dropout, and this one was not: "
            "leave it at 1"
        )
    options = {
        "model": {"reference": fetched.reference, "weights_sha256": card["weights_sha256"]},
        "sampler": sampler,
        "steps": steps,
        "network_evaluations": (2 * steps - 1) * (2 if guidance != 1 else 1),
        "guidance": guidance,
        "label": class_number,
        "batch": batch,
        "threads": 1,
    }
    folder = make_folder(local_path(out))
    with locked(folder):
        _open_folder(folder, options, fetched)
        done = _finished(folder)
        todo = [seed for seed in wanted if seed not in done]
        with progress("sampling", len(wanted), "images") as meter:
            meter.begin(len(wanted) - len(todo))
            write_json_lines(folder / MANIFEST, list(done.values()))
            _run(folder, fetched, options, todo, workers, meter)
        return _finish(folder)


def _class_number(label: str | None, card: dict[str, Any]) -> int | None:
    if label is None:
        return None
    names = card["class_names"]
    if label in names:
        return int(names.index(label))
    if label.isdigit() and int(label) < len(names):
        return int(label)
    known = ", ".join(names) if names else "none, it has no classes"
    raise UserError(f"--label {label} is not a class of this model: it knows {known}")


def _open_folder(folder: Path, options: dict[str, Any], fetched: FetchedModel) -> None:
    path = folder / "sampling.json"
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no samples: choose an empty folder")
        lineage = {"run_id": fetched.run_id, "name": fetched.name, "version": fetched.version}
        write_json(path, {"format_version": SAMPLES_FORMAT, "kind": "samples", **options, "lineage": lineage})
        return
    found = read_json(path)
    differs = [key for key, value in options.items() if found.get(key) != value]
    if differs:
        what = "; ".join(f"{key} was {found.get(key)} and is now {options[key]}" for key in differs)
        raise UserError(f"{folder} holds samples with other options ({what}): choose another folder")


def image_file(seed: int) -> str:
    """`000000/000042.png`: a folder a thousand."""
    return f"{seed // 1000:06d}/{seed:06d}.png"


def _finished(folder: Path) -> dict[int, dict[str, Any]]:
    """Manifest lines by seed, of images that are there and whole; the others are made again."""
    entries = {entry["seed"]: entry for entry in read_json_lines(folder / MANIFEST)}

    def whole(entry: dict[str, Any]) -> bool:
        path = folder / entry["file"]
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == str(entry["sha256"])

    return {seed: entry for seed, entry in entries.items() if whole(entry)}


def _run(
    folder: Path, fetched: FetchedModel, options: dict[str, Any], todo: list[int], workers: int | None, meter: Meter
) -> None:
    batches = [{"seeds": todo[start : start + options["batch"]]} for start in range(0, len(todo), options["batch"])]
    job = {"folder": str(folder), "reference": fetched.reference, "options": options, "tracking": tracking_uri()}
    with (folder / MANIFEST).open("a") as manifest:
        for row in map_on_actors(BatchSampler, job, batches, workers, on_gpus=True):
            entries = json.loads(row["entries"])
            manifest.write("".join(json.dumps(entry) + "\n" for entry in entries))
            manifest.flush()
            meter.update(meter.done + len(entries))


class BatchSampler:
    """Holds a model and samples batches of seeds into files."""

    def __init__(self, job: dict[str, Any]) -> None:
        quiet_environment()
        import torch

        torch.set_num_threads(1)  # thread counts change the order of sums, and so the last bit
        os.environ["MLFLOW_TRACKING_URI"] = job["tracking"]
        self.folder, self.options = Path(job["folder"]), job["options"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_whole_model(fetch_model(job["reference"]).folder, device)

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        """Sample one batch; returns its manifest lines."""
        seeds, options = [int(seed) for seed in item["seeds"]], self.options
        labels = default_labels(seeds, self.model.denoiser.classes)
        if options["label"] is not None:
            labels = [options["label"]] * len(seeds)
        images = generate_padded(self.model, seeds, labels, options["batch"], options["steps"], options["guidance"])
        entries = []
        for seed, label, image in zip(seeds, labels, images.cpu().numpy(), strict=True):
            content = png_bytes(image)
            path = self.folder / image_file(seed)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content)
            sha256 = hashlib.sha256(content).hexdigest()
            entries.append({"seed": seed, "label": label, "file": image_file(seed), "sha256": sha256})
        return {"entries": json.dumps(entries)}


def _finish(folder: Path) -> SampleResult:
    """Order the manifest by seed and draw the contact sheet."""
    entries = sorted(read_json_lines(folder / MANIFEST), key=lambda entry: int(entry["seed"]))
    write_json_lines(folder / MANIFEST, entries)
    images = read_samples(folder, entries[:SHEET_IMAGES])
    sheet = folder / "contact_sheet.png"
    save_png(contact_sheet(images, scale=1 if images.shape[-1] >= 64 else 2), sheet)
    say(f"  {len(entries)} images and {sheet.name} in {folder}")
    return SampleResult(folder, len(entries), sheet)


def read_samples(folder: Path, entries: list[dict[str, Any]]) -> np.ndarray:
    """(N, 3, H, W) uint8 images of manifest lines; raises UserError at one that was changed."""
    images = []
    for entry in entries:
        path = folder / entry["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise UserError(f"{path} is missing or not what was sampled: run the same `patchloom sample` again")
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    return np.stack(images)
