"""Prepare: images in, Arrow datasets of pixels or latents out, one shard at a time on Ray Data.

The unit of work is a shard: a fixed range of the sorted inputs. Whoever makes it, it has the same bytes;
a preparation that was killed keeps its finished shards and makes the others again.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from patchloom.models.autoencoder import load_autoencoder
from patchloom.platform.cluster import map_on_actors, quiet_environment
from patchloom.platform.dataset import CARD, DATASET_FORMAT, Dataset, is_dataset, open_dataset, write_shard
from patchloom.platform.errors import UserError
from patchloom.platform.folder import Folder
from patchloom.platform.progress import progress, say
from patchloom.platform.registry import fetch_model
from patchloom.platform.storage import (
    file_sha256,
    local_path,
    locked,
    make_folder,
    read_json,
    sweep_partial,
    write_json,
    write_json_lines,
)

IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
CROPS = ("center", "dhariwal", "none", "windows")
WORK = ".work"
ENCODE_BATCH = 16  # fixed, and the last batch of a shard padded, so that a latent's bytes never depend on neighbours
FLAT_STD = 10.0  # a window whose pixels vary less teaches nothing
DARK_MEAN = 20.0


@dataclass(frozen=True)
class Transform:
    """What happens to an image: how it is cropped and resized, and, for windows, where they are cut.

    Windows: the photograph is resized to a short side of `short_side`, divided into regions of about
    two windows a side, and every region into overlapping windows `stride` pixels apart. A region is held
    out or trained on as a whole.
    """

    resolution: int
    crop: str = "center"
    resize: str = "lanczos"
    antialias: bool = True
    short_side: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a shard's bytes depend on; a folder holds the result of one plan."""

    source: str
    source_kind: str  # "images" or "dataset"
    transform: Transform | None  # None: rows come from a prepared dataset as they are
    class_names: list[str]
    autoencoder: dict[str, Any] | None
    shard_rows: int
    inputs_sha256: str

    def identity(self) -> str:
        """What must be equal for two calls to continue each other's work; the source's place may change."""
        values = {key: value for key, value in asdict(self).items() if key != "source"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prepare(
    source: str,
    dataset: str,
    *,
    resolution: int | None = None,
    crop: str = "center",
    autoencoder: str | None = None,
    short_side: int | None = None,
    stride: int | None = None,
    shard_rows: int = 512,
    workers: int | None = None,
) -> Dataset:
    """Prepare a folder of images, or encode a prepared dataset of pixels; returns the finished dataset.

    source: a folder of images (class = first sub-folder) or a prepared dataset. resolution: pixels a side,
    needed for images. autoencoder: encode to latents with this model (folder or models:/...). workers: how
    many shards are made at once, all CPUs of the session by default. A second call has nothing to do, and
    a call after a kill does what is missing. Raises UserError for what cannot be prepared.
    """
    folder_in, folder_out = local_path(source), local_path(dataset)
    encoder: Path | None = None
    inputs, plan = _plan(folder_in, resolution, crop, short_side, stride, shard_rows)
    if autoencoder:
        encoder, card = fetch_autoencoder(autoencoder)
        side = plan.transform.resolution if plan.transform else open_dataset(folder_in).card["resolution"]
        if side % card["downscale"]:
            raise UserError(f"images of {side} pixels cannot be halved to {card['downscale']} times smaller latents")
        plan = replace(plan, autoencoder=card)
    elif plan.source_kind == "dataset":
        raise UserError(f"{source} is prepared already: give --autoencoder to encode it, or a folder of images")

    make_folder(folder_out)
    with locked(folder_out):
        if _already_done(folder_out, plan):
            say(f"{folder_out} is complete: {len(open_dataset(folder_out)):,} rows")
            return open_dataset(folder_out)
        _start_work(folder_out, plan, inputs)
        if encoder:
            shutil.copytree(encoder, folder_out / "autoencoder", dirs_exist_ok=True)
        _make_shards(folder_out, plan, len(inputs), workers)
        _finish(folder_out, plan, len(inputs))
    return open_dataset(folder_out)


def fetch_autoencoder(reference: str) -> tuple[Path, dict[str, Any]]:
    """The folder of an autoencoder, from the registry or any diffusers folder, and what the card says of it."""
    if reference.startswith(("models:/", "runs:/")):
        fetched = fetch_model(reference)
        folder, resolved = fetched.folder, fetched.reference
    else:
        folder, resolved = local_path(reference), Path(reference).name  # where it lies is this machine's affair
    return folder, load_autoencoder(folder).describe() | {"reference": resolved}


def _plan(
    source: Path, resolution: int | None, crop: str, short_side: int | None, stride: int | None, shard_rows: int
) -> tuple[list[dict[str, Any]], Plan]:
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder of images or a prepared dataset")
    if not source.is_dir():
        raise UserError(f"{source} is a file, and a folder of images or a prepared dataset was wanted")
    if is_dataset(Folder.at(source)):
        rows = open_dataset(source)
        if rows.kind != "pixels":
            raise UserError(f"{source} holds {rows.kind}, and only pixels can be encoded: give the pixel dataset")
        inputs: list[dict[str, Any]] = [{"row": row} for row in range(len(rows))]
        return inputs, Plan(str(source), "dataset", None, rows.class_names, None, shard_rows, rows.fingerprint)

    if crop not in CROPS:
        raise UserError(f"--crop {crop} is unknown: choose one of {', '.join(CROPS)}")
    if not resolution:
        raise UserError("--resolution is missing: give the side of the prepared images in pixels, such as 64")
    if crop == "windows":
        short_side = short_side or 4 * resolution
        stride = stride or max(1, resolution // 10)
        if short_side < resolution:
            raise UserError(f"--short-side {short_side} is below the resolution {resolution}: no window fits")
    transform = Transform(resolution, crop, short_side=short_side, stride=stride)
    files = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS and (path.is_file() or path.is_symlink())
    )
    if not files:
        kinds = " ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError(f"{source} holds no image: files ending in {kinds} were looked for, in all sub-folders")
    class_names = sorted({name.split("/")[0] for name in files if "/" in name})
    inputs = []
    for name in files:
        label = class_names.index(name.split("/")[0]) if "/" in name else -1
        if crop == "windows":
            inputs += _windows(source, name, label, transform)
        else:
            inputs.append({"key": name, "file": name, "label": label})
    digest = hashlib.sha256()
    for item in inputs:
        size = _size_bytes(source / item["file"])
        digest.update(json.dumps([item["key"], item["label"], size]).encode())
    return inputs, Plan(str(source), "images", transform, class_names, None, shard_rows, digest.hexdigest())


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _windows(source: Path, name: str, label: int, transform: Transform) -> list[dict[str, Any]]:
    """The windows of one photograph as inputs, or the photograph itself where it cannot be read."""
    whole = {"key": name, "file": name, "label": label}
    try:
        with Image.open(source / name) as image:
            upright = ImageOps.exif_transpose(image)
            width, height = _fitted(upright.size, transform.short_side or 0)
    except Exception:
        return [whole]  # its shard finds out why, and lists it
    side, stride = transform.resolution, transform.stride or 1
    windows = []
    for region, top, bottom, left, right in _regions(height, width, 2 * side):
        for y in range(top, bottom - side + 1, stride):
            for x in range(left, right - side + 1, stride):
                windows.append({**whole, "key": f"{name}@{region}#{y:05d},{x:05d}", "window": [y, x]})
    return windows


def _regions(height: int, width: int, side: int) -> list[tuple[str, int, int, int, int]]:
    """(name, top, bottom, left, right) of a grid of regions of at least `side` pixels, or of one region."""
    rows, columns = max(1, height // side), max(1, width // side)
    return [
        (f"{r},{c}", height * r // rows, height * (r + 1) // rows, width * c // columns, width * (c + 1) // columns)
        for r in range(rows)
        for c in range(columns)
    ]


def _fitted(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale))


def _already_done(folder: Path, plan: Plan) -> bool:
    """Whether the folder holds this very preparation; refuses any other content."""
    if (folder / CARD).is_file():
        if read_json(folder / CARD).get("preparation") == plan.identity():
            shutil.rmtree(folder / WORK, ignore_errors=True)
            return True
        raise UserError(f"{folder} holds another dataset: choose an empty folder, or remove it")
    work = folder / WORK / "plan.json"
    if work.is_file():
        begun = read_json(work)
        if begun["identity"] != plan.identity():
            changed = [
                key for key, value in asdict(plan).items() if begun["plan"].get(key) != value and key != "source"
            ]
            raise UserError(
                f"{folder} holds an unfinished preparation with other {' and '.join(changed)}: "
                "repeat that call, or choose an empty folder"
            )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no preparation: choose an empty folder")
    return False


def _start_work(folder: Path, plan: Plan, inputs: list[dict[str, Any]]) -> None:
    (folder / WORK).mkdir(exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    sweep_partial(folder / WORK)
    sweep_partial(folder / "shards")
    write_json(folder / WORK / "plan.json", {"identity": plan.identity(), "plan": asdict(plan)})
    write_json_lines(folder / WORK / "inputs.jsonl", inputs)


def _make_shards(folder: Path, plan: Plan, inputs: int, workers: int | None) -> None:
    shards = range((inputs + plan.shard_rows - 1) // plan.shard_rows)
    todo = [{"shard": shard} for shard in shards if not (folder / WORK / f"part-{shard:05d}.json").is_file()]
    title = "encoding" if plan.autoencoder else "preparing"
    kept = inputs - sum(min(plan.shard_rows, inputs - item["shard"] * plan.shard_rows) for item in todo)
    with progress(title, inputs, "images") as meter:
        meter.begin(kept)
        for row in map_on_actors(ShardMaker, str(folder), todo, workers):
            meter.update(meter.done + row["inputs"])


class ShardMaker:
    """Makes shards of one preparation; holds the autoencoder where there is one."""

    def __init__(self, folder: str) -> None:
        quiet_environment()
        self.folder = Path(folder)
        values = read_json(self.folder / WORK / "plan.json")["plan"]
        transform = Transform(**values["transform"]) if values["transform"] else None
        self.plan = Plan(**{**values, "transform": transform})
        lines = (self.folder / WORK / "inputs.jsonl").read_text().splitlines()
        self.inputs = [json.loads(line) for line in lines]
        self.source = Path(self.plan.source)
        self.pixels = open_dataset(self.source) if self.plan.source_kind == "dataset" else None
        self.autoencoder = load_autoencoder(self.folder / "autoencoder") if self.plan.autoencoder else None
        self._photograph: tuple[str, np.ndarray] | None = None

    def __call__(self, item: dict[str, int]) -> dict[str, int]:
        """Make shard `item["shard"]`: its Arrow file, then the note that says it is finished."""
        self._photograph = None  # every shard reads, and hashes, what it needs itself
        first = item["shard"] * self.plan.shard_rows
        inputs = self.inputs[first : first + self.plan.shard_rows]
        if self.pixels is not None:
            rows = self.pixels.rows([entry["row"] for entry in inputs])
            keys, labels, images = list(rows["key"]), [int(label) for label in rows["label"]], rows["image"]
            skipped: list[dict[str, str]] = []
            digest = self.plan.inputs_sha256
        else:
            keys, labels, images, skipped, digest = self._read(inputs)
        name = f"part-{item['shard']:05d}"
        note: dict[str, Any] = {"inputs": len(inputs), "rows": len(keys), "skipped": skipped, "source_sha256": digest}
        if keys:
            tensors = {"image": images} if self.autoencoder is None else self._encode(images)
            note |= {"shape": list(images.shape[1:]), "classes": Counter(labels), "sums": _sums(tensors)}
            note |= self._write(name, keys, labels, tensors)
        write_json(self.folder / WORK / f"{name}.json", note)
        return {"shard": item["shard"], "inputs": len(inputs)}

    def _write(self, name: str, keys: list[str], labels: list[int], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
        path = self.folder / "shards" / f"{name}.arrow"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        write_shard(partial, keys, labels, tensors)
        partial.replace(path)
        return {"file": f"shards/{path.name}", "bytes": path.stat().st_size, "sha256": file_sha256(path)}

    def _read(self, inputs: list[dict[str, Any]]) -> tuple[list[str], list[int], np.ndarray, list[dict[str, str]], str]:
        keys, labels, images, skipped = [], [], [], []
        digest = hashlib.sha256()
        for entry in inputs:
            try:
                image = self._image(entry, digest)
            except Exception as error:
                skipped.append({"key": entry["key"], "error": _reason(error, self.source / entry["file"])})
                continue
            keys.append(entry["key"])
            labels.append(entry["label"])
            images.append(image.transpose(2, 0, 1))
        stacked = np.stack(images) if images else np.empty((0, 3, 0, 0), np.uint8)
        return keys, labels, stacked, skipped, digest.hexdigest()

    def _image(self, entry: dict[str, Any], digest: Any) -> np.ndarray:
        """One input as (R, R, 3) uint8; raises where it cannot be used."""
        transform = self.plan.transform
        assert transform is not None  # a plan over images has one
        path = self.source / entry["file"]
        if "window" not in entry:
            digest.update(path.read_bytes())
            return _transformed(_decoded(path), transform)
        if self._photograph is None or self._photograph[0] != entry["file"]:
            digest.update(path.read_bytes())
            image = _decoded(path)
            size = _fitted(image.size, transform.short_side or 0)
            self._photograph = (entry["file"], np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
        y, x = entry["window"]
        window = self._photograph[1][y : y + transform.resolution, x : x + transform.resolution]
        if window.mean() < DARK_MEAN:
            raise ValueError(f"near-black window (mean below {DARK_MEAN:g})")
        if window.std() < FLAT_STD:
            raise ValueError(f"flat window (standard deviation below {FLAT_STD:g})")
        return window

    def _encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        assert self.autoencoder is not None
        means, stds = [], []
        for start in range(0, len(images), ENCODE_BATCH):
            batch = images[start : start + ENCODE_BATCH]
            padded = np.concatenate([batch, np.repeat(batch[-1:], ENCODE_BATCH - len(batch), axis=0)])
            mean, std = self.autoencoder.encode(torch.from_numpy(padded))
            means.append(mean[: len(batch)].numpy().astype(np.float16))
            stds.append(std[: len(batch)].numpy().astype(np.float16))
        return {"mean": np.concatenate(means), "std": np.concatenate(stds)}


def _decoded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGB")


def _transformed(image: Image.Image, transform: Transform) -> np.ndarray:
    """Crop and resize to (R, R, 3) uint8."""
    side = transform.resolution
    if transform.crop == "none":
        if image.size != (side, side):
            raise ValueError(f"is {image.width}x{image.height}; --crop none takes {side}x{side} images as they are")
        return np.asarray(image)
    if transform.crop == "dhariwal":  # ADM: halve by box filter while twice too large, then bicubic
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    image = image.crop((left, top, left + square, top + square))
    if square != side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _reason(error: Exception, path: Path) -> str:
    """Why an input was skipped, without a word that depends on this machine."""
    if type(error) is ValueError:
        return str(error)
    message = str(error).replace(str(path), path.name)
    return f"{type(error).__name__}: {message}"


def _sums(tensors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Per channel: how many values, their sum, and their sum of squares (for latents E[z^2] = mean^2 + std^2)."""
    values = next(iter(tensors.values())).astype(np.float64)
    squares = values**2
    if "std" in tensors:
        squares += tensors["std"].astype(np.float64) ** 2
    count = values.size // values.shape[1]
    return {
        "count": [count] * values.shape[1],
        "sum": values.sum((0, 2, 3)).tolist(),
        "squares": squares.sum((0, 2, 3)).tolist(),
    }


def _finish(folder: Path, plan: Plan, inputs: int) -> None:
    """Put the shards' notes together; the card is written last and makes the dataset complete."""
    notes = [read_json(path) for path in sorted((folder / WORK).glob("part-*.json"))]
    skipped = [entry for note in notes for entry in note["skipped"]]
    whole = [note for note in notes if note["rows"]]
    if not whole:
        reasons = Counter(entry["error"] for entry in skipped).most_common(2)
        shutil.rmtree(folder / WORK)
        shutil.rmtree(folder / "shards")
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise UserError(f"none of the {inputs} inputs in {plan.source} can be used ({why}): give readable images")
    write_json_lines(folder / "skipped.jsonl", skipped)
    write_json(folder / CARD, _card(plan, notes, whole, skipped, inputs))
    shutil.rmtree(folder / WORK)
    rows = sum(note["rows"] for note in whole)
    say(f"{rows:,} rows + {len(skipped):,} skipped = {inputs:,} inputs in {folder}")


def _card(
    plan: Plan, notes: list[dict[str, Any]], whole: list[dict[str, Any]], skipped: list[dict[str, str]], inputs: int
) -> dict[str, Any]:
    totals = {name: np.sum([note["sums"][name] for note in whole], axis=0) for name in ("count", "sum", "squares")}
    mean = totals["sum"] / totals["count"]
    std = np.sqrt(np.maximum(totals["squares"] / totals["count"] - mean**2, 0))
    classes: Counter[int] = Counter()
    for note in whole:
        classes.update({int(label): count for label, count in note["classes"].items()})
    channels, _, resolution = whole[0]["shape"]
    parent = open_dataset(plan.source).card if plan.source_kind == "dataset" else None
    if plan.autoencoder:
        channels, resolution = len(mean), resolution // plan.autoencoder["downscale"]
    transform = parent["transform"] if parent else asdict(plan.transform) if plan.transform else None
    split_by = parent["split_by"] if parent else "region" if transform and transform["crop"] == "windows" else "key"
    source = plan.inputs_sha256 if parent else _combined([note["source_sha256"] for note in notes])
    return {
        "format_version": DATASET_FORMAT,
        "kind": "latents" if plan.autoencoder else "pixels",
        "resolution": resolution,
        "channels": channels,
        "dtype": "float16" if plan.autoencoder else "uint8",
        "rows": sum(note["rows"] for note in whole),
        "inputs": inputs,
        "skipped": {"count": len(skipped), "reasons": dict(Counter(entry["error"] for entry in skipped))},
        "classes": [{"name": name, "rows": classes[index]} for index, name in enumerate(plan.class_names)],
        "mean": mean.tolist(),
        "std": std.tolist(),
        "transform": transform,
        "split_by": split_by,
        "autoencoder": plan.autoencoder,
        "source_sha256": source,
        "preparation": plan.identity(),
        "shards": [{key: note[key] for key in ("file", "rows", "bytes", "sha256")} for note in whole],
    }


def _combined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
