"""Sample folders: what a folder of samples holds, which of its images are whole, and what is written at the end."""

import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.errors import UserError
from patchloom.pipelines.pages.pictures import contact_sheet
from patchloom.pipelines.sample.formats import join_npz, pixels, read_contents
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import locked, make_folder, sweep_partial

SAMPLES_FORMAT = 1
CARD, MANIFEST, SHEET, JOINED = "sampling.json", "manifest.jsonl", "contact_sheet.png", "samples.npz"
WORK = ".work"
NOTES = f"{WORK}/notes"  # a file a finished shard: its lines of the manifest
SHEET_IMAGES = 64
READERS, ARCHIVE_READERS = 16, 2  # an archive is held in memory while it is verified


def held(folder: Folder) -> AbstractContextManager[None]:
    """Keep other processes of this machine out of a local folder; a remote one has no lock."""
    if folder.is_remote:
        return contextlib.nullcontext()
    return locked(make_folder(folder.path))


def open_folder(folder: Folder, options: dict[str, Any], lineage: dict[str, Any]) -> None:
    """Begin a folder with its card, or see that an earlier one says the same; UserError with what differs."""
    if not folder.has(CARD):
        if any(not name.startswith(".") for name in folder.files()):
            raise UserError(f"{folder} is not empty and holds no samples: choose an empty folder")
        card = {"format_version": SAMPLES_FORMAT, "kind": "samples", **options, "lineage": lineage}
        folder.write_json(CARD, card)
        return
    found = folder.read_json(CARD)
    differs = [key for key in options if _told(found, key) != _told(options, key)]
    if differs:
        what = "; ".join(f"{key} was {_told(found, key)} and is now {_told(options, key)}" for key in differs)
        raise UserError(f"{folder} holds samples with other options ({what}): choose another folder")


def _told(card: dict[str, Any], key: str) -> Any:
    """What counts as the same option: a model is the same by whatever name, if its weights are."""
    value = card.get(key)
    return {name: value[name] for name in value if name != "reference"} if key == "model" and value else value


def finished(folder: Folder) -> dict[int, dict[str, Any]]:
    """Manifest lines by seed, of images that are there and whole; the others are made again.

    What a killed call had noted down comes into the manifest, and its notes and half-written files go.
    """
    notes = folder.folder(NOTES).files()
    lines = [entry for name in notes for entry in _read_lines(folder, f"{NOTES}/{name}")]
    told = {entry["seed"]: entry for entry in [*_read_lines(folder, MANIFEST), *lines]}
    whole = _whole(folder, [told[seed] for seed in sorted(told)])
    if notes or len(whole) < len(told):
        for name in (SHEET, JOINED):  # they show what is there no more, or not yet all of it
            folder.remove(name)
        _write_lines(folder, whole)
    folder.remove_folder(WORK)
    if not folder.is_remote:
        for place in (folder.path, *(path for path in folder.path.iterdir() if path.is_dir())):
            sweep_partial(place)
    return {entry["seed"]: entry for entry in whole}


def _whole(folder: Folder, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines whose images are what they say, in their order."""

    def verified(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry for entry, content in read_contents(folder, some) if content is not None]

    by_file = [list(lines) for _, lines in groupby(entries, key=lambda entry: entry["file"])]
    readers = ARCHIVE_READERS if len(by_file) < len(entries) else READERS
    with ThreadPoolExecutor(readers) as pool:
        return [entry for some in pool.map(verified, by_file) for entry in some]


def _read_lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    if not folder.has(name):
        return []
    try:
        return [json.loads(line) for line in folder.read(name).splitlines()]
    except ValueError as error:
        raise UserError(f"{folder}/{name} has a damaged line ({error}): remove that line or restore the file") from None


def read_entries(folder: Folder) -> list[dict[str, Any]]:
    """The lines of a folder's manifest: seed, label, file and sha256 of every image, in the order of their seeds."""
    return _read_lines(folder, MANIFEST)


def _write_lines(folder: Folder, entries: list[dict[str, Any]]) -> None:
    folder.write(MANIFEST, "".join(json.dumps(entry) + "\n" for entry in entries))


def check_classes(folder: Folder, done: dict[int, dict[str, Any]], classes: dict[int, int]) -> None:
    """Raise UserError where a seed that is there would be of another class now."""
    for seed, label in classes.items():
        if seed in done and done[seed]["label"] != label:
            raise UserError(
                f"{folder} holds seed {seed} of class {done[seed]['label']}, and class {label} is asked for now: "
                "choose another folder"
            )


def finish(folder: Folder, options: dict[str, Any]) -> int:
    """Put the notes into the manifest, draw the contact sheet, join what is one array; how many images there are."""
    notes = folder.folder(NOTES).files()
    told = {entry["seed"]: entry for entry in _read_lines(folder, MANIFEST)}
    told |= {entry["seed"]: entry for name in notes for entry in _read_lines(folder, f"{NOTES}/{name}")}
    entries = [told[seed] for seed in sorted(told)]
    is_joined = options["format"] == "npz"
    if notes or not folder.has(SHEET) or (is_joined and not folder.has(JOINED)):
        if is_joined:
            join_npz(folder, entries, JOINED)
        _write_sheet(folder, entries)
        _write_lines(folder, entries)
        folder.remove_folder(WORK)
    return len(entries)


def _write_sheet(folder: Folder, entries: list[dict[str, Any]]) -> None:
    images = read_samples(folder, entries[:SHEET_IMAGES])
    sheet = io.BytesIO()
    contact_sheet(images, scale=1 if images.shape[-1] >= 64 else 2).save(sheet, format="PNG")
    folder.write(SHEET, sheet.getvalue())


def read_samples(folder: Folder | Path | str, entries: list[dict[str, Any]]) -> np.ndarray:
    """(N, C, H, W) uint8 images of manifest lines, in any format; raises UserError at one that was changed."""
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    images = []
    for entry, content in read_contents(place, entries):
        if content is None:
            raise UserError(
                f"seed {entry['seed']} in {place}/{entry['file']} is missing or not what was sampled: run the same "
                "`patchloom sample` again"
            )
        images.append(pixels(content))
    return np.stack(images)
