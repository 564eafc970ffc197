"""Listing: the inputs of each format of source, in its order, with the labels that the source has."""

import itertools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from patchloom.errors import UserError
from patchloom.platform.dataset.image_names import is_hidden, is_image, name_ending
from patchloom.platform.dataset.label_files import LABEL_COLUMNS, ROOT_TABLES, find_labels, opened_here
from patchloom.platform.dataset.labels import Labels, first_of, label_of
from patchloom.platform.dataset.listed import ListedInput, Listing, readable_input
from patchloom.platform.dataset.raw_listing import list_cifar, list_idx
from patchloom.platform.dataset.readers import (
    ARCHIVE_MEMBERS,
    LMDB_NAME,
    NpzArray,
    npz_array,
    npz_images,
    open_lmdb,
    zip_images,
)
from patchloom.platform.dataset.tables import open_table
from patchloom.platform.dataset.tar_listing import list_tars
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool, temporary_file
from patchloom.platform.files.storage import parse_json_object

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "path", "file_name")
KEY_COLUMNS = ("key", "__key__")


def _images(
    listing: Listing, listed: Iterable[ListedInput], opened: Callable[[ListedInput], BinaryIO]
) -> Iterator[ListedInput]:
    """The images among named files. Completes the listing with a file of labels in the root, and other files."""
    tables: dict[str, ListedInput] = {}
    for one in listed:
        if is_hidden(one.key):
            continue
        if is_image(one.key):
            yield readable_input(one)
        elif one.key in ROOT_TABLES:
            tables[one.key] = one
        else:
            listing.others[name_ending(one.key)] += 1
    listing.labels = find_labels(tables, lambda name: opened(tables[name]))


def list_files(folder: Folder, names: dict[str, int]) -> Listing:
    """The files of a folder."""
    listing = Listing(has_folders=True)
    listed = (ListedInput(name, [name], size) for name, size in folder.walk(follow_links=True))
    listing.inputs = _images(listing, listed, lambda one: opened_here(folder, one.key))
    return listing


def list_zip(folder: Folder, names: dict[str, int]) -> Listing:
    """The members of a zip archive."""
    (name,) = names
    listing = Listing(has_folders=True)

    def opened(one: ListedInput) -> BinaryIO:
        try:
            return temporary_file(ARCHIVE_MEMBERS["zip"](folder, *one.place))
        except (ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{folder}/{name}: {one.key} cannot be read ({error}): write the archive again") from None

    listed = (ListedInput(key, place, size) for key, place, size in zip_images(folder, name))
    listing.inputs = _images(listing, listed, opened)
    return listing


def list_tables(folder: Folder, names: dict[str, int]) -> Listing:
    """The rows of Parquet and Arrow files."""
    listing = Listing()
    listing.inputs = _table_rows(listing, folder, list(names))
    return listing


def _table_rows(listing: Listing, folder: Folder, names: list[str]) -> Iterator[ListedInput]:
    """The rows of tables. Several tables in a store are read at the same time."""
    width = _digits(sum(folder.at_once(lambda name: open_table(folder, name).rows, names)))
    class_names: list[str] | None = None
    numbers = itertools.count()
    for name, found in zip(names, folder.at_once(lambda name: _read_table(folder, name), names), strict=True):
        class_names = class_names or found.class_names
        for row, (text, known) in enumerate(found.rows):
            number = next(numbers)
            yield ListedInput(text or f"{number:0{width}d}", [name, found.column, row], -1, known)
    listing.labels = Labels(str(folder), class_names=class_names) if class_names else None


@dataclass(frozen=True)
class _TableContent:
    """The column of images of a table, the names of its classes if it has them, and the key and label of each row."""

    column: str
    class_names: list[str] | None
    rows: Iterable[tuple[Any, ...]]


def _read_table(folder: Folder, name: str) -> _TableContent:
    table = open_table(folder, name)
    column = _image_column(folder, name, table.schema)
    label, key = first_of(LABEL_COLUMNS, table.schema.names), first_of(KEY_COLUMNS, table.schema.names)
    rows = (
        ("" if given is None else str(given), label_of(value, f"row {row} of {name}") if label else None)
        for row, (value, given) in enumerate(table.values([label, key]))
    )
    class_names = _class_names(folder, table.schema, label)
    return _TableContent(column, class_names, RowSpool.of(rows) if folder.is_remote else rows)


def _digits(rows: int) -> int:
    """The width of the numbers of rows, which are the keys of rows without a key."""
    return len(str(max(rows - 1, 0)))


def _image_column(folder: Folder, name: str, schema: pa.Schema) -> str:
    features = _features(folder, schema)
    declared = [column for column, feature in features.items() if feature.kind == "Image"]
    column = first_of(tuple(declared), schema.names) or first_of(IMAGE_COLUMNS, schema.names)
    if column is None:
        raise UserError(
            f"{folder}/{name} has the columns {', '.join(schema.names)} and no image column: name it `image` "
            "(encoded bytes, a path, or Hugging Face's struct of both)"
        )
    return column


@dataclass(frozen=True)
class _Feature:
    """The type of a column as `datasets` of Hugging Face stores it, and its class names."""

    kind: str
    class_names: list[str]


def _features(folder: Folder, schema: pa.Schema) -> dict[str, _Feature]:
    """The column types that `datasets` of Hugging Face stored in the schema or in `dataset_info.json`."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        if metadata:
            features = parse_json_object(metadata).get("info", {}).get("features")
        else:
            has_info = folder.has("dataset_info.json")
            features = parse_json_object(folder.read("dataset_info.json")).get("features") if has_info else None
        return {
            name: _Feature(str(feature.get("_type")), list(map(str, feature.get("names") or [])))
            for name, feature in (features or {}).items()
            if isinstance(feature, dict)
        }
    except (ValueError, AttributeError, TypeError) as error:
        where = "metadata `huggingface` of a table" if metadata else "file dataset_info.json"
        raise UserError(f"{folder}: the {where} is damaged ({error}): save the dataset again, or remove it") from None


def _class_names(folder: Folder, schema: pa.Schema, label: str | None) -> list[str] | None:
    feature = _features(folder, schema).get(label or "")
    return feature.class_names or None if feature else None


def list_npz(folder: Folder, names: dict[str, int]) -> Listing:
    """The rows of an `.npz`."""
    (name,) = names
    images = npz_images(folder, name)
    labels, class_names = (
        npz_array(folder, name, wanted) for wanted in (("labels", "label", "arr_1"), ("class_names", "classes"))
    )
    if labels is not None and labels.shape[:1] != (len(images),):
        found = int(np.prod(labels.shape))
        raise UserError(f"{folder}/{name} has {len(images)} images and {found} labels: give one label per image")
    given = [one for block in class_names.blocks() for one in block.tolist()] if class_names is not None else []
    known = [str(label_of(one, name)) for one in given]
    listing = Listing(labels=Labels(name, class_names=known) if known else None)
    listing.inputs = _array_rows(folder, name, images, labels)
    return listing


def _array_rows(folder: Folder, name: str, images: np.ndarray, labels: NpzArray | None) -> Iterator[ListedInput]:
    width = _digits(len(images))
    size_bytes = images[0].nbytes if len(images) else 0
    values = itertools.repeat(None) if labels is None else (one for block in labels.blocks() for one in block)
    for row, value in zip(range(len(images)), values, strict=False):
        if isinstance(value, np.ndarray) and value.shape == (1,):
            value = value[0]
        known = label_of(value, f"row {row} of {folder}/{name}")
        yield ListedInput(f"{row:0{width}d}", [name, row], size_bytes, known)


def list_lmdb(folder: Folder, names: dict[str, int]) -> Listing:
    """The values of LMDBs. The name of a database is no class, unless there are several of them."""
    listing = Listing(has_folders=len(names) > 1)
    listing.inputs = (
        one for name in names for one in _lmdb_values(folder, name, _lmdb_folder(name) if len(names) > 1 else "")
    )
    return listing


def _lmdb_folder(name: str) -> str:
    """`bedroom/train/` for `bedroom_train_lmdb/data.mdb`, so that the category is the first folder of the keys."""
    place = name.removesuffix(f"/{LMDB_NAME}").removesuffix(".lmdb").removesuffix(".mdb")
    return re.sub(r"_(train|val|test)_lmdb$", r"/\1", place) + "/"


def _lmdb_values(folder: Folder, name: str, prefix: str) -> Iterator[ListedInput]:
    for key, size in open_lmdb(folder, name).entries():
        text = key.decode(errors="replace")
        shown = text if text.isprintable() and "\ufffd" not in text else key.hex()
        yield ListedInput(prefix + shown, [name, key.hex()], size)


LISTERS: dict[str, Callable[[Folder, dict[str, int]], Listing]] = {
    "files": list_files,
    "zip": list_zip,
    "tar": list_tars,
    "table": list_tables,
    "npz": list_npz,
    "idx": list_idx,
    "cifar": list_cifar,
    "lmdb": list_lmdb,
}
