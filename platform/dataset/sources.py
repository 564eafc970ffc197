"""Sources of images: a folder, zip, tar, WebDataset shards, Parquet or Arrow tables, a Hugging Face dataset, `.npz`.

`open_source` lists the inputs of a source in its order: the key, class and place of each. `SourceReader` reads an
input by its place, in any process. A new format needs an entry in `FILE_ENDINGS` here, one in `LISTERS` in
`listing.py`, a method of `SourceReader`, and one in `READ_BY_KIND`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.dataset.folder_classes import FolderNames, check_class_folder
from patchloom.platform.dataset.image_names import IMAGE_EXTENSIONS, is_hidden, is_image
from patchloom.platform.dataset.keys import KeyTable
from patchloom.platform.dataset.label_files import TABLE_ENDINGS, read_labels
from patchloom.platform.dataset.labels import Label, Labels, column_of_labels, number_classes
from patchloom.platform.dataset.listed import ListedInput, Listing
from patchloom.platform.dataset.listing import LISTERS
from patchloom.platform.dataset.raw_listing import CIFAR_FILE, cifar_batches, is_cifar_archive
from patchloom.platform.dataset.readers import TAR_ENDINGS, Place, lmdb_in_zip
from patchloom.platform.dataset.splits import ALL_SPLITS, Splits, check_split
from patchloom.platform.dataset.tar_listing import list_tars
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.inside import inner_name
from patchloom.platform.files.spool import RowSpool

FILE_ENDINGS = {
    "zip": (".zip",),
    "npz": (".npz",),
    "tar": TAR_ENDINGS,
    "table": (".parquet", ".arrow", ".feather"),
    "idx": ("idx3-ubyte", "idx3-ubyte.gz"),
    "lmdb": (".mdb", ".lmdb"),
}
LMDB_LOCKS = ("lock.mdb", ".mdb-lock", ".lmdb-lock")
NO_MATCH = (-1, None)
ARCHIVE_ENDINGS = sum(FILE_ENDINGS.values(), ())
SUPPORTED_SOURCES = (
    "a folder of images, .zip, .tar, .tar.gz, .parquet, .arrow, .npz, a saved Hugging Face dataset, an LMDB, idx "
    "files, CIFAR's archives"
)


@dataclass(frozen=True, slots=True)
class SourceInput:
    """One input: its key, class (-1: none), place in the source, size in bytes (-1: unknown), and a known error."""

    key: str
    label: int
    place: Place
    size_bytes: int
    error: str | None = None


class SourceInputs:
    """The inputs of a source in its order, kept in a temporary file. They can be read again and again.

    Args:
        rows: rows of `ListedInput`.
        number: the class number of an input from its key and its label as it is listed.
    """

    def __init__(self, rows: RowSpool, number: Callable[[str, Label], int]) -> None:
        self.rows, self.number = rows, number

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SourceInput]:
        return map(self._input, self.rows)

    def __getitem__(self, position: int) -> SourceInput:
        return self._input(self.rows[position])

    def _input(self, row: tuple[Any, ...]) -> SourceInput:
        key, place, size_bytes, label, error = row
        return SourceInput(key, self.number(key, label), place, size_bytes, error)


@dataclass(frozen=True)
class Source:
    """A listed source.

    Args:
        kind: its format, a key of `LISTERS`.
        address: the folder that the places of its inputs are in.
        name: the file or folder that the user gave, for messages.
        class_names: its classes.
        inputs: its inputs, in order.
        repeated: the positions of inputs whose key an earlier input has, in ascending order.
        unmatched_labels: number of labels whose key has no input.
        others: number of files that are not images, by ending.
        notes: which splits are read and what was taken as classes, and what else could be meant, in lines.
    """

    kind: str
    address: str
    name: str
    class_names: list[str]
    inputs: SourceInputs
    repeated: np.ndarray
    unmatched_labels: int = 0
    others: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()


def open_source(
    address: str,
    labels: str | None = None,
    image_member: str | None = None,
    classes: str | None = None,
    split: str | None = None,
) -> Source:
    """List the inputs of a source.

    Args:
        address: a local path or remote address.
        labels: a separate file of keys and labels.
        image_member: WebDataset: the ending of the members that are the images, such as "input.png".
        classes: which folder is the class instead of what labels say: "first", "last" or "none".
        split: which inputs to read: "train", "test", "val" or "all"; None: the default of the source.

    Raises:
        UserError: the source does not exist, is damaged or contains no images, or an option does not fit it.
    """
    check_class_folder(classes, labels)
    check_split(split)
    kind, folder, names = kind_of_source(address)
    if image_member is not None and kind != "tar":
        raise UserError(f"--image-member {image_member}: {address} is no WebDataset of tar files: leave the option out")
    listing = list_tars(folder, names, image_member) if image_member else LISTERS[kind](folder, names)
    name = str(Folder.at(address))
    rows, keys = RowSpool(), KeyTable()
    found = _Found()
    for position, one in enumerate(listing.inputs):
        rows.append(one.row())
        keys.add(one.key, position)
        found.take(one, listing.has_folders)
    if not rows or (image_member and not found.readable):
        raise UserError(_no_images(name, kind, listing, names, image_member))
    if classes in ("first", "last") and not listing.has_folders:
        raise UserError(f"--classes {classes}: the images of {name} are not in folders; leave the option out")
    given = read_labels(labels) if labels else listing.labels
    if classes is not None or (not given and found.labels.keys() == {None}):
        class_names, inputs, note = _by_folder(rows, found, given, classes)
        unmatched = 0
    else:
        class_names, inputs, unmatched = _labelled(listing, rows, found, given)
        note = f"classes: {len(class_names):,}, from labels"
    unmatched += listing.unmatched
    notes = (note,) if note else ()
    source = Source(kind, folder.address, name, class_names, inputs, keys.repeated(), unmatched, listing.others, notes)
    return _of_split(source, listing.splits or found.folders.splits(), split)


@dataclass
class _Found:
    """The different labels of inputs, in the order of their first inputs, and the names of their folders."""

    labels: dict[Label, None] = field(default_factory=dict)
    folders: FolderNames = field(default_factory=FolderNames)
    readable: int = 0

    def take(self, one: ListedInput, has_folders: bool) -> None:
        """Add an input."""
        self.labels[one.label] = None
        self.readable += one.error is None
        if has_folders:
            self.folders.take(one.key)


def _no_images(name: str, kind: str, listing: Listing, names: dict[str, int], image_member: str | None) -> str:
    """Why a source has no inputs, in one line."""
    if kind in ("table", "npz", "lmdb"):
        return f"{name} has no rows: give {SUPPORTED_SOURCES}"
    if image_member:
        return f"{name} has no member that ends in .{image_member.removeprefix('.')}: check --image-member"
    endings = " ".join(sorted(IMAGE_EXTENSIONS))
    is_folder = kind == "files" or (kind == "tar" and len(names) > 1)
    hint = f"; did you mean {name}/{next(iter(names))}?" if is_folder and names else ""
    found = f" (found {count_endings(listing.others)})" if listing.others else ""
    return f"{name} contains no images: no file, also in sub-folders, ends in {endings}{found}{hint}"


def count_endings(others: Counter[str], most: int = 6) -> str:
    """`.heic 10, .txt 4`: numbers of files by their ending, the most first."""
    shown = [f"{ending} {count:,}" for ending, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def _labelled(
    listing: Listing, rows: RowSpool, found: _Found, given: Labels | None
) -> tuple[list[str], SourceInputs, int]:
    """The class names, the inputs with their class as a number, and the number of labels without an input."""
    names = given.class_names if given is not None else None
    own = list(found.labels)
    as_column = dict(
        zip(own, column_of_labels(own, listing.labels.class_names if listing.labels is not None else None), strict=True)
    )
    if not given:
        class_names, numbers = _numbers(list(as_column.values()), names)
        return class_names, SourceInputs(rows, lambda key, label: numbers[as_column[label]]), 0
    matches, labelled, final = given.matched(row[0] for row in rows), RowSpool(), dict[Label, None]()
    matched, label = next(matches.rows, NO_MATCH)
    for position, (key, place, size_bytes, listed, error) in enumerate(rows):
        one = as_column[listed]
        if position == matched:
            one, (matched, label) = label, next(matches.rows, NO_MATCH)
        final[one] = None
        labelled.append((key, place, size_bytes, one, error))
    class_names, numbers = _numbers(list(final), names)
    return class_names, SourceInputs(labelled, lambda key, label: numbers[label]), matches.unused


def _by_folder(
    rows: RowSpool, found: _Found, given: Labels | None, wanted: str | None
) -> tuple[list[str], SourceInputs, str]:
    """The class names, the inputs whose classes are folders, and which folders these are."""
    choice = found.folders.choose(wanted)
    names = given.class_names if given is not None and wanted is None else None
    class_names, numbers = _numbers(list(choice.names), names)
    return class_names, SourceInputs(rows, lambda key, label: numbers.get(choice.class_of(key), -1)), choice.note


def _of_split(source: Source, splits: Splits, wanted: str | None) -> Source:
    """The source without the inputs of other splits. Its classes stay, so that they have one number in all splits."""
    chosen = splits.choose(wanted, source.name)
    left_out = Counter[str | None]()
    if chosen != ALL_SPLITS:
        rows, keys = RowSpool(), KeyTable()
        for row in source.inputs.rows:
            split = splits.of(row[0])
            if split == chosen:
                keys.add(row[0], len(rows))
                rows.append(row)
            else:
                left_out[split] += 1
        source = replace(source, inputs=SourceInputs(rows, source.inputs.number), repeated=keys.repeated())
    return replace(source, notes=tuple(filter(None, (splits.note(chosen, left_out), *source.notes))))


def _numbers(labels: list[Label], class_names: list[str] | None) -> tuple[list[str], dict[Label, int]]:
    """The class names, and the class number of each of the different labels of a source."""
    class_names, numbers = number_classes(labels, class_names)
    return class_names, dict(zip(labels, numbers, strict=True))


def kind_of_source(address: str) -> tuple[str, Folder, dict[str, int]]:
    """The kind of a source, its folder, and its archives and tables in that folder with their sizes in bytes."""
    folder, (parent, name) = Folder.at(address), Folder.of_file(address)
    if not folder.is_remote and not folder.path.exists():
        raise UserError(f"{folder} does not exist: give {SUPPORTED_SOURCES}")
    if parent.has(name):
        return _kind_inside(_kind_of_file(name, folder), parent, name), parent, {name: parent.size(name)}
    if folder.has("dataset_dict.json"):
        splits = sorted({name.split("/")[0] for name, _ in _visible_files(folder) if "/" in name})
        raise UserError(
            f"{folder} contains the splits {', '.join(splits)}: give one of them, such as {folder}/{splits[0]}"
        )
    state = folder.read_json("state.json") if folder.has("state.json") else {}
    if isinstance(state, dict) and "_data_files" in state:  # saved by `datasets` of Hugging Face
        try:
            names = [str(entry["filename"]) for entry in state["_data_files"]]
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{folder}/state.json has a damaged list of files ({error}): save the dataset again"
            ) from None
        files = [inner_name(name, f"{folder}/state.json") for name in names]
        missing = [name for name in files if not folder.has(name)]
        if missing:
            raise UserError(f"{folder}/{missing[0]} is missing from a saved Hugging Face dataset: save it again")
        return "table", folder, dict.fromkeys(files, -1)
    archives, others = dict[str, int](), dict[str, int]()
    for name, size in _visible_files(folder):
        if is_image(name):
            return "files", folder, {}
        if name.lower().endswith(ARCHIVE_ENDINGS) and not name.lower().endswith(LMDB_LOCKS):
            archives[name] = size
        elif CIFAR_FILE.fullmatch(name.rpartition("/")[2]):
            others[name] = size
    archives = dict(sorted(archives.items()))
    for kind in ("tar", "table", "idx", "lmdb"):  # tables next to shards describe the shards
        chosen = {name: size for name, size in archives.items() if name.lower().endswith(FILE_ENDINGS[kind])}
        if chosen:
            return _kind_inside(kind, folder, *chosen), folder, chosen
    return ("cifar", folder, others) if cifar_batches(others) else ("files", folder, archives)


def _kind_inside(kind: str, folder: Folder, *names: str) -> str:
    """The kind of archives, after a look into a single one: CIFAR comes in a tar, and LSUN's LMDBs in a zip."""
    if len(names) == 1 and kind == "tar" and is_cifar_archive(folder, names[0]):
        return "cifar"
    if len(names) == 1 and kind == "zip" and lmdb_in_zip(folder, names[0]):
        return "lmdb"
    return kind


def _visible_files(folder: Folder) -> Iterator[tuple[str, int]]:
    """Files that are not hidden, in any order."""
    files = folder.walk(follow_links=True, in_order=False)
    return ((name, size) for name, size in files if not is_hidden(name))


def _kind_of_file(name: str, file: Folder) -> str:
    for kind, endings in FILE_ENDINGS.items():
        if name.lower().endswith(endings):
            return kind
    if name.lower().endswith(".npy"):
        raise UserError(f"{file} is a bare array: write it as .npz with numpy.savez(PATH, images=array, labels=labels)")
    if is_image(name):
        raise UserError(f"{file} is a single image: give the folder that it is in")
    if name.lower().endswith(TABLE_ENDINGS):
        raise UserError(f"{file} is a table of labels: give the folder of the images, and this file with --labels")
    raise UserError(f"{file} is a file of an unknown format: give {SUPPORTED_SOURCES}")
