"""Sample: seeds in, a folder of PNG files out, on Ray Data; a second call does only what is missing."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.models.checkpoints import load_whole_model, read_card
from patchloom.models.generate import Sampling, check_fit, default_labels, generate_padded
from patchloom.pipelines.pictures import contact_sheet, save_png
from patchloom.pipelines.pyfunc import png_bytes
from patchloom.platform.cluster import map_on_actors, quiet_environment
from patchloom.platform.errors import UserError
from patchloom.platform.progress import Meter, progress, say
from patchloom.platform.registry import FetchedModel, fetch_model
from patchloom.platform.storage import (
    file_sha256,
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


def parse_size(text: str) -> tuple[int, int]:
    """`96x128` -> (96, 128), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match:
        raise UserError(f"--size {text} is not of the form HxW, such as 96x128")
    return int(match[1]), int(match[2])


def parse_levels(text: str, option: str) -> tuple[float, float]:
    """`0.3-5` -> (0.3, 5.0), two noise levels."""
    low, _, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError:
        raise UserError(f"{option} {text} is not of the form LOW-HIGH, such as 0.3-5") from None


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
    size: tuple[int, int] | None = None,
    canvas: str = "rescale",
    centre: str | None = None,
    batch: int = 8,
    workers: int | None = None,
) -> SampleResult:
    """Sample one image a seed into the folder `out`, with a manifest and a contact sheet.

    model: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder. label: a class by name or
    number; all classes in turn by default. size: (height, width) in pixels. centre: an image file that
    stays in the middle of a larger canvas, so that its surroundings are sampled. batch: the compute batch;
    the same batch gives the same bytes for any workers and order. The other options are those of `Sampling`.
    Asking for more seeds extends the folder. Raises UserError for an unknown model or class, options that
    do not fit the model, or a folder sampled with other options.
    """
    wanted = parse_seeds(seeds) if isinstance(seeds, str) else sorted(set(seeds))
    if batch < 1:
        raise UserError(f"--batch {batch} is below 1")
    fetched = fetch_model(model)
    card = read_card(fetched.folder, "denoiser")
    class_number = _class_number(label, card)
    try:
        sampling = Sampling(
            sampler, steps, ladder, churn, churn_between, churn_noise, guidance, guidance_between, size, canvas
        )
        check_fit(sampling, card)
    except ValueError as error:
        raise UserError(str(error)) from None
    options = {
        "model": {"reference": fetched.reference, "weights_sha256": card["weights_sha256"]},
        **asdict(sampling),
        "network_evaluations": sampling.network_evaluations,
        "label": class_number,
        "centre": _centre(centre, sampling, card),
        "batch": batch,
        "threads": 1,
    }
    options = json.loads(json.dumps(options))  # as they will be read again: lists for tuples
    folder = make_folder(local_path(out))
    with locked(folder):
        _open_folder(folder, options, fetched)
        done = _finished(folder)
        todo = [seed for seed in wanted if seed not in done]
        with progress("sampling", len(wanted), "images") as meter:
            meter.begin(len(wanted) - len(todo))
            write_json_lines(folder / MANIFEST, list(done.values()))
            _run(folder, fetched, options, sampling, todo, workers, meter)
        return _finish(folder)


def _centre(path: str | None, sampling: Sampling, card: dict[str, Any]) -> dict[str, str] | None:
    """Which image stays in the middle, once it is known to fit there."""
    if path is None:
        return None
    if sampling.size is None:
        raise UserError("--centre stays in the middle of a larger canvas: give its --size HxW too")
    if not Path(path).is_file():
        raise UserError(f"--centre {path} is not a file: give an image")
    height, width = _read_image(path, card["denoiser"]["channels"]).shape[1:]
    downscale = card.get("autoencoder", {}).get("downscale", 1)
    for inner, outer in ((height, sampling.size[0]), (width, sampling.size[1])):
        if inner > outer or (outer - inner) % (2 * downscale) or inner % downscale:
            raise UserError(
                f"--centre {path} has {height}x{width} pixels, which cannot stand in the middle of "
                f"{sampling.size[0]}x{sampling.size[1]}: both margins must be multiples of {downscale} pixels"
            )
    return {"file": str(local_path(path)), "sha256": file_sha256(local_path(path))}


def _read_image(path: str, channels: int) -> np.ndarray:
    """(C, H, W) uint8, grey for a model of grey images."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"--centre {path} is not an image that can be read ({error})") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


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
    folder: Path,
    fetched: FetchedModel,
    options: dict[str, Any],
    sampling: Sampling,
    todo: list[int],
    workers: int | None,
    meter: Meter,
) -> None:
    batches = [{"seeds": todo[start : start + options["batch"]]} for start in range(0, len(todo), options["batch"])]
    job = {
        "folder": str(folder), "reference": fetched.reference, "options": options, "sampling": sampling,
        "tracking": tracking_uri(), "backbones": allowed_backbones(),
    }  # fmt: skip
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
        allow_backbones(*job["backbones"])
        self.folder, self.options, self.sampling = Path(job["folder"]), job["options"], job["sampling"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_whole_model(fetch_model(job["reference"]).folder, device)
        self.centre = None
        if self.options["centre"]:
            pixels = _read_image(self.options["centre"]["file"], self.model.denoiser.channels)
            self.centre = torch.from_numpy(pixels.copy())

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        """Sample one batch; returns its manifest lines."""
        seeds, options = [int(seed) for seed in item["seeds"]], self.options
        labels = default_labels(seeds, self.model.denoiser.classes)
        if options["label"] is not None:
            labels = [options["label"]] * len(seeds)
        images = generate_padded(self.model, seeds, labels, options["batch"], self.sampling, self.centre)
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
    """(N, C, H, W) uint8 images of manifest lines; raises UserError at one that was changed."""
    images = []
    for entry in entries:
        path = folder / entry["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise UserError(f"{path} is missing or not what was sampled: run the same `patchloom sample` again")
        with Image.open(path) as image:
            pixels = np.asarray(image)
        images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return np.stack(images)
