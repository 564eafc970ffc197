"""Listing: the inputs of each format of source, in its order, with the labels that the source has."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.dataset.label_files import LABEL_COLUMNS, TABLE_NAMES, find_labels
from patchloom.platform.dataset.labels import Label, Labels, column_of_labels, first_of, label_of
from patchloom.platform.dataset.readers import Place, npz_array, npz_images, open_table, tar_file, zip_file, zip_place
from patchloom.platform.files.folder import Folder

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "path", "file_name")
KEY_COLUMNS = ("key", "__key__")
HIDDEN_NAMES = ("__macosx", "thumbs.db", "desktop.ini")
SIDECAR_ENDINGS = (".cls", ".json")
LINK_ERROR = "is a symbolic link in an archive: pack the image itself"
TEXT_ENDINGS = (*SIDECAR_ENDINGS, ".csv", ".tsv", ".jsonl")
MOST_SIDECAR_BYTES = 1 << 26


@dataclass
class ListedInput:
    """An input with its label as the source gives it: a number, a name, or None."""

    key: str
    place: Place
    size_bytes: int
    label: Label = None
    error: str | None = None  # why it cannot be read


@dataclass
class Listing:
    """What a source contains.

    Args:
        inputs: its images, in its order.
        labels: the labels that one file of the source gives for all inputs.
        has_folders: keys are paths, whose first folder is the class.
        unmatched: number of labels next to images that are not there.
        others: number of files that are not images, by ending.
    """

    inputs: list[ListedInput]
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


def _files(listed: Iterable[ListedInput], find: Callable[[set[str]], Labels | None], by_folder: bool = True) -> Listing:
    """The listing of named files: images, one file of labels in the root, and others."""
    inputs, others = list[ListedInput](), set[str]()
    for one in listed:
        if is_hidden(one.key):
            continue
        if is_image(one.key):
            inputs.append(_readable(one))
        else:
            others.add(one.key)
    unread = Counter(_ending(name) for name in others if name not in (*TABLE_NAMES, "dataset.json"))
    return Listing(inputs, find(others), by_folder, others=unread)


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
    listed = (ListedInput(name, [name], size) for name, size in names.items())
    return _files(listed, lambda others: find_labels(others, folder.read))


def list_zip(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
    """The members of a zip archive. Archives made on Windows may separate folders with backslashes."""
    (name,) = names
    archive = zip_file(folder, name)
    members = {member.filename.replace("\\", "/"): member for member in archive.infolist()}
    listed = (
        ListedInput(member.filename.replace("\\", "/"), zip_place(name, member), member.file_size)
        for member in archive.infolist()
        if not member.is_dir()
    )
    return _files(listed, lambda others: find_labels(others, lambda text: archive.read(members[text])))


def list_tars(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
    """The members of tar files, in their order.

    Several tars, or a tar with `.cls` or `.json` next to images, are WebDataset shards: the key of a member ends at
    the first dot of its file name, and members with one key belong together.
    """
    if len(names) == 1:
        (name,) = names
        return _list_tar(folder, name, "", image_member)
    shards = [_list_tar(folder, name, f"{name}/", image_member) for name in names]
    inputs = [one for shard in shards for one in shard.inputs]
    _read_labels_as_a_column(inputs)
    others = sum((shard.others for shard in shards), Counter[str]())
    return Listing(inputs, unmatched=sum(shard.unmatched for shard in shards), others=others)


def _list_tar(folder: Folder, tar: str, prefix: str, image_member: str | None) -> Listing:
    """The listing of one tar. A prefix of keys means that it is one of several shards."""
    members = list(_tar_members(folder, tar))
    listed = [
        ListedInput(prefix + one.name, one.place, one.size_bytes, error=LINK_ERROR if one.is_link else None)
        for one in members
    ]
    texts = {prefix + one.name: one.content for one in members if one.content is not None and not is_hidden(one.name)}
    found = _files(listed, lambda others: find_labels(others & texts.keys(), texts.__getitem__), not prefix)
    sidecars = {name: content for name, content in texts.items() if _ending(name) in SIDECAR_ENDINGS}
    keys = {sample_key(one.key) for one in found.inputs}
    if prefix or image_member or any(sample_key(name) in keys for name in sidecars):
        found.inputs = _samples(found.inputs, f"{folder}/{tar}", image_member)
        found.unmatched = _add_sidecar_labels(found.inputs, sidecars)
        if not prefix:
            _read_labels_as_a_column(found.inputs)
        for ending in (*SIDECAR_ENDINGS, ".txt"):  # of WebDataset: classes, metadata and captions
            del found.others[ending]
    return found


def _read_labels_as_a_column(inputs: list[ListedInput], class_names: list[str] | None = None) -> None:
    for one, label in zip(inputs, column_of_labels((one.label for one in inputs), class_names), strict=True):
        one.label = label


@dataclass(frozen=True)
class _TarMember:
    name: str
    place: Place
    size_bytes: int
    content: bytes | None  # of a small text file
    is_link: bool = False


def _tar_members(folder: Folder, tar: str) -> Iterator[_TarMember]:
    """The files of a tar archive. Hard links are their target; symbolic links are not followed."""
    with tar_file(folder, tar) as file:
        try:
            archive = tarfile.TarFile(fileobj=file)
            for member in archive:
                if member.islnk():  # a hard link to an earlier member
                    target = archive.getmember(member.linkname)
                    member.offset_data, member.size = target.offset_data, target.size
                elif member.issym():
                    yield _TarMember(member.name.removeprefix("./"), [tar, 0, 0], 0, None, is_link=True)
                    continue
                elif not member.isfile():
                    continue
                name, content = member.name.removeprefix("./"), None
                if _ending(name) in TEXT_ENDINGS:
                    content = _member_content(file, member) if member.size < MOST_SIDECAR_BYTES else None
                yield _TarMember(name, [tar, member.offset_data, member.size], member.size, content)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile ends at a damaged header
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
        except (tarfile.TarError, EOFError, OSError, KeyError) as error:
            raise UserError(f"{folder}/{tar} is not a complete tar file ({error}): download it again") from None


def _member_content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    position = file.tell()
    file.seek(member.offset_data)
    content = file.read(member.size)
    file.seek(position)
    return content


def sample_key(name: str) -> str:
    """The key of a WebDataset member: its path up to the first dot of the file name."""
    parent, slash, base = name.rpartition("/")
    return parent + slash + base.partition(".")[0]


def _samples(inputs: list[ListedInput], tar: str, image_member: str | None) -> list[ListedInput]:
    """One input per key: its only image, or the member with the wanted ending; a key without it is skipped."""
    members: dict[str, list[ListedInput]] = {}
    for one in inputs:
        members.setdefault(sample_key(one.key), []).append(one)
    if image_member:
        wanted = f".{image_member.lower().removeprefix('.')}"
        return [_member_of(key, group, wanted) for key, group in members.items()]
    for key, group in members.items():
        endings = sorted({one.key[len(key) + 1 :] for one in group})
        if len(endings) > 1:
            raise UserError(
                f"{tar} has several images with the key {key}, {' and '.join(endings[:3])}: "
                f"choose one with --image-member, such as --image-member {endings[0]}"
            )
    return inputs


def _member_of(key: str, group: list[ListedInput], wanted: str) -> ListedInput:
    found = next((one for one in group if one.key[len(key) :].lower() == wanted), None)
    return found or ListedInput(key, group[0].place, 0, error=f"has no member that ends in {wanted}")


def _add_sidecar_labels(inputs: list[ListedInput], sidecars: dict[str, bytes]) -> int:
    """Give each input the label next to it, as it is written; returns the number of labels without an input."""
    labels: dict[str, Label] = {}
    for name, content in sidecars.items():
        label = _sidecar_label(name, content)
        if label is not None:
            labels[sample_key(name)] = label
    unused = set(labels)
    for one in inputs:
        one.label = labels.get(sample_key(one.key))
        unused.discard(sample_key(one.key))
    return len(unused)


def _sidecar_label(name: str, content: bytes) -> Label:
    """The label of a WebDataset image: the text of its `.cls` file, or the label in its `.json` file."""
    try:
        if _ending(name) == ".cls":
            return content.decode().strip() or None
        value = json.loads(content)
    except ValueError:
        return None
    column = first_of(LABEL_COLUMNS, value) if isinstance(value, dict) else None
    return label_of(value[column], name) if column else None


def list_tables(folder: Folder, names: dict[str, int], image_member: str | None) -> Listing:
    """The rows of Parquet and Arrow files."""
    found: list[ListedInput] = []
    class_names: list[str] | None = None
    for name in names:
        table = open_table(folder, name)
        column = _image_column(folder, name, table.schema)
        label, key = first_of(LABEL_COLUMNS, table.schema.names), first_of(KEY_COLUMNS, table.schema.names)
        class_names = class_names or _class_names(folder, table.schema, label)
        labels, keys = (table.column(one) if one else None for one in (label, key))
        for row in range(table.rows):
            known = label_of(labels[row], f"row {row} of {name}") if labels else None
            text = str(keys[row]) if keys and keys[row] is not None else ""
            found.append(ListedInput(text, [name, column, row], -1, known))
    _number_rows(found)
    _read_labels_as_a_column(found, class_names)
    return Listing(found, Labels({}, class_names) if class_names else None)


def _number_rows(rows: list[ListedInput]) -> None:
    """Give rows without a key their number as the key."""
    width = len(str(max(len(rows) - 1, 0)))
    for row, one in enumerate(rows):
        one.key = one.key or f"{row:0{width}d}"


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
    if metadata:
        features = json.loads(metadata).get("info", {}).get("features")
    elif folder.has("dataset_info.json"):
        features = folder.read_json("dataset_info.json").get("features")
    else:
        features = None
    return {
        name: _Feature(str(feature.get("_type")), [str(label) for label in feature.get("names") or []])
        for name, feature in (features or {}).items()
        if isinstance(feature, dict)
    }


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
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels is not None and labels.shape[:1] != (len(images),):
        raise UserError(f"{folder}/{name} has {len(images)} images and {labels.size} labels: give one label per image")
    known: Any = [None] * len(images) if labels is None else labels
    found = [
        ListedInput("", [name, row], images[0].nbytes, label_of(label, f"row {row} of {folder}/{name}"))
        for row, label in enumerate(known)
    ]
    given = [str(label_of(one, name)) for one in class_names.tolist()] if class_names is not None else None
    _number_rows(found)
    _read_labels_as_a_column(found, given)
    return Listing(found, Labels({}, given) if given else None)


LISTERS: dict[str, Callable[[Folder, dict[str, int], str | None], Listing]] = {
    "files": list_files,
    "zip": list_zip,
    "tar": list_tars,
    "table": list_tables,
    "npz": list_npz,
}
