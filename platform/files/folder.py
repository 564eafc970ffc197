"""Local and remote folders with the same methods: a path, s3://, gs://, hdfs://, and all that fsspec supports.

pyarrow is imported where it is used, because `patchloom --help` imports this module.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from patchloom.errors import UserError
from patchloom.platform.files.inside import check_links, inner_name, open_regular
from patchloom.platform.files.object_store import ObjectFolder, object_folder
from patchloom.platform.files.patience import PASSING, StoreError, patient
from patchloom.platform.files.spool import sorted_rows
from patchloom.platform.files.storage import local_path, parse_json, write_atomic
from patchloom.redaction import know_secret, redacted

COPY_BYTES = 8 << 20
REQUESTS_AT_ONCE = 16
WHOLE_BYTES = 8 << 20  # a local file up to this size is read and sent in one request

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def is_remote(text: str | os.PathLike[str]) -> bool:
    """Whether an address is not on the file system of this machine."""
    name = os.fspath(text)
    return "://" in name and not name.startswith("file://")


def _store_of(folder: "Folder") -> str:
    """The bucket or server of a remote folder, for messages; empty for a local folder."""
    return "/".join(str(folder).split("/")[:3]) if folder.is_remote else ""


_patient = patient(_store_of)


@dataclass(frozen=True)
class Folder:
    """A folder at an address. File names in it are relative, with slashes. Writes are atomic.

    Methods raise UserError with one line if a remote address cannot be reached, or if a name leaves the folder.
    """

    address: str

    @staticmethod
    def at(text: str | os.PathLike[str]) -> "Folder":
        """The folder at an address that a user gave; raises UserError if it names only a file system."""
        if not is_remote(text):
            return Folder(str(local_path(text)))
        know_secret(os.fspath(text))
        base, mark, options = os.fspath(text).partition("?")
        if not base.partition("://")[2].strip("/"):
            raise UserError(f"{base} has no bucket or folder: give an address such as s3://bucket/folder")
        return Folder(base.rstrip("/") + mark + options)

    @staticmethod
    def of_file(text: str | os.PathLike[str]) -> "tuple[Folder, str]":
        """The folder of a file, and the name of the file."""
        file = Folder.at(text)
        base, mark, options = file.address.partition("?") if file.is_remote else (file.address, "", "")
        parent, _, name = base.rpartition("/")
        if parent.endswith(":/") or name in ("", ".."):  # a whole bucket, or a folder, is in no folder
            return file, ""
        return Folder((parent or "/") + mark + options), name

    def __str__(self) -> str:
        # hides secrets: options after the question mark, and keys before the @
        return redacted(self.address.partition("?")[0]) if self.is_remote else self.address

    @property
    def is_remote(self) -> bool:
        """Whether the folder is not on this machine."""
        return is_remote(self.address)

    @property
    def store(self) -> str:
        """The bucket or server of a remote folder, for messages; empty for a local folder."""
        return _store_of(self)

    @property
    def path(self) -> Path:
        """Where it lies on this machine; ValueError for a remote one."""
        if self.is_remote:
            raise ValueError(f"{self.address} is remote and has no local path")
        return Path(self.address)

    @property
    def name(self) -> str:
        """The last part of its address."""
        return str(self).rsplit("/", 1)[-1]

    def system(self) -> tuple[Any, str]:
        """The file system of pyarrow that the folder is on, and its path there; None for a local one."""
        return _system(self.address) if self.is_remote else (None, self.address)

    def object_folder(self, purpose: Literal["files", "fence"] = "files") -> ObjectFolder | None:
        """The folder as its object store knows it; None for a local one, and for a store that has no such client."""
        if not self.is_remote or not self.address.startswith(("s3://", "gs://", "gcs://", "abfs://", "abfss://")):
            return None
        return object_folder(self.address, str(getattr(self.system()[0], "region", "") or ""), purpose)

    def folder(self, name: str) -> "Folder":
        """A sub-folder."""
        inner_name(name, self)
        base, mark, options = self.address.partition("?") if self.is_remote else (self.address, "", "")
        return Folder(f"{base}/{name}{mark}{options}")

    @_patient
    def files(self) -> dict[str, int]:
        """All files, also in sub-folders, with their sizes in bytes; empty if there is no folder."""
        if not self.is_remote:
            return dict(_local_files(self.path, "", False, frozenset()))
        import pyarrow.fs

        with self._connected() as (system, base):
            selector = pyarrow.fs.FileSelector(base, recursive=True, allow_not_found=True)
            found = system.get_file_info(selector)
        wanted = (info for info in found if info.type == pyarrow.fs.FileType.File)
        return dict(
            sorted((inner_name(info.path.removeprefix(base).removeprefix("/"), self), info.size) for info in wanted)
        )

    def walk(self, follow_links: bool = False, in_order: bool = True) -> Iterator[tuple[str, int]]:
        """What `files` returns, in ascending order of the names, one by one: there may be millions.

        Without `in_order`, the first files of a store come before it has listed all of them.
        """
        if not self.is_remote:
            yield from _local_files(self.path, "", follow_links, frozenset())
            return
        there = self.object_folder()
        if there is not None:
            listed = self._listed(there)
            with contextlib.suppress(StoreError):  # such as a public bucket, for which pyarrow needs no credentials
                first = list(itertools.islice(listed, 1))
                found = itertools.chain(first, listed)
                yield from sorted_rows(found) if in_order else found
                return
        yield from self.files().items()

    def _listed(self, there: ObjectFolder) -> Iterator[tuple[str, int]]:
        with self._connected():
            yield from there.files()

    @_patient
    def has(self, name: str) -> bool:
        """Whether there is a file with this name."""
        import pyarrow.fs

        if not name:  # what `of_file` gives for a folder
            return False
        inner_name(name, self)
        with self._connected() as (system, base):
            return bool(system.get_file_info(f"{base}/{name}").type == pyarrow.fs.FileType.File)

    @_patient
    def size(self, name: str) -> int:
        """The size of a file in bytes; -1 if unknown."""
        inner_name(name, self)
        with self._connected() as (system, base):
            size = system.get_file_info(f"{base}/{name}").size
        return -1 if size is None else int(size)

    @_patient
    def stamp(self, name: str) -> str:
        """A text that changes when the file is replaced: its size, time of modification and metadata."""
        inner_name(name, self)
        if not self.is_remote:
            status = (self.path / name).stat()
            return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"
        with self._connected() as (system, base):
            info = system.get_file_info(f"{base}/{name}")
            with system.open_input_file(f"{base}/{name}") as file:
                metadata = file.metadata()
        return f"{info.size} {info.mtime_ns} {sorted(metadata.items())}"

    @_patient
    def stamps(self, name: str) -> tuple[tuple[str, ...], ...]:
        """What changes when a file is replaced: its name, size and times. Of a sub-folder, those of its files.

        Files in folders of a sub-folder do not count. Empty if there is no file, or if the store knows no times.
        """
        inner_name(name, self)
        if not self.is_remote:
            return tuple(sorted(_local_stamps(self.path / name)))
        import pyarrow.fs

        with self._connected() as (system, base):
            found = [system.get_file_info(f"{base}/{name}")]
            if found[0].type == pyarrow.fs.FileType.Directory:
                found = system.get_file_info(pyarrow.fs.FileSelector(f"{base}/{name}", allow_not_found=True))
        files = [info for info in found if info.type == pyarrow.fs.FileType.File]
        if any(info.mtime_ns in (None, -1) for info in files):
            return ()
        return tuple(sorted((info.base_name, str(info.size), str(info.mtime_ns)) for info in files))

    @_patient
    def open(self, name: str) -> BinaryIO:
        """A regular file for random reading; raises OSError if it cannot be opened."""
        inner_name(name, self)
        if not self.is_remote:
            return os.fdopen(open_regular(self.path / name), "rb")
        with self._connected() as (system, base):
            opened: BinaryIO = system.open_input_file(f"{base}/{name}")
        return opened

    @_patient
    def read(self, name: str, most_bytes: int | None = None) -> bytes:
        """The content of a file; raises OSError if it cannot be read, ValueError if it has more than some bytes."""
        with self.open(name) as file, self._reading():
            if most_bytes is not None:
                size = file.seek(0, io.SEEK_END)
                if size > most_bytes:
                    raise ValueError(f"has {size:,} bytes, and at most {most_bytes:,} are read")
                file.seek(0)
            return file.read()

    @_patient
    def read_piece(self, name: str, first: int, size_bytes: int) -> bytes:
        """Some bytes of a file; raises OSError if it cannot be read."""
        inner_name(name, self)
        with self._connected():
            there = self.object_folder()
            if there is not None and there.can_name(name):
                return there.read_piece(name, first, size_bytes)
        with self.open(name) as file:
            return self.read_from(file, first, size_bytes)

    @_patient
    def read_from(self, file: BinaryIO, first: int, size_bytes: int) -> bytes:
        """Some bytes of a file that `open` returned, from a store with one request; raises OSError."""
        with self._reading():
            file.seek(first)
            return file.read(size_bytes)

    def read_json(self, name: str) -> Any:
        """The value of a JSON file; raises UserError if it is not valid JSON."""
        try:
            return parse_json(self.read(name))
        except ValueError as error:
            raise UserError(f"{self}/{name} is not valid JSON ({error}): remove it or restore it") from None

    @_patient
    def write(self, name: str, content: Any, sync: bool = True) -> None:
        """Write text, without secrets, or bytes to a file. `sync` is for local files, as in `write_atomic`."""
        inner_name(name, self)
        if self.is_remote:
            content = redacted(content).encode() if isinstance(content, str) else content
            with self._connected() as (system, base):
                there = self.object_folder()
                if there is not None and there.can_name(name):
                    there.write(name, content)
                    return
                with _output(system, f"{base}/{name}") as file:
                    file.write(content)
            return
        write_atomic(self._made(name), content, sync)

    def _made(self, name: str) -> Path:
        """The path of a local file to write, whose folder exists."""
        path = self.path / name
        check_links(self.path, path.parent, self)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, with the keys in the given order."""
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    @_patient
    def put(self, file: Path, name: str) -> None:
        """Copy a local file into the folder under a name."""
        inner_name(name, self)
        if self.is_remote:
            if file.stat().st_size <= WHOLE_BYTES:
                self.write(name, file.read_bytes())
                return
            try:
                with (
                    file.open("rb") as source,
                    self._connected() as (system, base),
                    _output(system, f"{base}/{name}") as target,
                ):
                    shutil.copyfileobj(source, target, COPY_BYTES)  # the object appears when the upload is complete
            except BaseException:
                with contextlib.suppress(OSError, UserError):
                    self.remove(name)  # closing completes the upload of a part of the file
                raise
            return
        self._put_locally(file, self._made(name))

    @staticmethod
    def _put_locally(file: Path, path: Path) -> None:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with file.open("rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @_patient
    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to a local path."""
        inner_name(name, self)  # before a folder is made for a path that the caller made of the same name
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.open(name) as source, partial.open("wb") as target, self._reading():
                shutil.copyfileobj(source, target, COPY_BYTES)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @_patient
    def fetch_hashed(self, name: str, path: Path, check: Callable[[], None]) -> tuple[int, str]:
        """Copy a file over a local one that no other process writes.

        Args:
            name: the file.
            path: the local file.
            check: called before each piece; ends the copy by an exception.

        Returns:
            The bytes that came, and their sha256.
        """
        digest, size_bytes = hashlib.sha256(), 0
        with self.open(name) as source, path.open("wb") as target, self._reading():
            while True:
                check()
                piece = source.read(COPY_BYTES)
                if not piece:
                    break
                digest.update(piece)
                size_bytes += target.write(piece)
        return size_bytes, digest.hexdigest()

    @_patient
    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        inner_name(name, self)
        if not self.is_remote:
            (self.path / name).unlink(missing_ok=True)
        elif self.has(name):
            with self._connected() as (system, base):
                system.delete_file(f"{base}/{name}")

    def remove_folder(self, name: str) -> None:
        """Remove a sub-folder with all its files."""
        inner_name(name, self)
        if not self.is_remote:
            shutil.rmtree(self.path / name, ignore_errors=True)
            return
        inner = self.folder(name)
        names = list(inner.files())
        if names and not inner._removed_at_once(names):
            list(self.at_once(inner.remove, names))

    def _removed_at_once(self, names: list[str]) -> bool:
        """Remove files with few requests. Returns False if the store cannot do that."""
        there = self.object_folder()
        if there is None or not all(map(there.can_name, names)):
            return False
        try:
            there.remove(names)
        except OSError:  # not every store that speaks the language of S3 has this request
            return False
        return True

    def at_once(self, function: Callable[[Asked], Found], items: Iterable[Asked]) -> Iterator[Found]:
        """`function` of each item, in order. On a remote folder, several calls run at the same time.

        Only a bounded number of items is taken in advance, so that there may be any number of them.
        """
        return in_threads(function, items, REQUESTS_AT_ONCE) if self.is_remote else map(function, items)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Errors of a remote file become a UserError, those of the disk, which have a number, do not."""
        try:
            yield
        except OSError as error:
            if not self.is_remote or error.errno is not None:
                raise
            raise self._refusal(error) from None

    @contextmanager
    def _connected(self) -> Iterator[tuple[Any, str]]:
        """The file system and the path of the folder on it. Errors of a remote one become a UserError."""
        import pyarrow.fs

        if not self.is_remote:
            yield pyarrow.fs.LocalFileSystem(), self.address
            return
        try:
            yield _system(self.address)
        except FileNotFoundError:
            raise
        except (OSError, pyarrow.ArrowException) as error:
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> StoreError:
        problem = " ".join(str(error).split())
        problem = problem if len(problem) <= 200 else f"{problem[:197]}..."
        is_passing = PASSING.search(str(error)) is not None
        advice = "try again when the store answers" if is_passing else "check the address and its credentials"
        return StoreError(f"{self} cannot be reached ({problem}): {advice}", is_passing)


def in_threads(function: Callable[[Asked], Found], items: Iterable[Asked], threads: int) -> Iterator[Found]:
    """`function` of each item, in order, by several threads. Only as many items are taken in advance as there are."""
    with ThreadPoolExecutor(threads, "files") as pool:
        asked: deque[Future[Found]] = deque()
        for item in items:
            asked.append(pool.submit(function, item))
            if len(asked) >= threads:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()


def _local_stamps(path: Path) -> Iterator[tuple[str, ...]]:
    """What changes when a file is replaced, of a file or of each file that is directly in a folder."""
    try:
        if not path.is_dir():
            yield _local_stamp(path.name, path.stat())
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file():
                    yield _local_stamp(entry.name, entry.stat())
    except OSError:  # it is missing, or cannot be read
        return


def _local_stamp(name: str, status: os.stat_result) -> tuple[str, ...]:
    return (name, *map(str, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)))


def _local_files(
    folder: Path, prefix: str, follow_links: bool, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    """Files below a folder in ascending order, and their sizes. `above` has the devices and inodes of folders above."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            names = sorted_rows((name,) for entry in entries for name in _names_of(entry, follow_links))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be listed ({error.strerror}): change its permissions, or move it away"
        ) from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for (name,) in names:
        if name.endswith("/"):
            yield from _local_files(folder / name, prefix + name, follow_links, above | {here})
            continue
        try:
            size = (folder / name).stat().st_size
        except OSError:  # a dangling link, or no permission
            size = -1
        yield prefix + name, size


def _names_of(entry: os.DirEntry[str], follow_links: bool) -> Iterator[str]:
    """The name of a file, or of a folder with a slash, so that both sort as the names of files in them do."""
    if entry.is_dir(follow_symlinks=follow_links):
        yield f"{entry.name}/"
    elif follow_links or not entry.is_dir():
        yield entry.name


def _output(system: Any, path: str) -> Any:
    """A file to write, without the compression that pyarrow would use for names that end in .gz."""
    if system.type_name not in ("s3", "gcs"):  # object stores have no folders
        system.create_dir(path.rpartition("/")[0], recursive=True)
    return system.open_output_stream(path, compression=None)


def _system(address: str) -> tuple[Any, str]:
    """The file system of a remote address and the path on it, which may contain any character."""
    base, mark, options = address.partition("?")
    scheme, _, place = base.partition("://")
    host, _, rest = place.partition("/")
    system, top = _store(f"{scheme}://{host}{mark}{options}")
    return system, f"{top}/{rest}".rstrip("/")


@functools.lru_cache(64)
def _store(address: str) -> tuple[Any, str]:
    """The file system of a bucket or server, of pyarrow or fsspec, and the path of its root."""
    import pyarrow.fs

    try:
        system, path = pyarrow.fs.FileSystem.from_uri(address)
    except pyarrow.ArrowInvalid as invalid:
        import fsspec

        scheme = address.split("://")[0]
        if scheme in ("s3", "gs", "gcs", "hdfs", "viewfs"):  # known to pyarrow, so its error is the right one
            raise UserError(f"{Folder(address)} is not a valid address ({invalid}): check it") from None
        try:
            inner, path = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise UserError(f"{Folder(address)}: {scheme}:// is not supported ({error})") from None
        system = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(inner))
    return system, path.rstrip("/")
