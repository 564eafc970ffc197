"""Sample folders: what a folder of samples contains, which of its images are intact, and its final files."""

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np

from patchloom.errors import UserError
from patchloom.pipelines.pages.pictures import contact_sheet
from patchloom.pipelines.sample.formats import join_npz, pixels, read_contents
from patchloom.platform.compute.jobs import NOTES_FOLDER, WORK_FOLDER, check_empty, check_same
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.samples import ManifestEntry, SamplingCard

SAMPLING_CARD, MANIFEST, CONTACT_SHEET, JOINED_NPZ = (
    "sampling.json", "manifest.jsonl", "contact_sheet.png", "samples.npz",
)  # fmt: skip
LATER_OPTIONS = {"precision": "fp32"}  # what earlier versions did without these options
SHEET_IMAGES = 64
READERS, ARCHIVE_READERS = 16, 2  # an archive is held in memory while it is verified


def read_sampling_card(folder: Folder) -> SamplingCard:
    """The card of a folder of samples; raises UserError if it is damaged or newer than this version."""
    return SamplingCard.parse(folder.read(SAMPLING_CARD), f"{folder}/{SAMPLING_CARD}")


def write_or_check_card(folder: Folder, card: SamplingCard) -> None:
    """Write the card into an empty folder, or compare it with the card of an earlier call.

    A model is the same if its weights are, whatever its name.

    Raises:
        UserError: the folder contains other files, or samples with other options.
    """
    if folder.has(SAMPLING_CARD):
        found = read_sampling_card(folder)
        later = {name: value for name, value in LATER_OPTIONS.items() if name not in found}
        found = found.model_copy(update=later)
        check_same(folder, "samples", found, card, ignored=("model.reference", "lineage"))
    else:
        check_empty(folder, "samples")
        folder.write_json(SAMPLING_CARD, card.to_dict())


def read_entries(folder: Folder) -> list[ManifestEntry]:
    """The lines of a folder's manifest, in the order of the seeds."""
    return _read_lines(folder, MANIFEST)


def _read_lines(folder: Folder, name: str) -> list[ManifestEntry]:
    lines = folder.read(name).splitlines() if folder.has(name) else []
    return [ManifestEntry.parse(line, f"{folder}/{name}: line {n}") for n, line in enumerate(lines, 1)]


def _write_manifest(folder: Folder, entries: list[ManifestEntry]) -> None:
    folder.write(MANIFEST, "".join(f"{entry.to_json()}\n" for entry in entries))


def _noted_entries(folder: Folder, notes: list[str]) -> list[ManifestEntry]:
    """The lines of the manifest and of the notes, in the order of the seeds; a note replaces an older line."""
    lines = [*read_entries(folder), *(line for name in notes for line in _read_lines(folder, f"{NOTES_FOLDER}/{name}"))]
    by_seed = {entry.seed: entry for entry in lines}
    return [by_seed[seed] for seed in sorted(by_seed)]


def intact_entries(folder: Folder) -> dict[int, ManifestEntry]:
    """The lines of all intact images, by seed.

    The notes of a killed call move into the manifest. Lines of missing or damaged images leave it, so that these
    images are sampled again.
    """
    notes = list(folder.folder(NOTES_FOLDER).files())
    entries = _noted_entries(folder, notes)
    intact = _intact(folder, entries)
    if notes or len(intact) < len(entries):
        for name in (CONTACT_SHEET, JOINED_NPZ):  # outdated
            folder.remove(name)
        _write_manifest(folder, intact)
    folder.remove_folder(WORK_FOLDER)
    return {entry.seed: entry for entry in intact}


def _intact(folder: Folder, entries: list[ManifestEntry]) -> list[ManifestEntry]:
    def verified(lines: list[ManifestEntry]) -> list[ManifestEntry]:
        return [entry for entry, content in read_contents(folder, lines) if content is not None]

    by_file = [list(lines) for _, lines in groupby(entries, key=lambda entry: entry.file)]
    with ThreadPoolExecutor(ARCHIVE_READERS if len(by_file) < len(entries) else READERS) as pool:
        return [entry for lines in pool.map(verified, by_file) for entry in lines]


def check_classes(folder: Folder, entries: dict[int, ManifestEntry], classes: dict[int, int]) -> None:
    """Raise UserError if the folder contains one of the seeds with another class."""
    for seed, label in classes.items():
        if seed in entries and entries[seed].label != label:
            raise UserError(
                f"{folder} contains seed {seed} with class {entries[seed].label}, not {label}: choose another folder"
            )


def complete_folder(folder: Folder, format: str) -> int:
    """Move the notes into the manifest and write the final files; returns the number of images in the folder."""
    notes = list(folder.folder(NOTES_FOLDER).files())
    entries = _noted_entries(folder, notes)
    final = [CONTACT_SHEET, *([JOINED_NPZ] if format == "npz" else [])]
    if notes or not all(folder.has(name) for name in final):
        if format == "npz":
            join_npz(folder, entries, JOINED_NPZ)
        _write_sheet(folder, entries)
        _write_manifest(folder, entries)
        folder.remove_folder(WORK_FOLDER)
    return len(entries)


def _write_sheet(folder: Folder, entries: list[ManifestEntry]) -> None:
    images = read_samples(folder, entries[:SHEET_IMAGES])
    sheet = io.BytesIO()
    contact_sheet(images, scale=1 if images.shape[-1] >= 64 else 2).save(sheet, format="PNG")
    folder.write(CONTACT_SHEET, sheet.getvalue())


def read_samples(folder: Folder | Path | str, entries: list[ManifestEntry]) -> np.ndarray:
    """The images of manifest lines, in any format.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        UserError: an image is missing or damaged.
    """
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    images = []
    for entry, content in read_contents(place, entries):
        if content is None:
            raise UserError(
                f"seed {entry.seed} in {place}/{entry.file} is missing or damaged: run `patchloom sample` again"
            )
        images.append(pixels(content))
    return np.stack(images)
