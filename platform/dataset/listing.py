"""Listing: the inputs of each format of source, in its order, with the labels that the source has."""

import io
import itertools
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from patchloom.errors import UserError
from patchloom.platform.dataset.label_files import LABEL_COLUMNS, TABLE_NAMES, find_labels, opened_here
from patchloom.platform.dataset.labels import Label, Labels, first_of, label_of
from patchloom.platform.dataset.readers import (
    ARCHIVE_MEMBERS,
    NpzArray,
    Place,
    npz_array,
    npz_images,
    tar_file,
    zip_images,
)
from patchloom.platform.dataset.tables import open_table
from patchloom.platform.dataset.tar_headers import tar_headers
from patchloom.platform.files.bounds import reading_damaged
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool, sorted_rows, temporary_file
from patchloom.platform.files.storage import parse_json, parse_json_object

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "path", "file_name")
KEY_COLUMNS = ("key", "__key__")
HIDDEN_NAMES = ("__macosx", "thumbs.db", "desktop.ini")
SIDECAR_ENDINGS = (".cls", ".json")
LINK_ERROR = "is a symbolic link in an archive: pack the image itself"
ROOT_TABLES = (*TABLE_NAMES, "dataset.json")
MOST_SIDECAR_BYTES, MOST_ROOT_LABEL_BYTES = 1 << 26, 1 << 20  # of a larger dataset.json, only rows are in memory
LOCAL_PIECE_BYTES, REMOTE_PIECE_BYTES = 1 << 16, 1 << 20  # of a tar file, where only the headers are read


@dataclass(slots=True)
class ListedInput:
    """An input with its label as the source gives it: a number, a name, or None."""

    key: str
    place: Place
    size_bytes: int
    label: Label = None
    error: str | None = None  # why it cannot be read

    def row(self) -> tuple[Any, ...]:
        """Its values, for a spool."""
        return self.key, self.place, self.size_bytes, self.label, self.error


@dataclass
class Listing:
    """What a source contains. The other fields are complete when all inputs have been taken.

    Args:
        inputs: its images, in its order, listed while they are taken.
        labels: the labels that one file of the source gives for all inputs.
        has_folders: keys are paths, whose first folder is the class.
        unmatched: number of labels next to images that are not there.
        others: number of files that are not images, by ending.
    """

    inputs: Iterator[ListedInput] = field(default_factory=lambda: iter(()))
    labels: Labels | None = None
    has_folders: bool = False
    unmatched: int = 0
    others: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Whether a path is hidden, or one of the files that operating systems leave in folders."""
    return any(part.startswith(".") or part.lower() in HIDDEN_NAMES for part in name.split("/") if part != ".")


def is_image(name: str) -> bool:
    """Whether a file name is that of an image that can be read."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _images(
    listing: Listing, listed: Iterable[ListedInput], opened: Callable[[ListedInput], BinaryIO]
) -> Iterator[ListedInput]:
    """The images among named files. Completes the listing with a file of labels in the root, and other files."""
    tables: dict[str, ListedInput] = {}
    for one in listed:
        if is_hidden(one.key):
            continue
        if is_image(one.key):
            yield _readable(one)
        elif one.key in ROOT_TABLES:
            tables[one.key] = one
        else:
            listing.others[_ending(one.key)] += 1
    listing.labels = find_labels(tables, lambda name: opened(tables[name]))


def _ending(name: str) -> str:
    base, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and base else "no ending"


def _readable(one: ListedInput) -> ListedInput:
    """The input with a key that can be written. Names that are not UTF-8 cannot be read on every machine."""
    try:
        one.key.encode()
    except UnicodeEncodeError:
        key = one.key.encode(errors="surrogateescape").decode(errors="backslashreplace")
        return ListedInput(key, [key], one.size_bytes, error="its file name is not UTF-8: rename the file")
    return one


def list_files(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
    """The files of a folder."""
    listing = Listing(has_folders=True)
    listed = (ListedInput(name, [name], size) for name, size in folder.walk(follow_links=True))
    listing.inputs = _images(listing, listed, lambda one: opened_here(folder, one.key))
    return listing


def list_zip(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
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


def list_tars(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
    """The members of tar files, in their order.

    Several tars, or a tar with `.cls` or `.json` next to images, are WebDataset shards: the key of a member ends at
    the first dot of its file name, and members with one key belong together.
    """
    listing = Listing(has_folders=len(names) == 1)
    listing.inputs = _tar_inputs(listing, folder, list(names), image_member)
    return listing


def _tar_inputs(listing: Listing, folder: Folder, names: list[str], image_member: str | None) -> Iterator[ListedInput]:
    """The inputs of tars. Several tars in a store are read at the same time."""
    are_shards = len(names) > 1
    for found in folder.at_once(lambda tar: _read_tar(folder, tar, f"{tar}/" if are_shards else ""), names):
        if not are_shards:
            listing.labels = _tar_labels(folder, found.tables)
        samples = _Samples(found, image_member)
        inputs = samples.inputs() if are_shards or image_member or len(found.sidecars) else iter(())
        if are_shards or image_member or samples.have_sidecars:
            if samples.problem is not None:
                raise samples.problem
            listing.unmatched += samples.unmatched
            for ending in (*SIDECAR_ENDINGS, ".txt"):  # of WebDataset: classes, metadata and captions
                del found.others[ending]
            yield from inputs
        else:
            yield from (ListedInput(*row) for row in found.images)
        listing.others += found.others


def _tar_labels(folder: Folder, tables: dict[str, Place]) -> Labels | None:
    return find_labels(tables, lambda name: temporary_file(ARCHIVE_MEMBERS["tar"](folder, *tables[name])))


@dataclass
class _TarContent:
    """What is in a tar.

    Args:
        tar: its address, for messages.
        images: rows of `ListedInput`.
        sidecars: the key of each file next to an image, its label or None, and what is wrong with the label.
        tables: where the files are that may have the labels of all images.
        others: number of files that are not images, by ending.
    """

    tar: str
    images: RowSpool = field(default_factory=RowSpool)
    sidecars: RowSpool = field(default_factory=RowSpool)
    tables: dict[str, Place] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)


def _read_tar(folder: Folder, tar: str, prefix: str) -> _TarContent:
    """Read the headers and labels of a tar. A prefix of keys means that it is one of several shards."""
    found = _TarContent(f"{folder}/{tar}")
    for one in _tar_members(folder, tar):
        name = prefix + one.name
        if is_hidden(name):
            continue
        if is_image(name):
            error = LINK_ERROR if one.is_link else None
            found.images.append(_readable(ListedInput(name, one.place, one.size_bytes, error=error)).row())
            continue
        if name not in ROOT_TABLES:
            found.others[_ending(name)] += 1
        elif not one.is_link:
            found.tables[name] = one.place
        is_label = name not in ROOT_TABLES or one.size_bytes < MOST_ROOT_LABEL_BYTES
        if one.content is not None and is_label:
            found.sidecars.append((sample_key(name), *_sidecar_label(name, one.content)))
    return found


_Extent = tuple[int, int]  # the offset of the content of a member, and its size


@dataclass(frozen=True, slots=True)
class _TarMember:
    name: str
    place: Place
    size_bytes: int
    content: bytes | None  # of a small file with the label of an image
    is_link: bool = False


def _tar_members(folder: Folder, tar: str) -> Iterator[_TarMember]:
    """The files of a tar archive. Hard links are their target; symbolic links are not followed."""
    with _buffered_tar(folder, tar) as file, reading_damaged(f"{folder}/{tar}", "a complete tar file"):
        targets: dict[str, _Extent] | None = None
        for member in tar_headers(file):
            name, first, size = member.name.removeprefix("./"), member.first_byte, member.size_bytes
            if member.is_hard_link:
                if targets is None:
                    targets = _link_targets(folder, tar)
                first, size = targets[member.target.rstrip("/")]
            elif member.kind == tarfile.SYMTYPE:
                yield _TarMember(name, [tar, 0, 0], 0, None, is_link=True)
                continue
            elif member.kind != tarfile.REGTYPE:
                continue
            content = None
            if _ending(name) in SIDECAR_ENDINGS and size < MOST_SIDECAR_BYTES:
                file.seek(first)
                content = file.read(size)
            yield _TarMember(name, [tar, first, size], size, content)


def _buffered_tar(folder: Folder, tar: str) -> io.BufferedReader:
    """A tar file that is read in pieces; on a store, each of them is a request."""
    opened: Any = tar_file(folder, tar)
    return io.BufferedReader(opened, REMOTE_PIECE_BYTES if folder.is_remote else LOCAL_PIECE_BYTES)


def _link_targets(folder: Folder, tar: str) -> dict[str, _Extent]:
    """Where the content is that hard links in a tar archive mean, by the name in the link: the last one of each name.

    A link may be to an earlier link. Each is followed once.
    """
    with _buffered_tar(folder, tar) as file:
        wanted = {member.target.rstrip("/") for member in tar_headers(file) if member.is_hard_link}
        found: dict[str, _Extent | str] = {
            member.name: member.target.rstrip("/") if member.is_hard_link else (member.first_byte, member.size_bytes)
            for member in tar_headers(file)
            if member.name in wanted
        }
    targets: dict[str, _Extent] = {}
    for name in found:
        passed: dict[str, None] = {}
        place: _Extent | str | None = name
        while isinstance(place, str) and place not in passed:
            passed[place] = None
            place = targets.get(place, found.get(place))
        if isinstance(place, tuple):  # a link to itself, or to nothing, has no target
            targets |= dict.fromkeys(passed, place)
    return targets


def sample_key(name: str) -> str:
    """The key of a WebDataset member: its path up to the first dot of the file name."""
    parent, slash, base = name.rpartition("/")
    return parent + slash + base.partition(".")[0]


class _Samples:
    """The samples of a WebDataset tar: images and labels whose members have the same key, also far from one another.

    Args:
        content: what is in the tar.
        image_member: the ending of the members that are the images; None if each key has one image.
    """

    def __init__(self, content: _TarContent, image_member: str | None) -> None:
        self.tar, self.images, self.sidecars = content.tar, content.images, content.sidecars
        self.wanted = f".{image_member.lower().removeprefix('.')}" if image_member else None
        self.have_sidecars = False
        self.unmatched = 0  # labels without an image
        self.problem: UserError | None = None
        self._position = -1  # of the image with the problem

    def inputs(self) -> Iterator[ListedInput]:
        """One input per key, or the images of a key if they have one name, in the order of the tar."""
        members = itertools.chain(
            ((sample_key(row[0]), True, position, row) for position, row in enumerate(self.images)),
            ((row[0], False, position, row[1:]) for position, row in enumerate(self.sidecars)),
        )
        groups = itertools.groupby(sorted_rows(members), key=itemgetter(0))
        chosen = sorted_rows(entry for key, group in groups for entry in self._chosen(key, list(group)))
        return (ListedInput(*row) for _, row in chosen)

    def _chosen(self, key: str, group: list[tuple[Any, ...]]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The inputs of one key, each with its position in the tar."""
        images = [(position, ListedInput(*row)) for _, is_image_row, position, row in group if is_image_row]
        sidecars = [(position, *row) for _, is_image_row, position, row in group if not is_image_row]
        label = next((label for _, label, _ in reversed(sidecars) if label is not None), None)
        for position, problem in ((position, problem) for position, _, problem in sidecars if problem):
            self._note(len(self.images) + position, UserError(problem))
        if not images:
            self.unmatched += label is not None
            return
        self.have_sidecars = self.have_sidecars or bool(sidecars)
        first = images[0][0]
        endings = sorted({one.key[len(key) + 1 :] for _, one in images})
        if self.wanted:
            images = [(first, _member_of(key, [one for _, one in images], self.wanted))]
        elif len(endings) > 1:
            self._note(first, UserError(
                f"{self.tar} has several images with the key {key}, {' and '.join(endings[:3])}: "
                f"choose one with --image-member, such as --image-member {endings[0]}"
            ))  # fmt: skip
        for position, one in images:
            one.label = label
            yield position, one.row()

    def _note(self, position: int, problem: UserError) -> None:
        """Keep the problem with the smallest position: of images, then of their labels."""
        if self.problem is None or position < self._position:
            self.problem, self._position = problem, position


def _member_of(key: str, group: list[ListedInput], wanted: str) -> ListedInput:
    found = next((one for one in group if one.key[len(key) :].lower() == wanted), None)
    return found or ListedInput(key, group[0].place, 0, error=f"has no member that ends in {wanted}")


def _sidecar_label(name: str, content: bytes) -> tuple[Label, str | None]:
    """The label of a WebDataset image, and what is wrong with it.

    It is the text of its `.cls` file, or the label in its `.json` file.
    """
    try:
        if _ending(name) == ".cls":
            return content.decode().strip() or None, None
        value = parse_json(content)
        column = first_of(LABEL_COLUMNS, value) if isinstance(value, dict) else None
        return label_of(value[column], name) if column else None, None
    except UserError as error:
        return None, str(error)
    except ValueError:
        return None, None


def list_tables(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
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


def list_npz(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
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


LISTERS: dict[str, Callable[[Folder, dict[str, int], str | None], Listing]] = {
    "files": list_files,
    "zip": list_zip,
    "tar": list_tars,
    "table": list_tables,
    "npz": list_npz,
}
