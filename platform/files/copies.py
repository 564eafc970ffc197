"""Copies of remote folders on this node, and remote mirrors of local folders."""

import contextlib
import fcntl
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.fence import holds_fence
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.journal import NOT_SENT, Journal, Stamp, is_hidden_name, stamps_of
from patchloom.platform.files.patience import begin_to_wait, store_wait_s
from patchloom.platform.files.storage import local_path, make_folder, write_atomic
from patchloom.platform.progress import say

SYNC_EVERY_S = 2.0
SEND_RETRY_S = 1.0
WRITER_FILE = ".writer.json"
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
        described = {_parent(name) for name in cards}
        changed = {_parent(name) for name, card in cards.items() if _read(Folder(str(here)), name) != card}
        for name, size in names.items():
            if not wanted(name) or name in cards:
                continue
            # tensors with a card change only together with it; other files are always read again
            is_here = (here / name).is_file() and (here / name).stat().st_size == size
            if not (is_here and name.endswith(".safetensors") and _parent(name) in described - changed):
                with contextlib.suppress(FileNotFoundError):  # removed just now, after its card
                    there.fetch(name, here / name)
        for name, card in cards.items():
            if card is not None:
                Folder(str(here)).write(name, card)


def _parent(name: str) -> str:
    """The folder of a file."""
    return name.rpartition("/")[0]


def _read(folder: Folder, name: str) -> bytes | None:
    """The content of a file, or None if there is no such file."""
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None


class UnsentWork(UserError):
    """A mirror ended with work that the store does not have."""


class RemoteMirror:
    """Keeps a remote folder equal to a local one during the block, and at its end.

    Cards (`.json`) are sent after the files that they describe and removed before them, so that a reader never finds
    an incomplete checkpoint. If the store does not answer, sending is repeated. The journal of the local folder
    records what was sent, and WRITER_FILE in the remote folder names the local one until everything was sent.

    Args:
        here: the local folder.
        there: the remote folder.
        signal: name of a file; if it appears in the remote folder, it is copied to the local folder. It stays in the
            remote folder if it is empty, else it is removed there.
        owner: who must hold the fence of the remote folder. If another command holds it, nothing more is sent, and
            `signal` is created in the local folder.

    Raises:
        UnsentWork: at the end of the block, if not all files could be sent.
    """

    def __init__(self, here: Path, there: Folder, signal: str | None = None, owner: str = "") -> None:
        self.here, self.there, self.signal, self.owner = here, there, signal, owner
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._journal = Journal.read(here)

    def __enter__(self) -> "RemoteMirror":
        here, sent = stamps_of(self.here), {}
        for name, size in self.there.files().items():
            # a file that was just fetched is not sent back; one that was never here is not removed there, unless it is
            # a tensor without its card: an incomplete upload
            was_here = name in here or name in self._journal.sent
            if not is_hidden_name(name) and (was_here or name.endswith(".safetensors")):
                stamp = here.get(name, NOT_SENT)
                known = name.endswith(".safetensors") or self._journal.sent.get(name) == stamp
                sent[name] = stamp if known and stamp[0] == size else NOT_SENT
        self._journal.sent = sent
        self._journal.write(self.here)
        self.there.write_json(WRITER_FILE, asdict(Writer(self._journal.copy_id, socket.gethostname(), str(self.here))))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        problem = self._send_patiently()
        if problem is None:
            with contextlib.suppress(UserError, OSError):
                self.there.remove(WRITER_FILE)
        elif kind is None:
            raise UnsentWork(
                f"{self.there} does not have all files of the run ({problem}): they wait on {socket.gethostname()} in "
                f"{self.here}; repeat the command with --resume on this machine, or on a cluster that still has it"
            )

    def _send_patiently(self) -> str | None:
        """Send everything, with repetitions. Returns the problem if that was not possible."""
        begin_to_wait(self.there.store)
        end, pause = time.monotonic() + store_wait_s(), SEND_RETRY_S
        while True:
            try:
                return None if self._send() else "another command has taken it over"
            except (UserError, OSError) as error:
                if time.monotonic() + pause > end:
                    return str(error)
                time.sleep(pause)
                pause *= 2

    def _run(self) -> None:
        while not self._stop.wait(SYNC_EVERY_S):
            try:
                if not self._send():
                    if self.signal:
                        (self.here / self.signal).touch()
                    return
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
    def _has_card(name: str, stamps: dict[str, Stamp]) -> bool:
        """Whether the card of a tensor is here. The tensor itself may never have been fetched to this node."""
        folder = _parent(name)
        return any(f"{folder}/{card}" in stamps for card in ("checkpoint.json", "model.json"))

    def _send(self) -> bool:
        """Send what changed. Returns False if another command holds the fence."""
        stamps, sent = stamps_of(self.here), self._journal.sent
        gone = [name for name in sent if name not in stamps and not self._has_card(name, stamps)]
        changed = [name for name in stamps if sent.get(name) != stamps[name]]
        if not gone and not changed:
            return True
        if not holds_fence(self.there, self.owner):
            return False
        try:
            for name in sorted(gone, key=_send_order, reverse=True):
                self.there.remove(name)
                del sent[name]
            for name in sorted(changed, key=_send_order):
                if _send_file(self.here, self.there, name):
                    sent[name] = stamps[name]
        finally:
            self._journal.write(self.here)
        return True


def _send_file(here: Path, there: Folder, name: str) -> bool:
    """Send a file. Returns False if it was removed here just now."""
    try:
        if name.endswith(GROWING):
            content = (here / name).read_bytes()
            there.write(name, content[: content.rfind(b"\n") + 1])
        else:
            there.put(here / name, name)
    except FileNotFoundError:
        if (here / name).exists():
            raise  # the store is missing, not the local file
        return False
    return True


@dataclass(frozen=True)
class Writer:
    """The working copy that last wrote to a remote folder, and that may have work that was not sent.

    Args:
        copy_id: identity of the copy.
        host: the name of its machine.
        path: its path there.
    """

    copy_id: str
    host: str
    path: str

    @staticmethod
    def of(there: Folder) -> "Writer | None":
        """The last writer of a folder; None if everything was sent."""
        try:
            card = json.loads(there.read(WRITER_FILE))
            return Writer(str(card["copy_id"]), str(card["host"]), str(card["path"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def send_unsent(there: Folder, here: Path, owner: str = "") -> int:
    """Send the work of a copy that was never sent, if no other copy wrote to the remote folder since.

    Args:
        there: the remote folder.
        here: the working copy of a worker.
        owner: who must hold the fence.

    Returns:
        The number of files that were sent.

    Raises:
        UserError: the store does not answer, or another command holds the fence.
    """
    with _locked(here):
        journal, writer = Journal.read(here), Writer.of(there)
        if writer is None or writer.copy_id != journal.copy_id:
            return 0
        names = sorted(journal.unsent(here), key=_send_order)
        if names and not holds_fence(there, owner):
            raise UserError(f"{there} was taken over by another command: repeat this one when that one has ended")
        for name in names:
            stamp = stamps_of(here)[name]
            if _send_file(here, there, name):
                journal.sent[name] = stamp
        if names:
            journal.write(here)
            say(f"  sent {len(names)} files of {here} that {there} did not have")
        there.remove(WRITER_FILE)  # only after everything was sent
        return len(names)


def update_copy(there: Folder, here: Path, wanted: Callable[[str], bool]) -> None:
    """Make the working copy of a worker equal to the remote folder. Work that was never sent is moved aside.

    Args:
        there: the remote folder.
        here: the working copy.
        wanted: which files to fetch.
    """
    journal = Journal.read(here)
    unsent = [name for name in journal.unsent(here) if not is_hidden_name(name)]
    if unsent:
        _move_aside(there, here, unsent)
    pull_folder(there, here, wanted)
    journal.sent = stamps_of(here)
    journal.write(here)


def _move_aside(there: Folder, here: Path, names: list[str]) -> None:
    """Move files to a folder of their own next to the copy. It has unsent work, so the cache keeps it."""
    numbers = (number for number in itertools.count(1) if not here.with_name(f"{here.name}-unsent-{number}").exists())
    aside = make_folder(here.with_name(f"{here.name}-unsent-{next(numbers)}"))
    for name in names:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).replace(aside / name)
    Journal().write(aside)
    say(
        f"  {len(names)} files that were never sent are not part of {there}, which was continued elsewhere: "
        f"they are kept on {socket.gethostname()} in {aside}"
    )


class ProgressFetcher:
    """Fetches the progress lines and pictures of a remote run, or of many, into a local folder during the block.

    Args:
        there: the remote folder.
        here: the local folder.
        wanted: which files to fetch, of lines and pictures.
        every_s: seconds between two looks.
    """

    def __init__(
        self,
        there: Folder,
        here: Path,
        wanted: Callable[[str], bool] = lambda name: True,
        every_s: float = SYNC_EVERY_S,
    ) -> None:
        self.there, self.here, self.wanted, self.every_s = there, here, wanted, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetcher", daemon=True)

    def __enter__(self) -> "ProgressFetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(UserError, OSError):  # the end of the run is reported, not the last lines
            self.fetch()

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            try:
                self.fetch()
            except (UserError, OSError):
                continue

    def fetch(self) -> None:
        """Fetch what is new: first pictures, then the lines that name them."""
        files = self.there.files()
        names = [name for name in files if not is_hidden_name(name) and self.wanted(name)]
        for name in names:
            if name.endswith(".png") and not (self.here / name).is_file():
                self.there.fetch(name, self.here / name)
        for name in names:
            if name.endswith(GROWING) and files[name] != _size(self.here / name):
                _grow(self.here / name, self.there.read(name))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _grow(path: Path, content: bytes) -> None:
    """Append new lines to a file, so that its readers continue. If the file was restarted, replace it."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
