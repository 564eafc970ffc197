"""Sources of images: a folder, zip, tar, WebDataset shards, Parquet or Arrow tables, a Hugging Face dataset, `.npz`.

`open_source` lists the inputs of a source in its order: the key, class and place of each. `SourceReader` reads an
input by its place, in any process. A new format needs an entry in `FILE_ENDINGS` and `LISTERS` here, and a
method in `SourceReader`.
"""

import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from patchloom.errors import UserError
from patchloom.platform.dataset.labels import LABEL_COLUMNS, Labels, find_labels, first_of, number_classes, read_labels
from patchloom.platform.dataset.readers import Place, npz_array, npz_images, open_table, tar_file, zip_file, zip_place
from patchloom.platform.files.folder import Folder

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FILE_ENDINGS = {
    "zip": (".zip",),
    "npz": (".npz",),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "table": (".parquet", ".arrow", ".feather"),
}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "path", "file_name")
KEY_COLUMNS = ("key", "__key__")
SUPPORTED_SOURCES = "a folder of images, .zip, .tar, .tar.gz, .parquet, .arrow, .npz, a saved Hugging Face dataset"


@dataclass(frozen=True)
class SourceInput:
    """One input: its key, class (-1: none), place in the source, and size in bytes (-1: unknown)."""

    key: str
    label: int
    place: Place
    size_bytes: int


@dataclass(frozen=True)
class Source:
    """A listed source: its kind and address, its classes, and its inputs in order."""

    kind: str
    address: str
    class_names: list[str]
    inputs: list[SourceInput]
    unmatched_labels: int = 0  # labels whose key has no input


@dataclass
class _Listed:
    """An input with its label as the source gives it: a number, a name, or None."""

    key: str
    place: Place
    size_bytes: int
    label: int | str | None


def open_source(address: str, labels: str | None = None) -> Source:
    """List the inputs of a source.

    Args:
        address: a local path or remote address.
        labels: a separate file of keys and labels.

    Raises:
        UserError: the source does not exist, is damaged or contains no images.
    """
    kind, folder, names = _kind_of(address)
    found, listed_labels = LISTERS[kind](folder, names)
    if not found:
        endings = " ".join(sorted(IMAGE_EXTENSIONS))
        archives = [name for name in names if name.lower().endswith(sum(FILE_ENDINGS.values(), ()))]
        hint = f"; did you mean {folder}/{archives[0]}?" if archives else ""
        raise UserError(f"{folder} contains no images: no file, also in sub-folders, ends in {endings}{hint}")
    by_folder = kind in ("files", "zip") or (kind == "tar" and len(names) == 1)  # rows have no folders
    class_names, inputs, unmatched = _labelled(found, read_labels(labels) if labels else listed_labels, by_folder)
    return Source(kind, folder.address, class_names, inputs, unmatched)


def _labelled(found: list[_Listed], given: Labels | None, by_folder: bool) -> tuple[list[str], list[SourceInput], int]:
    """The class names, the inputs with their class as a number, and the number of labels without an input."""
    if given is None and all(one.label is None for one in found):
        raw: list[int | str | None] = [one.key.split("/")[0] if by_folder and "/" in one.key else None for one in found]
        names = None
    elif given is None:
        raw, names = [one.label for one in found], None
    else:
        raw = [given.of.get(one.key, one.label) for one in found]
        names = given.class_names
    class_names, number = number_classes(raw, names)
    inputs = [
        SourceInput(one.key, number(label), one.place, one.size_bytes) for one, label in zip(found, raw, strict=True)
    ]
    unmatched = len(given.of.keys() - {one.key for one in found}) if given else 0
    return class_names, inputs, unmatched


def _kind_of(address: str) -> tuple[str, Folder, dict[str, int]]:
    """The kind of a source, its folder, and its files in that folder with their sizes in bytes."""
    folder, (parent, name) = Folder.at(address), Folder.of_file(address)
    if not folder.is_remote and not folder.path.exists():
        raise UserError(f"{folder} does not exist: give {SUPPORTED_SOURCES}")
    if parent.has(name):
        for kind, endings in FILE_ENDINGS.items():
            if name.lower().endswith(endings):
                return kind, parent, {name: parent.size(name)}
        raise UserError(f"{folder} is a file of an unknown format: give {SUPPORTED_SOURCES}")
    names = folder.files()
    if "dataset_dict.json" in names:
        splits = sorted({name.split("/")[0] for name in names if "/" in name})
        raise UserError(
            f"{folder} contains the splits {', '.join(splits)}: give one of them, such as {folder}/{splits[0]}"
        )
    state = folder.read_json("state.json") if "state.json" in names else {}
    if isinstance(state, dict) and "_data_files" in state:  # saved by `datasets` of Hugging Face
        files = [entry["filename"] for entry in state["_data_files"]]
        missing = [name for name in files if name not in names]
        if missing:
            raise UserError(f"{folder}/{missing[0]} is missing from a saved Hugging Face dataset: save it again")
        return "table", folder, {name: names[name] for name in files}
    if not any(_is_image(name) for name in names):
        for kind in ("tar", "table"):  # tables next to shards describe the shards
            chosen = {name: size for name, size in names.items() if name.lower().endswith(FILE_ENDINGS[kind])}
            if chosen:
                return kind, folder, chosen
    return "files", folder, names


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _list_files(folder: Folder, names: dict[str, int]) -> tuple[list[_Listed], Labels | None]:
    found = [_Listed(name, [name], size, None) for name, size in names.items() if _is_image(name)]
    return found, find_labels(names, folder.read)


def _list_zip(folder: Folder, names: dict[str, int]) -> tuple[list[_Listed], Labels | None]:
    (name,) = names
    archive = zip_file(folder, name)
    found, others = list[_Listed](), dict[str, zipfile.ZipInfo]()
    for member in archive.infolist():
        if _is_image(member.filename):
            found.append(_Listed(member.filename, zip_place(name, member), member.file_size, None))
        else:
            others[member.filename] = member
    return found, find_labels(others, lambda text: archive.read(others[text]))


def _list_tars(folder: Folder, names: dict[str, int]) -> tuple[list[_Listed], Labels | None]:
    """Images in the order of the archive. `a.jpg`, `a.cls` and `a.json` belong together (WebDataset)."""
    found: list[_Listed] = []
    texts: dict[str, bytes] = {}
    for name in names:
        prefix = "" if len(names) == 1 else f"{name}/"
        stems: dict[str, int | str] = {}
        images: list[_Listed] = []
        with tar_file(folder, name) as file:
            try:
                archive = tarfile.TarFile(fileobj=file)
                for member in archive:
                    if member.islnk():  # a hard link to an earlier member
                        target = archive.getmember(member.linkname)
                        member.offset_data, member.size = target.offset_data, target.size
                    elif not member.isfile():
                        continue
                    stem, _, ending = member.name.rpartition(".")
                    place: Place = [name, member.offset_data, member.size]
                    if _is_image(member.name):
                        images.append(_Listed(prefix + member.name.removeprefix("./"), place, member.size, None))
                    elif ending in ("cls", "json", "csv", "jsonl") and member.size < 1 << 26:
                        content = _member_content(file, member)
                        texts[member.name.removeprefix("./")] = content
                        label = _sidecar_label(ending, content)
                        if label is not None:
                            stems[prefix + stem.removeprefix("./")] = label
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile ends at a damaged header
                    raise tarfile.ReadError(f"no header at byte {archive.offset}")
            except (tarfile.TarError, EOFError, OSError, KeyError) as error:
                raise UserError(f"{folder}/{name} is not a complete tar file ({error}): download it again") from None
        for one in images:
            one.label = stems.get(one.key.rpartition(".")[0])
        found += images
    return found, find_labels(texts, texts.__getitem__) if len(names) == 1 else None


def _member_content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    position = file.tell()
    file.seek(member.offset_data)
    content = file.read(member.size)
    file.seek(position)
    return content


def _sidecar_label(ending: str, content: bytes) -> int | str | None:
    """The label of a WebDataset image: the text of its `.cls` file, or the label in its `.json` file."""
    try:
        if ending == "cls":
            text = content.decode().strip()
            return int(text) if text.removeprefix("-").isdigit() else text or None
        if ending == "json":
            value = json.loads(content)
            column = first_of(LABEL_COLUMNS, value) if isinstance(value, dict) else None
            return value[column] if column and isinstance(value[column], (int, str)) else None
    except (ValueError, UnicodeDecodeError):
        return None
    return None


def _list_tables(folder: Folder, names: dict[str, int]) -> tuple[list[_Listed], Labels | None]:
    found: list[_Listed] = []
    class_names: list[str] | None = None
    for name in names:
        table = open_table(folder, name)
        column = _image_column(folder, name, table.schema)
        label, key = first_of(LABEL_COLUMNS, table.schema.names), first_of(KEY_COLUMNS, table.schema.names)
        class_names = class_names or _class_names(folder, table.schema, label)
        labels, keys = (table.column(one) if one else None for one in (label, key))
        for row in range(table.rows):
            known = labels[row] if labels is not None else None
            text = str(keys[row]) if keys is not None and keys[row] is not None else ""
            found.append(_Listed(text, [name, column, row], -1, known))
    width = len(str(max(len(found) - 1, 0)))
    for row, one in enumerate(found):
        one.key = one.key or f"{row:0{width}d}"
    return found, Labels({}, class_names) if class_names else None


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


def _list_npz(folder: Folder, names: dict[str, int]) -> tuple[list[_Listed], Labels | None]:
    (name,) = names
    images = npz_images(folder, name)
    labels, class_names = (
        npz_array(folder, name, wanted) for wanted in (("labels", "label", "arr_1"), ("class_names", "classes"))
    )
    if labels is not None and labels.ndim == 2 and labels.shape[1] > 1:
        labels = labels.argmax(1)  # one-hot
    if labels is not None and labels.size != len(images):
        raise UserError(f"{folder}/{name} has {len(images)} images and {labels.size} labels: give one label per image")
    values = [None] * len(images) if labels is None else labels.reshape(-1).tolist()
    width = len(str(max(len(images) - 1, 0)))
    found = [_Listed(f"{row:0{width}d}", [name, row], images[0].nbytes, value) for row, value in enumerate(values)]
    return found, Labels({}, [str(one) for one in class_names.tolist()]) if class_names is not None else None


LISTERS: dict[str, Callable[[Folder, dict[str, int]], tuple[list[_Listed], Labels | None]]] = {
    "files": _list_files,
    "zip": _list_zip,
    "tar": _list_tars,
    "table": _list_tables,
    "npz": _list_npz,
}


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
