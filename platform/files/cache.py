"""The cache of a node: copies of remote files, filled once for all processes and removed to make room."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.journal import JOURNAL_FILE, has_unsent
from patchloom.platform.files.storage import make_folder, write_atomic

CACHE, CACHE_GIB, DEFAULT_CACHE_GIB = "PATCHLOOM_CACHE", "PATCHLOOM_CACHE_GIB", 256
COMPLETE = ".whole"  # a file in each complete copy
RUNS, FEATURES = "runs", "features"  # working copies of remote runs; features of images, which have no locks
FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class CacheEntry:
    """One folder in the cache of this node.

    Args:
        kind: what it contains: `datasets`, `runs`, `features`, ...
        name: its name.
        path: the folder.
        size_bytes: the size of its files.
        used_unix_s: time of its last use.
        in_use: whether a process uses it now.
        is_unsent: whether it contains work of a remote run that the store does not have.
    """

    kind: str
    name: str
    path: Path
    size_bytes: int
    used_unix_s: float
    in_use: bool
    is_unsent: bool


def cache_root() -> Path:
    """The folder of the cache of this node: PATCHLOOM_CACHE or ~/.cache/patchloom. It may not exist yet."""
    return Path(os.environ.get(CACHE) or "~/.cache/patchloom").expanduser().absolute()


def cache_folder(kind: str) -> Path:
    """The cache folder of this node for one kind of files, in PATCHLOOM_CACHE or ~/.cache/patchloom."""
    return make_folder(cache_root() / kind)


def cache_limit_bytes() -> float:
    """The most bytes that one kind of files may have in the cache; raises UserError if PATCHLOOM_CACHE_GIB is wrong."""
    try:
        return float(os.environ.get(CACHE_GIB) or DEFAULT_CACHE_GIB) * 2**30
    except ValueError:
        raise UserError(
            f"{CACHE_GIB}={os.environ[CACHE_GIB]} is not a number: give the size of the cache in GiB"
        ) from None


def cache_entries(wanted: str = "*") -> list[CacheEntry]:
    """What the cache of this node contains, sorted by kind and name.

    Args:
        wanted: only entries of this kind; by default all.
    """
    return [_entry(folder) for folder in sorted(cache_root().glob(f"{wanted}/*")) if _is_own_entry(folder)]


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an entry of the cache. Returns False if it stays: a process uses it, or it has unsent work."""
    return remove_unused(entry.path)


def remove_unused(folder: Path) -> bool:
    """Remove the folder of an entry of the cache, like `remove_entry`. A folder that is no entry stays."""
    if not _is_own_entry(folder):
        return False
    with contextlib.ExitStack() as stack:
        lock = _lock_of(folder)
        if lock.is_file():
            handle = stack.enter_context(lock.open("a"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        if has_unsent(folder):
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _is_own_entry(folder: Path) -> bool:
    """Whether this is an entry, not a folder of a user who has set PATCHLOOM_CACHE to a folder of their own."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if folder.parent.name == FEATURES and FINGERPRINT.fullmatch(folder.name):
        return True
    has_our_lock = _lock_of(folder).is_file() and not _lock_of(folder).stat().st_size
    return has_our_lock or (folder / JOURNAL_FILE).is_file()


def _entry(folder: Path) -> CacheEntry:
    lock = _lock_of(folder)
    size_bytes = sum(max(0, size) for size in Folder(str(folder)).files().values())
    try:
        used = (lock if lock.is_file() else folder).stat().st_mtime
    except FileNotFoundError:  # removed just now
        used = 0.0
    return CacheEntry(folder.parent.name, folder.name, folder, size_bytes, used, _is_locked(lock), has_unsent(folder))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_locked(lock: Path) -> bool:
    if not lock.is_file():
        return False
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def copy_name(folder: Folder, name: str, member: str = "") -> str:
    """The name in the cache of a copy of a file, or of what is unpacked from it, which no other file has.

    A checksum such as CRC-32 in the file would not do: anyone can make another file with the same one.
    """
    identity = (folder.address, name, member, folder.stamp(name))
    return hashlib.sha256(json.dumps(identity).encode(errors="surrogatepass")).hexdigest()[:32]


def kept_with(owner: object, handle: int) -> None:
    """Keep a copy as long as the object that reads it; `handle` is that of `cached_copy`."""
    weakref.finalize(owner, os.close, handle)


def cached_copy(
    kind: str,
    name: str,
    size_bytes: int,
    fill: Callable[[Path], object],
    take_room: Callable[[Path, int], None] | None = None,
) -> tuple[int, Path]:
    """A folder in the cache of this node, filled once for all processes.

    Args:
        kind: folder of the cache for files of this kind.
        name: name of the copy, which identifies its content.
        size_bytes: expected size. The copies with the oldest use are removed to make room.
        fill: writes the files into the folder. It is called by one process; the others wait.
        take_room: called before, with the folder of the kind and the size, to make room in another way.

    Returns:
        A file descriptor and the folder. The copy is kept until the descriptor is closed or the process ends.

    Raises:
        UserError: the cache has no room for the copy.
    """
    cache = cache_folder(kind)
    folder = cache / name
    handle = _hold(folder)
    try:
        with (cache / f"{name}.filling").open("a") as filling:
            fcntl.flock(filling, fcntl.LOCK_EX)  # other processes wait here, only while the copy is filled
            if not (folder / COMPLETE).is_file():
                (take_room or make_room)(cache, size_bytes)
                try:
                    fill(make_folder(folder))
                    write_atomic(folder / COMPLETE, "")
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)  # what came so far would be of no use
                    raise
    except BaseException:
        os.close(handle)
        raise
    return handle, folder


def _hold(folder: Path) -> int:
    """Note the use of an entry, which is not removed until the returned file descriptor is closed."""
    lock = _lock_of(folder)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(handle, fcntl.LOCK_SH)
    os.utime(lock)  # the time of its last use
    return handle


_working_copies: dict[Path, int] = {}  # this process keeps them until it ends


def working_copy(there: Folder, role: str) -> Path:
    """The local folder that corresponds to a remote one; each role (driver, worker) has its own.

    It stays in the cache until this process ends. Later it is removed to make room, unless it has unsent work.
    """
    digest = hashlib.sha256(there.address.encode()).hexdigest()[:12]
    folder = cache_folder(RUNS) / f"{there.name}-{digest}-{role}"
    if folder not in _working_copies:
        _working_copies[folder] = _hold(folder)
        _evict(folder.parent, 0)
    return make_folder(folder)


def make_room(cache: Path, size_bytes: int) -> None:
    """Make room for a copy; raises UserError if that is not possible."""
    room = _evict(cache, size_bytes)
    if room < size_bytes:
        raise UserError(
            f"{cache} has room for {room / 2**30:.1f} GiB and the copy needs {size_bytes / 2**30:.1f}: free "
            f"space, raise {CACHE_GIB} (now {cache_limit_bytes() / 2**30:g}) or point {CACHE} to a larger disk"
        )


def _evict(cache: Path, size_bytes: int) -> float:
    """Remove copies that no process uses until there is enough room. Returns the room in bytes.

    Those with the oldest use are removed first. Of runs, finished ones are removed first.
    """
    limit = cache_limit_bytes()
    entries = sorted(
        (entry for entry in cache_entries(cache.name)),
        key=lambda entry: (
            cache.name == RUNS and not (entry.path / "model" / "model.json").is_file(),
            entry.used_unix_s,
        ),
    )
    used = sum(entry.size_bytes for entry in entries)

    def room() -> float:
        return min(limit - used, shutil.disk_usage(cache).free)

    for entry in entries:
        if room() >= size_bytes:
            break
        if remove_entry(entry):
            used -= entry.size_bytes
    return room()
