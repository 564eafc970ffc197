"""Tar listing: the images and labels in tar archives, WebDataset shards, and archives of one tar per class."""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, BinaryIO, cast

from patchloom.errors import UserError
from patchloom.platform.dataset.image_names import is_hidden, is_image, name_ending
from patchloom.platform.dataset.label_files import LABEL_COLUMNS, ROOT_TABLES, find_labels
from patchloom.platform.dataset.labels import Label, Labels, first_of, label_of
from patchloom.platform.dataset.listed import ListedInput, Listing, readable_input
from patchloom.platform.dataset.readers import ARCHIVE_MEMBERS, Place, plain_file
from patchloom.platform.dataset.tar_headers import tar_headers
from patchloom.platform.files.bounds import reading_damaged
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.spool import RowSpool, sorted_rows, temporary_file
from patchloom.platform.files.storage import parse_json

TAR_ENDING = ".tar"
SIDECAR_ENDINGS = (".cls", ".json")
LINK_ERROR = "is a symbolic link in an archive: pack the image itself"
MOST_SIDECAR_BYTES, MOST_ROOT_LABEL_BYTES = 1 << 26, 1 << 20  # of a larger dataset.json, only rows are in memory
LOCAL_PIECE_BYTES, REMOTE_PIECE_BYTES = 1 << 16, 1 << 20  # of a tar file, where only the headers are read


def list_tars(folder: Folder, names: dict[str, int], image_member: str | None = None) -> Listing:
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
            place: Place = [tar, one.first_byte, one.size_bytes]
            error = LINK_ERROR if one.is_link else None
            found.images.append(readable_input(ListedInput(name, place, one.size_bytes, error=error)).row())
            continue
        if name not in ROOT_TABLES:
            found.others[name_ending(name)] += 1
        elif not one.is_link:
            found.tables[name] = [tar, one.first_byte, one.size_bytes]
        is_label = name not in ROOT_TABLES or one.size_bytes < MOST_ROOT_LABEL_BYTES
        if one.content is not None and is_label:
            found.sidecars.append((sample_key(name), *_sidecar_label(name, one.content)))
    return found


_Extent = tuple[int, int]  # the offset of the content of a member, and its size


@dataclass(frozen=True, slots=True)
class _TarMember:
    """A file in a tar, with its content if it is a small one with the label of an image."""

    name: str
    first_byte: int
    size_bytes: int
    content: bytes | None = None
    is_link: bool = False

    @property
    def is_tar(self) -> bool:
        """Whether it is a tar itself, as the members of ImageNet's are, one per class."""
        return self.name.lower().endswith(TAR_ENDING) and not self.is_link and not is_hidden(self.name)


def _tar_members(folder: Folder, tar: str) -> Iterator[_TarMember]:
    """The files of a tar archive, and those of the tars in it, which are in a folder with the name of their tar."""
    address = f"{folder}/{tar}"
    with buffered_tar(folder, tar) as file:
        for one in _members_in(file, address):
            if not one.is_tar:
                yield one
                continue
            part = cast(BinaryIO, _TarPart(file, one.first_byte, one.size_bytes))
            for inner in _members_in(part, f"{address}: {one.name}"):
                name, first = f"{one.name[: -len(TAR_ENDING)]}/{inner.name}", one.first_byte + inner.first_byte
                yield replace(inner, name=name, first_byte=first)


def _members_in(file: BinaryIO, address: str) -> Iterator[_TarMember]:
    """The files of an open tar. Hard links are their target; symbolic links are not followed."""
    with reading_damaged(address, "a complete tar file"):
        targets: dict[str, _Extent] | None = None
        for member in tar_headers(file):
            name, first, size = member.name.removeprefix("./"), member.first_byte, member.size_bytes
            if member.is_hard_link:
                if targets is None:
                    targets = _link_targets(file)
                first, size = targets[member.target.rstrip("/")]
            elif member.kind == tarfile.SYMTYPE:
                yield _TarMember(name, 0, 0, is_link=True)
                continue
            elif member.kind != tarfile.REGTYPE:
                continue
            content = None
            if name_ending(name) in SIDECAR_ENDINGS and size < MOST_SIDECAR_BYTES:
                file.seek(first)
                content = file.read(size)
            yield _TarMember(name, first, size, content)


class _TarPart(io.RawIOBase):
    """A member of a tar as a file for reading, which is another place in the file of the tar."""

    def __init__(self, file: BinaryIO, first_byte: int, size_bytes: int) -> None:
        self._file, self._first, self._size, self._position = file, first_byte, size_bytes, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer at the end of the member."""
        left = max(0, self._size - self._position)
        self._file.seek(self._first + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content


def buffered_tar(folder: Folder, tar: str) -> io.BufferedReader:
    """A tar file that is read in pieces; on a store, each of them is a request."""
    opened: Any = plain_file(folder, tar)
    return io.BufferedReader(opened, REMOTE_PIECE_BYTES if folder.is_remote else LOCAL_PIECE_BYTES)


def _link_targets(file: BinaryIO) -> dict[str, _Extent]:
    """Where the content is that hard links in a tar archive mean, by the name in the link: the last one of each name.

    A link may be to an earlier link. Each is followed once.
    """
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
        if name_ending(name) == ".cls":
            return content.decode().strip() or None, None
        value = parse_json(content)
        column = first_of(LABEL_COLUMNS, value) if isinstance(value, dict) else None
        return label_of(value[column], name) if column else None, None
    except UserError as error:
        return None, str(error)
    except ValueError:
        return None, None
