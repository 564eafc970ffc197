"""Sample folders: what a folder of samples contains, which of its images are intact, and its final files."""

import hashlib
import io
import tempfile
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.errors import UserError
from patchloom.pipelines.pages.pictures import contact_sheet
from patchloom.pipelines.sample.formats import join_npz, pixels, read_contents
from patchloom.pipelines.sample.seeds import SeedClasses, SeedList, Seeds
from patchloom.platform.compute.jobs import NOTES_FOLDER, check_same, remove_work
from patchloom.platform.dataset.label_files import opened_here
from patchloom.platform.files.folder import Folder, in_threads
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.spool import sorted_rows
from patchloom.platform.records.samples import KeptImage, ManifestEntry, SamplingCard

SAMPLING_CARD, MANIFEST, CONTACT_SHEET, JOINED_NPZ = (
    "sampling.json", "manifest.jsonl", "contact_sheet.png", "samples.npz",
)  # fmt: skip
VERIFIED = ".verified"  # which files were verified; without it, all are verified again
VERIFIED_RECORD = np.dtype([("seed", "<i8"), ("digest", "u1", (8,))])
LATER_OPTIONS = {"precision": "fp32"}  # what earlier versions did without these options
SHEET_IMAGES = 64
READERS, ARCHIVE_READERS = 16, 2  # an archive is held in memory while it is verified
STAMPED_AT_ONCE = 16


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
        later: dict[str, Any] = {name: value for name, value in LATER_OPTIONS.items() if name not in found}
        if found.outpaint is not None:
            later["outpaint"] = KeptImage.model_validate({"method": found.outpaint.method, **found.outpaint.to_dict()})
        found = found.model_copy(update=later)
        check_same(folder, "samples", found, card, ignored=("model.reference", "lineage"))
    else:
        check_samples_folder(folder)
        folder.write_json(SAMPLING_CARD, card.to_dict())


def check_samples_folder(folder: Folder) -> None:
    """Raise UserError unless a folder contains samples, or nothing."""
    check_output_folder(folder, "samples", SAMPLING_CARD)


def read_entries(folder: Folder) -> Iterator[ManifestEntry]:
    """The lines of a folder's manifest, in the order of the seeds, one by one: there may be millions."""
    return _read_lines(folder, MANIFEST)


def _read_lines(folder: Folder, name: str) -> Iterator[ManifestEntry]:
    if folder.has(name):
        with opened_here(folder, name) as file:
            yield from parse_entries(file, f"{folder}/{name}")


def parse_entries(lines: Iterable[bytes], place: str, first: int = 1) -> Iterator[ManifestEntry]:
    """The entries in lines of a manifest, from a line with this number on; raises UserError for a damaged one."""
    for number, line in enumerate(lines, first):
        yield ManifestEntry.parse(line.rstrip(b"\n"), f"{place}: line {number}")


def _noted_entries(folder: Folder, notes: list[str]) -> Iterator[ManifestEntry]:
    """The lines of the manifest and of the notes, in the order of the seeds; a note replaces an older line."""
    names = [MANIFEST, *(f"{NOTES_FOLDER}/{name}" for name in notes)]
    lines = (
        (entry.seed, order, entry.label, entry.file, entry.sha256)
        for order, name in enumerate(names)
        for entry in _read_lines(folder, name)
    )
    for _, same in groupby(sorted_rows(lines), key=itemgetter(0)):
        seed, _, label, file, sha256 = deque(same, maxlen=1)[0]
        yield ManifestEntry(seed=seed, label=label, file=file, sha256=sha256)


@dataclass(frozen=True)
class IntactImages:
    """The intact images of a folder.

    Args:
        seeds: their seeds.
        archives: (A,) int64, the numbers of the archives, ascending; empty for PNG files.
        places: (A, 2) int64, where the lines of each archive begin in the manifest, and their length, in bytes.
    """

    seeds: Seeds
    archives: np.ndarray
    places: np.ndarray

    def lines_of(self, archive: int) -> tuple[int, int]:
        """Where the lines of an archive begin in the manifest, and their length, in bytes."""
        at = int(np.searchsorted(self.archives, archive))
        if at == len(self.archives) or self.archives[at] != archive:
            return 0, 0
        first, size_bytes = self.places[at].tolist()
        return first, size_bytes


def intact_images(folder: Folder, wanted: Seeds, classes: SeedClasses) -> IntactImages:
    """Find the intact images, and write the manifest of them.

    The notes of a killed call move into the manifest. Lines of missing or damaged images leave it, so that these
    images are sampled again. The images of an archive, or of a folder of PNG files, are verified by their checksums,
    unless the files are those that were verified before.

    Args:
        folder: the folder of samples.
        wanted: the seeds of this call.
        classes: their classes.

    Raises:
        UserError: the folder contains one of the seeds with another class.
    """
    card, notes = read_sampling_card(folder), list(folder.folder(NOTES_FOLDER).files())
    seeds, archives, places = SeedList(), array("q"), array("q")
    verified, known = _VerifiedBlocks(), _VerifiedBlocks.read(folder)
    lines_read = lines_kept = 0
    with tempfile.NamedTemporaryFile() as manifest:
        for block in _checked_blocks(folder, _noted_entries(folder, notes), known, bool(card.shard_size)):
            lines_read, lines_kept = lines_read + block.size, lines_kept + len(block.entries)
            if not block.entries:
                continue
            _check_classes(folder, block.entries, wanted, classes)
            for entry in block.entries:
                seeds.add(entry.seed)
            if card.shard_size:
                archives.append(block.entries[0].seed // card.shard_size)
                places.extend((manifest.tell(), len(block.content)))
            manifest.write(block.content)
            verified.add(block)
        manifest.flush()
        if notes or lines_kept < lines_read or (lines_read and folder.size(MANIFEST) != manifest.tell()):
            for name in (CONTACT_SHEET, JOINED_NPZ):  # outdated
                folder.remove(name)
            folder.put(Path(manifest.name), MANIFEST)
    if verified.content != known.content:
        folder.write(VERIFIED, bytes(verified.content))
    remove_work(folder)
    return IntactImages(seeds.seeds(), np.array(archives, np.int64), np.array(places, np.int64).reshape(-1, 2))


def _manifest_lines(entries: Iterable[ManifestEntry]) -> bytes:
    return "".join(f"{entry.to_json()}\n" for entry in entries).encode()


def _check_classes(folder: Folder, entries: list[ManifestEntry], wanted: Seeds, classes: SeedClasses) -> None:
    """Raise UserError if a line has another class than the wanted one."""
    found = np.array([entry.seed for entry in entries], np.int64)
    at = np.flatnonzero(wanted.positions(found) >= 0)
    for entry, label in zip((entries[row] for row in at), classes.of(found[at]).tolist(), strict=True):
        if entry.label != label:
            raise UserError(
                f"{folder} contains seed {entry.seed} with class {entry.label}, not {label}: choose another folder"
            )


@dataclass(frozen=True)
class _Block:
    """The lines of one archive, or of one folder of PNG files, which are verified together.

    Args:
        entries: the lines.
        content: the lines as the manifest has them.
        size: the number of lines, also of those that are no longer in `entries`.
        stamps: what changes when a file is replaced, from before the files were read.
        is_verified: whether the same files were verified before.
    """

    entries: list[ManifestEntry]
    content: bytes
    size: int
    stamps: tuple[tuple[str, ...], ...] = ()
    is_verified: bool = False

    def of(self, intact: list[ManifestEntry]) -> "_Block":
        """The block with only the lines that are intact."""
        if len(intact) == len(self.entries):
            return self
        return replace(self, entries=intact, content=_manifest_lines(intact))


class _VerifiedBlocks:
    """Which files were verified: 16 bytes for each block, a seed and a hash of its lines and its files' stamps.

    Args:
        content: the content of the file that keeps them, in the order of the seeds.
    """

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)

    @staticmethod
    def read(folder: Folder) -> "_VerifiedBlocks":
        """Those of a folder; none if the file is damaged."""
        content = folder.read(VERIFIED) if folder.has(VERIFIED) else b""
        return _VerifiedBlocks(content if len(content) % VERIFIED_RECORD.itemsize == 0 else b"")

    def __contains__(self, block: _Block) -> bool:
        records = np.frombuffer(self.content, VERIFIED_RECORD)
        at = int(np.searchsorted(records["seed"], block.entries[0].seed))
        return bool(block.stamps) and records[at : at + 1].tobytes() == self._record(block)

    def add(self, block: _Block) -> None:
        """Add the next block."""
        if block.stamps:
            self.content += self._record(block)

    @staticmethod
    def _record(block: _Block) -> bytes:
        digest = hashlib.blake2b(repr(block.stamps).encode(), digest_size=8)
        digest.update(block.content)
        return block.entries[0].seed.to_bytes(8, "little") + digest.digest()


def _checked_blocks(
    folder: Folder, entries: Iterable[ManifestEntry], known: _VerifiedBlocks, is_archive: bool
) -> Iterator[_Block]:
    """The lines block by block, without those of missing and damaged images."""

    def stamped(lines: list[ManifestEntry]) -> _Block:
        block = _Block(lines, _manifest_lines(lines), len(lines), folder.stamps(_place_of(lines[0])))
        return replace(block, is_verified=block in known)

    def parts(blocks: Iterable[_Block]) -> Iterator[tuple[_Block, list[ManifestEntry]]]:
        for block in blocks:
            if block.is_verified:
                yield block, block.entries
            else:
                yield from ((block, list(lines)) for _, lines in groupby(block.entries, key=lambda entry: entry.file))

    def intact(part: tuple[_Block, list[ManifestEntry]]) -> tuple[_Block, list[ManifestEntry]]:
        block, lines = part
        if block.is_verified:
            return part
        return block, [entry for entry, content in read_contents(folder, lines) if content is not None]

    blocks = in_threads(stamped, (list(lines) for _, lines in groupby(entries, key=_place_of)), STAMPED_AT_ONCE)
    checked = in_threads(intact, parts(blocks), ARCHIVE_READERS if is_archive else READERS)
    for _, found in groupby(checked, key=lambda part: id(part[0])):
        several = list(found)
        yield several[0][0].of([entry for _, lines in several for entry in lines])


def _place_of(entry: ManifestEntry) -> str:
    """The archive of an image, or the folder of a PNG file."""
    return entry.file.rpartition("/")[0] or entry.file


def complete_folder(folder: Folder, format: str, images: int) -> int:
    """Move the notes into the manifest and write the final files.

    Args:
        folder: the folder of samples.
        format: the file format.
        images: the number of lines of the manifest.

    Returns:
        The number of images in the folder.
    """
    notes = list(folder.folder(NOTES_FOLDER).files())
    final = [CONTACT_SHEET, *([JOINED_NPZ] if format == "npz" else [])]
    if not notes and all(folder.has(name) for name in final):
        return images
    with tempfile.NamedTemporaryFile() as manifest:
        count = 0
        for entry in _noted_entries(folder, notes):
            manifest.write(_manifest_lines([entry]))
            count += 1
        manifest.flush()
        lines = _ManifestCopy(Path(manifest.name))
        if format == "npz":
            join_npz(folder, lines, count, JOINED_NPZ)
        _write_sheet(folder, list(islice(lines, SHEET_IMAGES)))
        folder.put(Path(manifest.name), MANIFEST)
    remove_work(folder)
    return count


@dataclass(frozen=True)
class _ManifestCopy:
    """The entries in a file of lines of a manifest, which can be iterated several times."""

    path: Path

    def __iter__(self) -> Iterator[ManifestEntry]:
        with self.path.open("rb") as file:
            yield from parse_entries(file, str(self.path))


def _write_sheet(folder: Folder, entries: list[ManifestEntry]) -> None:
    images = read_samples(folder, entries)
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
