"""Parts: files of a remote folder that a node fetches one by one as it needs them, and removes to make room.

CACHE/KIND/NAME/         what all processes of the node have of one remote folder; the parts in `parts`, by number
CACHE/KIND/NAME/.parts   for each part its size and when it was last used; zeros if it is not here
CACHE/KIND/NAME/.locks   byte k is locked by the processes that need part k, byte n + k by the one that fetches it
CACHE/KIND/.room         locked by the process that takes or makes room

A part counts from before it is fetched until after it is removed, so the parts never exceed the limit of the cache.
Only copies are removed: the file at the store is the original. Locks end with their process, however it ends.
"""

import atexit
import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.files.cache import (
    CACHE,
    CACHE_GIB,
    COMPLETE,
    cache_folder,
    cache_limit_bytes,
    cached_copy,
    remove_unused,
)
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say

TABLE_FILE, LOCKS_FILE, ROOM_FILE, PARTS_FOLDER = ".parts", ".locks", ".room", "parts"
COPY_AGAIN_THERE = "copy the dataset there again, or prepare it again in an empty folder"
FETCH_ATTEMPTS = 3  # of a part whose checksum is wrong
BUSY_PAUSE_S, FULL_PAUSE_S = 0.01, 0.05
ROOM_NOTICE_AFTER_S, ROOM_WAIT_S = 10.0, 600.0  # other runs of the node let their parts go when they need them no more


class PartState(Enum):
    """What came of an attempt to have a part here: it is here, another thread or process fetches it, or no room."""

    HERE = "here"
    BUSY = "busy"
    FULL = "full"


@dataclass(frozen=True)
class PartList:
    """The parts of a remote folder.

    Args:
        sizes: (n,) int64, bytes.
        name_of: the name of a part in the folder, by its number.
        sha256_of: its checksum.
    """

    sizes: np.ndarray
    name_of: Callable[[int], str]
    sha256_of: Callable[[int], str]


class _Table:
    """The file that says which parts are here. Records of 16 bytes: size and time of the last use in ns.

    The first record has the size of the other files of the folder. A part that is being fetched counts as here.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TABLE_FILE

    def create(self, parts: int, base_bytes: int) -> None:
        """A table without parts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            file.write(np.array([base_bytes, time.time_ns()]).tobytes())
            file.truncate(16 * (parts + 1))

    def read(self) -> tuple[int, np.ndarray, np.ndarray]:
        """The size of the other files, and of all parts the sizes and times of use, which are 0 if it is not here."""
        records = np.fromfile(self.path, np.int64).reshape(-1, 2)
        return int(records[0, 0]), records[1:, 0], records[1:, 1]

    def has(self, number: int) -> bool:
        """Whether a part is here, or being fetched."""
        with self.path.open("rb") as file:
            return any(os.pread(file.fileno(), 16, 16 * (number + 1)))

    def write(self, number: int, size_bytes: int, used_ns: int) -> None:
        """Write the record of a part."""
        with contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:  # the folder may be removed
            os.pwrite(file.fileno(), np.array([size_bytes, used_ns]).tobytes(), 16 * (number + 1))

    def touch(self, numbers: np.ndarray) -> None:
        """Write the time of use of those of these parts that are here. They must be held."""
        now = np.int64(time.time_ns()).tobytes()
        with self.path.open("r+b") as file:
            for place in (16 * (numbers + 1) + 8).tolist():
                if any(os.pread(file.fileno(), 8, place)):
                    os.pwrite(file.fileno(), now, place)


class _PartLocks:
    """The locks of the parts of one folder, between processes and between the threads of this one.

    Locks of a range of bytes belong to the process, and closing any descriptor of the file ends all of them. So a
    process has one descriptor of each file, which stays open.
    """

    def __init__(self, path: Path, parts: int) -> None:
        self.parts = parts
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._mutex = threading.Lock()
        self._holds = np.zeros(parts, np.int32)  # by threads of this process

    def is_of(self, path: Path) -> bool:
        """Whether these are still the locks of this file, which may have been removed and made again."""
        with contextlib.suppress(FileNotFoundError):
            return os.fstat(self._file).st_ino == path.stat().st_ino
        return False

    def hold(self, numbers: np.ndarray) -> None:
        """Keep these parts from being removed. Each call needs a call of `let_go`."""
        with self._mutex:
            for start, count in _runs(numbers[self._holds[numbers] == 0]):
                while not self._try(fcntl.LOCK_SH, start, count):
                    time.sleep(0.001)  # a process that removes one of them has its lock for an instant
            self._holds[numbers] += 1

    def let_go(self, numbers: np.ndarray) -> None:
        """End one hold of these parts."""
        with self._mutex:
            self._holds[numbers] -= 1
            for start, count in _runs(numbers[self._holds[numbers] == 0]):
                self._try(fcntl.LOCK_UN, start, count)

    @contextlib.contextmanager
    def unneeded(self, number: int) -> Iterator[bool]:
        """Whether no process needs a part. If so, none begins to during the block."""
        with self._mutex:
            if self._holds[number] or not self._try(fcntl.LOCK_EX, number, 1):
                yield False
                return
            try:
                yield True
            finally:
                self._try(fcntl.LOCK_UN, number, 1)

    @contextlib.contextmanager
    def fetching(self, number: int) -> Iterator[bool]:
        """Whether this process may fetch a part. If so, no other one does during the block."""
        is_ours = self._try(fcntl.LOCK_EX, self.parts + number, 1)
        try:
            yield is_ours
        finally:
            if is_ours:
                self._try(fcntl.LOCK_UN, self.parts + number, 1)

    def _try(self, kind: int, start: int, count: int) -> bool:
        try:
            fcntl.lockf(self._file, kind if kind == fcntl.LOCK_UN else kind | fcntl.LOCK_NB, count, start)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True


_locks: dict[Path, _PartLocks] = {}
_locks_mutex = threading.Lock()


def _locks_of(folder: Path, parts: int) -> _PartLocks:
    path = folder / LOCKS_FILE
    with _locks_mutex:
        if path not in _locks or not _locks[path].is_of(path):
            _locks[path] = _PartLocks(path, parts)
        return _locks[path]


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """The first number and the length of each run of consecutive numbers."""
    if len(numbers):
        ordered = np.sort(numbers)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1):
            yield int(run[0]), len(run)


class CachedParts:
    """The parts of one remote folder on this node.

    Args:
        kind: folder of the cache for files of this kind, whose limit they share.
        name: name of the entry in the cache, which identifies the content.
        remote: the folder.
        parts: number of parts.
        base: returns the sizes of the other files that are needed, by name. One process calls it and fetches them. They
            stay as long as a process uses the entry.

    Raises:
        UserError: the cache has no room for the other files, or one cannot be fetched.
    """

    def __init__(self, kind: str, name: str, remote: Folder, parts: int, base: Callable[[], dict[str, int]]) -> None:
        self.remote, self.cache, self.folder = remote, cache_folder(kind), cache_folder(kind) / name
        self.list: PartList | None = None
        names: list[str] = []

        def take_room(cache: Path, _: int) -> None:
            sizes = base()
            names.extend(sizes)
            with _room_of(cache) as room:
                if not room.make(sum(sizes.values())):
                    raise room.refusal(f"{remote}", sum(sizes.values()))
                _Table(self.folder).create(parts, sum(sizes.values()))

        def fill(folder: Path) -> None:
            (folder / PARTS_FOLDER).mkdir(exist_ok=True)
            for file in names:
                remote.fetch(file, folder / file)

        self._entry, _ = cached_copy(kind, name, 0, fill, take_room)  # in use until this process ends
        self._table, self._locks = _Table(self.folder), _locks_of(self.folder, parts)
        self._changed = threading.Condition()
        self._fetching: set[int] = set()
        self._failed: dict[int, Exception] = {}

    @property
    def base_bytes(self) -> int:
        """The size of the files that are not parts."""
        return self._table.read()[0]

    def capacity_bytes(self) -> float:
        """The most bytes that the files of this kind can have in the cache."""
        with _room_of(self.cache) as room:
            return room.capacity_bytes()

    def path(self, number: int) -> Path:
        """Where a part is when it is here."""
        return _part_path(self.folder, number)

    def size(self, number: int) -> int:
        """The bytes of a part."""
        assert self.list is not None
        return int(self.list.sizes[number])

    def hold(self, numbers: np.ndarray) -> None:
        """Keep these parts from being removed, also those that are not here yet. Each call needs a `let_go`."""
        self._locks.hold(numbers)

    def let_go(self, numbers: np.ndarray) -> None:
        """End one hold of these parts, which are then used last now."""
        self._table.touch(numbers)
        self._locks.let_go(numbers)
        self.notify()

    def is_here(self, number: int) -> bool:
        """Whether a part is here whole. It stays only if it is held."""
        with contextlib.suppress(FileNotFoundError):
            return self.path(number).stat().st_size == self.size(number)
        return False

    def get(self, number: int, give_up: Callable[[], bool]) -> Path:
        """A part that is held; waits until it is here.

        Args:
            number: the part.
            give_up: called while there is no room; lets another part go, and returns whether it did.

        Raises:
            UserError: the part cannot be fetched, is damaged at the store, or there was no room for ten minutes.
        """
        start, is_reported = time.monotonic(), False
        while (state := self.attempt(number)) is not PartState.HERE:
            if state is PartState.FULL:
                if give_up():
                    continue
                self._check_fits(number)
                waited = time.monotonic() - start
                if waited > ROOM_WAIT_S:
                    raise UserError(
                        f"{self.cache} has had no room for {self.path(number).name} for {waited / 60:.0f} minutes, "
                        f"because other runs on this node need all parts in it: raise {CACHE_GIB} (now "
                        f"{cache_limit_bytes() / 2**30:g}), or wait until they end"
                    )
                if waited > ROOM_NOTICE_AFTER_S and not is_reported:
                    say(f"  waiting for room in {self.cache}, which other runs on this node use")
                    is_reported = True
            self.wait(BUSY_PAUSE_S if state is PartState.BUSY else FULL_PAUSE_S)
        if error := self._failed.pop(number, None):
            raise error
        return self.path(number)

    def attempt(self, number: int) -> PartState:
        """Fetch a part that is held, unless it is here or on the way. After an error it counts as here, until `get`."""
        if number in self._failed or self.is_here(number):
            return PartState.HERE
        with self._changed:
            if number in self._fetching:
                return PartState.BUSY
            self._fetching.add(number)
        try:
            with self._locks.fetching(number) as is_ours:
                if not is_ours:
                    return PartState.BUSY
                if not self.is_here(number):  # another process may have been faster
                    if not self._take_room(number):
                        return PartState.FULL
                    self._fetch(number)
        except Exception as error:  # also those of a store's client; `get` raises it
            self._failed[number] = error
        finally:
            with self._changed:
                self._fetching.discard(number)
                self._changed.notify_all()
        return PartState.HERE

    def wait(self, seconds: float) -> None:
        """Wait until something changes in this process, or for some time."""
        with self._changed:
            self._changed.wait(seconds)

    def notify(self) -> None:
        """Wake the threads that wait."""
        with self._changed:
            self._changed.notify_all()

    def _check_fits(self, number: int) -> None:
        needed = self._table.read()[0] + self.size(number)
        if needed > cache_limit_bytes():
            with _room_of(self.cache) as room:
                raise room.refusal(f"{self.remote}", needed)

    def _take_room(self, number: int) -> bool:
        with _room_of(self.cache) as room:
            if not self._table.has(number):  # else a killed process has taken it
                if not room.make(self.size(number)):
                    return False
                self._table.write(number, self.size(number), time.time_ns())
            return True

    def _fetch(self, number: int) -> None:
        assert self.list is not None
        path, name, wanted = self.path(number), self.list.name_of(number), self.list.sha256_of(number)
        try:
            for _ in range(FETCH_ATTEMPTS):
                size_bytes, found = self.remote.fetch_hashed(name, _partial(path), _check_going_on)
                if found == wanted:
                    _partial(path).replace(path)
                    return
            raise UserError(
                f"{self.remote}/{name} was changed: {FETCH_ATTEMPTS} times it came with {size_bytes} bytes and sha256 "
                f"{found[:12]}, and the card says {self.size(number)} bytes and {wanted[:12]}; {COPY_AGAIN_THERE}"
            )
        except FileNotFoundError:
            self._remove(number)
            raise UserError(f"{self.remote}/{name} is missing: {COPY_AGAIN_THERE}") from None
        except OSError as error:
            self._remove(number)
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): free disk space, or point {CACHE} elsewhere"
            ) from None
        except BaseException:
            self._remove(number)
            raise

    def _remove(self, number: int) -> None:
        """Remove what came of a part. Its room is free then."""
        _partial(self.path(number)).unlink(missing_ok=True)
        self._table.write(number, 0, 0)


def _part_path(folder: Path, number: int) -> Path:
    return folder / PARTS_FOLDER / f"{number:08d}"


def _partial(path: Path) -> Path:
    """Where a part is while it is fetched. The name is always the same, so a killed process leaves at most one."""
    return path.with_name(f".{path.name}.partial")


_is_ending = threading.Event()
atexit.register(_is_ending.set)  # threads end after the piece that they are reading


def _check_going_on() -> None:
    if _is_ending.is_set():
        raise UserError("fetching has ended with the process")


class _Room:
    """The room of one kind of files in the cache, while this process has its lock.

    Args:
        cache: the folder of the kind.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.bytes = 0.0  # after the last call of `make`

    def make(self, size_bytes: int) -> bool:
        """Remove parts and whole copies that no process needs, oldest use first, until there is room."""
        contents = self._contents()
        used_bytes = sum(content.size_bytes for content in contents)
        self.bytes = min(cache_limit_bytes() - used_bytes, shutil.disk_usage(self.cache).free)
        removals = self._removals(contents)
        while self.bytes < size_bytes and (freed := next(removals, None)) is not None:
            self.bytes += freed
        return self.bytes >= size_bytes

    def capacity_bytes(self) -> float:
        """The room if everything was removed."""
        used_bytes = sum(content.size_bytes for content in self._contents())
        return min(cache_limit_bytes(), shutil.disk_usage(self.cache).free + used_bytes)

    def _contents(self) -> "list[_Content]":
        return [_Content.of(Path(entry.path)) for entry in os.scandir(self.cache) if entry.is_dir()]

    def _removals(self, contents: "list[_Content]") -> Iterator[int]:
        """Remove one thing after the other; yields the bytes of each.

        The other files of a folder are of use only to a process that has it open, or with parts.
        """
        yield from (content.remove_rest() for content in contents)
        if contents:
            owners = np.concatenate([np.full(len(content.numbers), place) for place, content in enumerate(contents)])
            places = np.concatenate([np.arange(len(content.numbers)) for content in contents])
            for oldest in np.argsort(np.concatenate([content.used_ns for content in contents]), kind="stable").tolist():
                yield contents[owners[oldest]].remove(int(places[oldest]))
        yield from (content.remove_rest() for content in contents)

    def refusal(self, what: str, size_bytes: int) -> UserError:
        """The error if there is no room for something."""
        return UserError(
            f"{self.cache} has room for {self.bytes / 2**30:.1f} GiB and {what} needs {size_bytes / 2**30:.1f}: free "
            f"space, raise {CACHE_GIB} (now {cache_limit_bytes() / 2**30:g}) or point {CACHE} to a larger disk"
        )


@contextlib.contextmanager
def _room_of(cache: Path) -> Iterator[_Room]:
    with (cache / ROOM_FILE).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Room(cache)


WHOLE = -1  # instead of the number of a part: a copy that an older version made whole
_whole_sizes: dict[Path, int] = {}


@dataclass
class _Content:
    """What one folder of the cache has: its parts that are here, or one whole copy.

    Args:
        folder: the folder.
        size_bytes: all its bytes.
        numbers: (k,) the parts that are here.
        sizes: (k,) their bytes.
        used_ns: (k,) when they were last used.
        parts: number of all parts, here or not.
    """

    folder: Path
    size_bytes: int
    numbers: np.ndarray
    sizes: np.ndarray
    used_ns: np.ndarray
    parts: int = 0

    @staticmethod
    def of(folder: Path) -> "_Content":
        """The content of a folder."""
        try:
            base_bytes, sizes, used = _Table(folder).read()
        except FileNotFoundError:
            return _Content._of_whole(folder)
        here = np.flatnonzero(used)
        return _Content(folder, base_bytes + int(sizes[here].sum()), here, sizes[here], used[here], len(used))

    @staticmethod
    def _of_whole(folder: Path) -> "_Content":
        if folder not in _whole_sizes or not (folder / COMPLETE).is_file():
            _whole_sizes[folder] = sum(size for size in Folder(str(folder)).files().values() if size > 0)
        size, lock, used_ns = _whole_sizes[folder], folder.with_name(f"{folder.name}.lock"), 0
        with contextlib.suppress(FileNotFoundError):
            used_ns = lock.stat().st_mtime_ns
        return _Content(folder, size, np.array([WHOLE]), np.array([size]), np.array([used_ns]))

    def remove(self, place: int) -> int:
        """Remove the part at a place in `numbers` unless a process needs it; returns its bytes, 0 if it stays."""
        number, size_bytes = int(self.numbers[place]), int(self.sizes[place])
        if number == WHOLE:
            return size_bytes if remove_unused(self.folder) else 0
        with contextlib.suppress(FileNotFoundError), _locks_of(self.folder, self.parts).unneeded(number) as is_free:
            if is_free:
                path = _part_path(self.folder, number)
                path.unlink(missing_ok=True)
                _partial(path).unlink(missing_ok=True)
                _Table(self.folder).write(number, 0, 0)
                return size_bytes
        return 0

    def remove_rest(self) -> int:
        """Remove a folder that has no parts and that no process has open; returns its bytes, 0 if it stays."""
        with contextlib.suppress(FileNotFoundError):
            base_bytes, _, used = _Table(self.folder).read()
            if not used.any() and remove_unused(self.folder):
                return base_bytes
        return 0
