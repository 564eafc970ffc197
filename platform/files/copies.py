"""Copies: what lies far away as files on this node, and a folder of this node kept far away while it grows."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.storage import local_path, make_folder, write_atomic

CACHE, CACHE_GIB, DEFAULT_CACHE_GIB = "PATCHLOOM_CACHE", "PATCHLOOM_CACHE_GIB", 256
WHOLE = ".whole"  # in a copy that is complete
LOOK_EVERY_S = 2.0
TRIES, RETRY_S = 5, 3.0
NEVER = (-1, -1)
GROWING = ".jsonl"  # files of lines: they only grow, and their last line may be half there


def cache_folder(kind: str) -> Path:
    """Where copies lie on this node: PATCHLOOM_CACHE, else ~/.cache/patchloom."""
    return make_folder(Path(os.environ.get(CACHE) or "~/.cache/patchloom").expanduser().absolute() / kind)


def working_copy(there: Folder, role: str) -> Path:
    """The folder of this node that stands for a remote one, each role (driver, worker) with its own."""
    digest = hashlib.sha256(there.address.encode()).hexdigest()[:12]
    return make_folder(cache_folder("runs") / f"{there.name}-{digest}-{role}")


def local_copy(address: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The folder at an address as a path: itself where it is local, else a copy of the wanted files, fetched now."""
    if not is_remote(address):
        return local_path(address)
    there = Folder.at(address)
    here = working_copy(there, "copy")
    pull(there, here, wanted)
    return here


def pull(there: Folder, here: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Make a local folder equal to what is wanted of a remote one; hidden files are of each machine alone."""
    with _locked(here):
        names = {name: size for name, size in there.files().items() if not _is_hidden(name)}
        for name in Folder(str(here)).files():
            if name not in names and not _is_hidden(name):
                (here / name).unlink(missing_ok=True)
        cards = {name: _read(there, name) for name in names if wanted(name) and name.endswith(".json")}
        changed = {name.rpartition("/")[0] for name, card in cards.items() if _read(Folder(str(here)), name) != card}
        for name, size in names.items():
            if not wanted(name) or name in cards:
                continue
            # a tensor's file never changes under its card; small files are looked at again
            is_here = (here / name).is_file() and (here / name).stat().st_size == size
            if not (is_here and name.endswith(".safetensors") and name.rpartition("/")[0] not in changed):
                with contextlib.suppress(FileNotFoundError):  # let go a moment ago, its card first
                    there.fetch(name, here / name)
        for name, card in cards.items():
            if card is not None:
                Folder(str(here)).write(name, card)


def _read(folder: Folder, name: str) -> bytes | None:
    """What a file holds, or None where it is not, or no longer, there."""
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None


class Mirror:
    """Keeps a remote folder equal to a local one while the block runs, and after it.

    What vouches for others (a `.json`) goes up after them and comes away before them, so that a reader never
    meets half a checkpoint. A store that is away is tried again; at the end UserError says what is missing.
    """

    def __init__(self, here: Path, there: Folder, signal: str | None = None) -> None:
        self.here, self.there, self.signal = here, there, signal
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._sent: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "Mirror":
        here = self._stamps()
        for name, size in self.there.files().items():
            if not _is_hidden(name):  # what was fetched a moment ago need not go back
                known = name.endswith(".safetensors") and here.get(name, NEVER)[0] == size
                self._sent[name] = here[name] if known else NEVER
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for attempt in range(TRIES):
            try:
                self._send()
                return
            except (UserError, OSError) as error:
                problem = str(error)
                time.sleep(RETRY_S * (attempt + 1))
        raise UserError(f"{self.there} has not all of {self.here} ({problem}): call again with --resume to send it")

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self._send()
                if self.signal and self.there.has(self.signal):
                    (self.here / self.signal).touch()
            except (UserError, OSError):
                continue  # the next look tries again, and the last one says so

    def _stamps(self) -> dict[str, tuple[int, int]]:
        stamps = {}
        for name in Folder(str(self.here)).files():
            if not _is_hidden(name):
                try:
                    status = (self.here / name).stat()
                except FileNotFoundError:  # a checkpoint that was let go just now
                    continue
                stamps[name] = (status.st_size, status.st_mtime_ns)
        return stamps

    @staticmethod
    def _is_vouched(name: str, stamps: dict[str, tuple[int, int]]) -> bool:
        """Whether a card here speaks for a tensor that was never fetched to this node."""
        folder = name.rpartition("/")[0]
        return any(f"{folder}/{card}" in stamps for card in ("checkpoint.json", "model.json"))

    def _send(self) -> None:
        stamps = self._stamps()
        gone = [name for name in self._sent if name not in stamps and not self._is_vouched(name, stamps)]
        for name in sorted(gone, key=_vouches, reverse=True):
            self.there.remove(name)
            del self._sent[name]
        for name in sorted(stamps, key=_vouches):
            if self._sent.get(name) == stamps[name]:
                continue
            try:
                if name.endswith(GROWING):
                    content = (self.here / name).read_bytes()
                    self.there.write(name, content[: content.rfind(b"\n") + 1])
                else:
                    self.there.put(self.here / name, name)
            except FileNotFoundError:
                if (self.here / name).exists():
                    raise  # it is the store that is gone
                continue
            self._sent[name] = stamps[name]


class Fetcher:
    """Brings the lines and pictures of a remote run to a local folder while the block runs, for who watches it."""

    def __init__(self, there: Folder, here: Path) -> None:
        self.there, self.here = there, here
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetcher", daemon=True)

    def __enter__(self) -> "Fetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.look()
            except (UserError, OSError):
                continue

    def look(self) -> None:
        """Fetch what is new: pictures first, then the lines that name them."""
        names = [name for name in self.there.files() if not _is_hidden(name)]
        for name in names:
            if name.endswith(".png") and not (self.here / name).is_file():
                self.there.fetch(name, self.here / name)
        for name in names:
            if name.endswith(GROWING):
                _grow(self.here / name, self.there.read(name))


def _grow(path: Path, content: bytes) -> None:
    """Append what is new to a file of lines, so that its readers go on; one that was begun anew is replaced."""
    known = path.read_bytes() if path.is_file() else b""
    if content.startswith(known):
        with path.open("ab") as file:
            file.write(content[len(known) :])
    else:
        write_atomic(path, content)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _vouches(name: str) -> tuple[bool, str]:
    """The order in which files go: those that say that others are whole come last."""
    return name.endswith(".json"), name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the other processes of this node that copy into a folder."""
    with (folder / ".copy.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_copy(kind: str, name: str, size_bytes: int, fill: Callable[[Path], None]) -> tuple[int, Path]:
    """A folder of the cache that `fill` makes once a node, whoever of its processes asks first.

    It stays until the returned file descriptor is closed, or the process ends; after that it may have to make
    room for another of its kind. Raises UserError where the cache has no room for it.
    """
    cache = cache_folder(kind)
    folder, lock = cache / name, cache / f"{name}.lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)  # from here on nobody removes it
        with (cache / f"{name}.filling").open("a") as filling:
            fcntl.flock(filling, fcntl.LOCK_EX)  # the others wait here for the one that fills, and for nothing else
            if not (folder / WHOLE).is_file():
                _make_room(cache, size_bytes, lock)
                fill(make_folder(folder))
                write_atomic(folder / WHOLE, "")
    except BaseException:
        os.close(handle)
        raise
    os.utime(lock)  # used just now
    return handle, folder


def _make_room(cache: Path, size_bytes: int, mine: Path) -> None:
    """Remove the copies that nobody holds, the longest unused first, until so many bytes have room."""
    try:
        most = float(os.environ.get(CACHE_GIB) or DEFAULT_CACHE_GIB) * 2**30
    except ValueError:
        raise UserError(f"{CACHE_GIB}={os.environ[CACHE_GIB]} is not a number: give the cache's size in GiB") from None
    locks = sorted((lock for lock in cache.glob("*.lock") if lock != mine), key=lambda lock: lock.stat().st_mtime)
    sizes = {lock: sum(Folder(str(lock.with_suffix(""))).files().values()) for lock in locks}

    def room() -> float:
        return min(most - sum(sizes.values()), shutil.disk_usage(cache).free)

    for lock in locks:
        if room() >= size_bytes:
            break
        with lock.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # in use
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            sizes[lock] = 0
    if room() < size_bytes:
        raise UserError(
            f"{cache} has room for {room() / 2**30:.1f} GiB and the copy needs {size_bytes / 2**30:.1f}: free some "
            f"space, raise {CACHE_GIB} (it is {most / 2**30:g}) or point {CACHE} to a larger disk"
        )
