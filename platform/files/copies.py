"""Copies of remote folders on this node, and remote mirrors of local folders."""

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.journal import NOT_SENT, is_hidden_name, stamps_of
from patchloom.platform.files.storage import local_path, write_atomic

SYNC_EVERY_S = 2.0
SEND_ATTEMPTS, SEND_RETRY_S = 5, 3.0
GROWING = ".jsonl"  # these files only grow, and their last line may be incomplete


def local_copy(address: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The local path of a folder. A remote one is copied first, with the files whose names are `wanted`."""
    if not is_remote(address):
        return local_path(address)
    there = Folder.at(address)
    here = working_copy(there, "copy")
    pull_folder(there, here, wanted)
    return here


def pull_folder(there: Folder, here: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Make a local folder equal to a remote one, for the wanted files. Hidden files are ignored."""
    with _locked(here):
        names = {name: size for name, size in there.files().items() if not is_hidden_name(name)}
        for name in Folder(str(here)).files():
            if name not in names and not is_hidden_name(name):
                (here / name).unlink(missing_ok=True)
        cards = {name: _read(there, name) for name in names if wanted(name) and name.endswith(".json")}
        changed = {name.rpartition("/")[0] for name, card in cards.items() if _read(Folder(str(here)), name) != card}
        for name, size in names.items():
            if not wanted(name) or name in cards:
                continue
            # tensors change only together with their card; small files are always read again
            is_here = (here / name).is_file() and (here / name).stat().st_size == size
            if not (is_here and name.endswith(".safetensors") and name.rpartition("/")[0] not in changed):
                with contextlib.suppress(FileNotFoundError):  # removed just now, after its card
                    there.fetch(name, here / name)
        for name, card in cards.items():
            if card is not None:
                Folder(str(here)).write(name, card)


def _read(folder: Folder, name: str) -> bytes | None:
    """The content of a file, or None if there is no such file."""
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None


class RemoteMirror:
    """Keeps a remote folder equal to a local one during the block, and at its end.

    Cards (`.json`) are sent after the files that they describe and removed before them, so that a reader never finds
    an incomplete checkpoint. If the store does not answer, sending is repeated. At the end of the block, UserError is
    raised if not all files could be sent.

    Args:
        here: the local folder.
        there: the remote folder.
        signal: name of a file; if it appears in the remote folder, it is copied to the local folder. It stays in the
            remote folder if it is empty, else it is removed there.
    """

    def __init__(self, here: Path, there: Folder, signal: str | None = None) -> None:
        self.here, self.there, self.signal = here, there, signal
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._sent: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "RemoteMirror":
        here = stamps_of(self.here)
        for name, size in self.there.files().items():
            if not is_hidden_name(name):  # a file that was just fetched is not sent back
                known = name.endswith(".safetensors") and here.get(name, NOT_SENT)[0] == size
                self._sent[name] = here[name] if known else NOT_SENT
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for attempt in range(SEND_ATTEMPTS):
            try:
                self._send()
                return
            except (UserError, OSError) as error:
                problem = str(error)
                time.sleep(SEND_RETRY_S * (attempt + 1))
        raise UserError(
            f"{self.there} does not have all files of {self.here} ({problem}): repeat the command with --resume"
        )

    def _run(self) -> None:
        while not self._stop.wait(SYNC_EVERY_S):
            try:
                self._send()
                if self.signal and self.there.has(self.signal):
                    self._take(self.signal)
            except (UserError, OSError):
                continue  # the next round tries again, and the end of the block raises

    def _take(self, name: str) -> None:
        content = self.there.read(name)
        write_atomic(self.here / name, content)
        if content:
            self.there.remove(name)

    @staticmethod
    def _has_card(name: str, stamps: dict[str, tuple[int, int]]) -> bool:
        """Whether the card of a tensor is here. The tensor itself may never have been fetched to this node."""
        folder = name.rpartition("/")[0]
        return any(f"{folder}/{card}" in stamps for card in ("checkpoint.json", "model.json"))

    def _send(self) -> None:
        stamps = stamps_of(self.here)
        gone = [name for name in self._sent if name not in stamps and not self._has_card(name, stamps)]
        for name in sorted(gone, key=_send_order, reverse=True):
            self.there.remove(name)
            del self._sent[name]
        for name in sorted(stamps, key=_send_order):
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
                    raise  # the store is missing, not the local file
                continue
            self._sent[name] = stamps[name]


class ProgressFetcher:
    """Fetches the progress lines and pictures of a remote run into a local folder during the block."""

    def __init__(self, there: Folder, here: Path) -> None:
        self.there, self.here = there, here
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetcher", daemon=True)

    def __enter__(self) -> "ProgressFetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.fetch()

    def _run(self) -> None:
        while not self._stop.wait(SYNC_EVERY_S):
            try:
                self.fetch()
            except (UserError, OSError):
                continue

    def fetch(self) -> None:
        """Fetch what is new: first pictures, then the lines that name them."""
        names = [name for name in self.there.files() if not is_hidden_name(name)]
        for name in names:
            if name.endswith(".png") and not (self.here / name).is_file():
                self.there.fetch(name, self.here / name)
        for name in names:
            if name.endswith(GROWING):
                _grow(self.here / name, self.there.read(name))


def _grow(path: Path, content: bytes) -> None:
    """Append new lines to a file, so that its readers continue. If the file was restarted, replace it."""
    known = path.read_bytes() if path.is_file() else b""
    if content.startswith(known):
        with path.open("ab") as file:
            file.write(content[len(known) :])
    else:
        write_atomic(path, content)


def _send_order(name: str) -> tuple[bool, str]:
    """The order in which files are sent: cards after the files that they describe."""
    return name.endswith(".json"), name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude the other processes of this node that copy into a folder."""
    with (folder / ".copy.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
