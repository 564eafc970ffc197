"""Inspect: what is in a dataset, a model or the registry, verified; and what works on this machine."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.models.checkpoints import load_whole_model, read_card
from patchloom.pipelines.pictures import contact_sheet, save_png
from patchloom.platform.cluster import ray_session
from patchloom.platform.dataset import CARD, Dataset, open_dataset
from patchloom.platform.progress import say
from patchloom.platform.registry import fetch_model, list_versions
from patchloom.platform.storage import local_path
from patchloom.platform.tracking import require_reachable, tracking_uri


def inspect(what: str) -> dict[str, Any]:
    """The verified card of a dataset or a model; raises UserError where a checksum is wrong."""
    if "://" not in what and not what.startswith(("models:/", "runs:/")):
        folder = local_path(what)
        if (folder / CARD).is_file() or not folder.exists():
            dataset = open_dataset(what)
            dataset.verify()
            return dataset.card
    model = load_whole_model(fetch_model(what).folder)
    return model.card


def dataset_sheet(dataset: Dataset, path: Path, images: int = 64) -> None:
    """A contact sheet of rows spread over a pixel dataset."""
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int)
    pictures = dataset.rows(chosen)["image"]
    save_png(contact_sheet(pictures, columns=16), path)


def models_table() -> str:
    """Every registered version: aliases, kind, resolution, p, images seen, quality and age."""
    rows = list_versions()
    if not rows:
        return f"no model is registered at {tracking_uri()}"
    header = ("MODEL", "ALIASES", "KIND", "SIDE", "P", "SCHEDULE", "IMAGES", "QUALITY", "AGE")
    table = [header]
    for row in rows:
        tags = row["tags"]
        quality = tags.get("frechet_distance") or _quality(tags)
        table.append((
            f"{row['name']}/{row['version']}",
            ",".join(row["aliases"]),
            tags.get("kind", ""),
            tags.get("resolution", ""),
            tags.get("p", ""),
            tags.get("schedule", ""),
            f"{int(tags['images_seen']):,}" if "images_seen" in tags else "",
            quality,
            _age(time.time() - row["created_unix_s"]),
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in table)  # fmt: skip


def _quality(tags: dict[str, str]) -> str:
    if "psnr_db" in tags:
        return f"PSNR {float(tags['psnr_db']):.1f} dB"
    return f"held-out loss {tags['held_out_loss']}" if "held_out_loss" in tags else ""


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def show_model(reference: str) -> str:
    """One registered version: its description, where it came from, and its card."""
    fetched = fetch_model(reference)
    card = read_card(fetched.folder, "denoiser")
    lines = [f"{fetched.reference}  (run {fetched.run_id}, folder {fetched.folder})"]
    for row in list_versions():
        if row["name"] == fetched.name and row["version"] == fetched.version:
            lines += [f"  aliases: {', '.join(row['aliases']) or 'none'}"]
            lines += [f"  {key}: {value}" for key, value in sorted(row["tags"].items())]
    lines += [f"  classes: {', '.join(card['class_names']) or 'none'}"]
    return "\n".join([*lines, f"  sample from it: patchloom sample {fetched.reference} samples --seeds 0-63"])


def doctor() -> bool:
    """Try what the commands need and say what was found; True where all of it works."""
    import torch

    say(f"torch {torch.__version__}, {os.cpu_count()} CPUs, {torch.cuda.device_count()} GPUs")
    for index in range(torch.cuda.device_count()):
        say(f"  GPU {index}: {torch.cuda.get_device_name(index)}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    say(f"disk: {free:.0f} GiB free in {Path.cwd()}")
    works = True
    for name, check in (("MLflow", _check_mlflow), ("Ray", _check_ray)):
        try:
            say(f"{name}: {check()}")
        except Exception as error:
            works = False
            say(f"{name}: FAILED, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return works


def _check_mlflow() -> str:
    require_reachable()
    return f"{tracking_uri()} answers, {len(list_versions())} registered versions"


def _check_ray() -> str:
    with ray_session():
        import ray

        resources = ray.cluster_resources()
        return f"version {ray.__version__}, {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs"
