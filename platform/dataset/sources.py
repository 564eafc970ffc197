"""Sources of images: a folder, zip, tar, WebDataset shards, Parquet or Arrow tables, a Hugging Face dataset, `.npz`.

`open_source` lists the inputs of a source in its order: the key, class and place of each. `SourceReader` reads an
input by its place, in any process. A new format needs an entry in `FILE_ENDINGS` here, one in `LISTERS` in
`listing.py`, and a method in `SourceReader`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from patchloom.errors import UserError
from patchloom.platform.dataset.label_files import TABLE_ENDINGS, read_labels
from patchloom.platform.dataset.labels import Label, Labels, number_classes
from patchloom.platform.dataset.listing import IMAGE_EXTENSIONS, LISTERS, ListedInput, Listing, is_hidden, is_image
from patchloom.platform.dataset.readers import Place
from patchloom.platform.files.folder import Folder, inner_name

STORAGE_FOLDER = re.compile(r"[0-9]{5}")  # of EDM's tools: not a class, if dataset.json has no labels
FILE_ENDINGS = {
    "zip": (".zip",),
    "npz": (".npz",),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "table": (".parquet", ".arrow", ".feather"),
}
SUPPORTED_SOURCES = "a folder of images, .zip, .tar, .tar.gz, .parquet, .arrow, .npz, a saved Hugging Face dataset"


@dataclass(frozen=True)
class SourceInput:
    """One input: its key, class (-1: none), place in the source, size in bytes (-1: unknown), and a known error."""

    key: str
    label: int
    place: Place
    size_bytes: int
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """A listed source.

    Args:
        kind: its format, a key of `LISTERS`.
        address: the folder that the places of its inputs are in.
        name: the file or folder that the user gave, for messages.
        class_names: its classes.
        inputs: its inputs, in order.
        unmatched_labels: number of labels whose key has no input.
        others: number of files that are not images, by ending.
    """

    kind: str
    address: str
    name: str
    class_names: list[str]
    inputs: list[SourceInput]
    unmatched_labels: int = 0
    others: Counter[str] = field(default_factory=Counter)


def open_source(address: str, labels: str | None = None, image_member: str | None = None) -> Source:
    """List the inputs of a source.

    Args:
        address: a local path or remote address.
        labels: a separate file of keys and labels.
        image_member: WebDataset: the ending of the members that are the images, such as "input.png".

    Raises:
        UserError: the source does not exist, is damaged or contains no images.
    """
    kind, folder, names = _kind_of(address)
    listing = LISTERS[kind](folder, names, image_member)
    name = str(Folder.at(address))
    if not listing.inputs or (image_member and all(one.error for one in listing.inputs)):
        raise UserError(_no_images(name, kind, listing, names, image_member))
    class_names, inputs, unmatched = _labelled(listing, read_labels(labels) if labels else listing.labels)
    return Source(kind, folder.address, name, class_names, inputs, unmatched + listing.unmatched, listing.others)


def _no_images(name: str, kind: str, listing: Listing, names: dict[str, int], image_member: str | None) -> str:
    """Why a source has no inputs, in one line."""
    if kind in ("table", "npz"):
        return f"{name} has no rows: give {SUPPORTED_SOURCES}"
    if image_member:
        return f"{name} has no member that ends in .{image_member.removeprefix('.')}: check --image-member"
    endings = " ".join(sorted(IMAGE_EXTENSIONS))
    archives = [one for one in names if one.lower().endswith(sum(FILE_ENDINGS.values(), ()))] if kind == "files" else []
    hint = f"; did you mean {name}/{archives[0]}?" if archives else ""
    found = f" (found {count_endings(listing.others)})" if listing.others else ""
    return f"{name} contains no images: no file, also in sub-folders, ends in {endings}{found}{hint}"


def count_endings(others: Counter[str], most: int = 6) -> str:
    """`.heic 10, .txt 4`: numbers of files by their ending, the most first."""
    shown = [f"{ending} {count:,}" for ending, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def _labelled(listing: Listing, given: Labels | None) -> tuple[list[str], list[SourceInput], int]:
    """The class names, the inputs with their class as a number, and the number of labels without an input."""
    listed, used = listing.inputs, set[str]()

    def label_of_input(one: ListedInput) -> Label:
        key = given.find(one.key) if given else None
        if given is None or key is None:
            return one.label
        used.add(key)
        return given.of[key]

    if (given is None or not given.of) and all(one.label is None for one in listed):
        folders: list[Label] = [_first_folder(one.key) if listing.has_folders else None for one in listed]
        is_storage = given is not None and all(STORAGE_FOLDER.fullmatch(str(name)) for name in folders if name)
        labels: list[Label] = [None] * len(listed) if is_storage else folders
    else:
        labels = [label_of_input(one) for one in listed]
    class_names, numbers = number_classes(labels, given.class_names if given else None)
    inputs = [
        SourceInput(one.key, number, one.place, one.size_bytes, one.error)
        for one, number in zip(listed, numbers, strict=True)
    ]
    return class_names, inputs, len(given.of.keys() - used) if given else 0


def _first_folder(key: str) -> str | None:
    return key.partition("/")[0] if "/" in key else None


def _kind_of(address: str) -> tuple[str, Folder, dict[str, int]]:
    """The kind of a source, its folder, and its files in that folder with their sizes in bytes."""
    folder, (parent, name) = Folder.at(address), Folder.of_file(address)
    if not folder.is_remote and not folder.path.exists():
        raise UserError(f"{folder} does not exist: give {SUPPORTED_SOURCES}")
    if parent.has(name):
        return _kind_of_file(name, folder), parent, {name: parent.size(name)}
    names = {name: size for name, size in folder.files(follow_links=True).items() if not is_hidden(name)}
    if "dataset_dict.json" in names:
        splits = sorted({name.split("/")[0] for name in names if "/" in name})
        raise UserError(
            f"{folder} contains the splits {', '.join(splits)}: give one of them, such as {folder}/{splits[0]}"
        )
    state = folder.read_json("state.json") if "state.json" in names else {}
    if isinstance(state, dict) and "_data_files" in state:  # saved by `datasets` of Hugging Face
        files = [inner_name(entry["filename"], f"{folder}/state.json") for entry in state["_data_files"]]
        missing = [name for name in files if name not in names]
        if missing:
            raise UserError(f"{folder}/{missing[0]} is missing from a saved Hugging Face dataset: save it again")
        return "table", folder, {name: names[name] for name in files}
    if not any(is_image(name) for name in names):
        for kind in ("tar", "table"):  # tables next to shards describe the shards
            chosen = {name: size for name, size in names.items() if name.lower().endswith(FILE_ENDINGS[kind])}
            if chosen:
                return kind, folder, chosen
    return "files", folder, names


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


def duplicate_positions(keys: list[str]) -> set[int]:
    """The positions of duplicate keys, without the first of each."""
    if len(set(keys)) == len(keys):
        return set()
    seen: set[str] = set()
    duplicates = set()
    for position, key in enumerate(keys):
        if key in seen:
            duplicates.add(position)
        seen.add(key)
    return duplicates
