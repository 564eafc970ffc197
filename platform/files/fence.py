"""The fence of a remote folder: a file in the store that names the one command that writes to it.

The store decides who gets the fence, with conditional writes. The owner writes the file again and again (its
heartbeat). Another command that sees no change for EXPIRES_S takes it over. Only changes of the file count, so that
the clocks of the nodes do not matter.
"""

import contextlib
import getpass
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.object_store import ObjectFolder
from patchloom.platform.progress import say
from patchloom.redaction import redacted

FENCE_FILE, FENCE_FORMAT = ".fence.json", 1
FENCE_EXPIRES_S, DEFAULT_EXPIRES_S = "PATCHLOOM_FENCE_EXPIRES_S", 60.0
HEARTBEATS = 10  # within the time after which a fence expires
POLLS = 5  # looks at a fence within one heartbeat


@dataclass(frozen=True)
class FenceCard:
    """Who holds a fence.

    Args:
        owner: identity of this holding.
        host, pid, user, command: the process.
        since: when it began, UTC.
        heartbeat: counts the writes, so that each one changes the file.
    """

    owner: str
    host: str
    pid: int
    user: str
    command: str
    since: str
    heartbeat: int = 0
    format_version: int = FENCE_FORMAT

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return (redacted(json.dumps(asdict(self), indent=2)) + "\n").encode()


def expires_s() -> float:
    """Seconds without a heartbeat after which a fence may be taken over; raises UserError for a wrong setting."""
    text = os.environ.get(FENCE_EXPIRES_S) or str(DEFAULT_EXPIRES_S)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{FENCE_EXPIRES_S}={text} is not a number: give seconds") from None


@contextmanager
def fenced(folder: Folder) -> Iterator[str]:
    """Keep other commands out of a remote folder during the block.

    Yields:
        The identity of the owner, for `holds_fence`. Empty if the folder is local or its store has no conditional
        writes; the latter is reported.

    Raises:
        UserError: another command that is alive holds the fence.
    """
    store = folder.object_folder("fence")
    if store is None:
        if folder.is_remote:
            say(f"  {folder} cannot be locked (its store has no conditional writes): start this command only once")
        yield ""
        return
    fence = _Fence(folder, store)
    if not fence.acquire():
        say(f"  {folder} cannot be locked (its store ignores conditions): start this command only once")
        yield ""
        return
    with fence:
        yield fence.card.owner


def holds_fence(folder: Folder, owner: str) -> bool:
    """Whether the owner still holds the fence of a folder. An owner without a name holds everything."""
    if not owner:
        return True
    try:
        return bool(json.loads(folder.read(FENCE_FILE))["owner"] == owner)
    except (FileNotFoundError, ValueError, KeyError):
        return False


class _Fence:
    def __init__(self, folder: Folder, place: ObjectFolder) -> None:
        self.folder, self.store, self.key = folder, place.store, place.key(FENCE_FILE)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        command = " ".join(["patchloom", *sys.argv[1:]])[:200]
        user = _user_name()
        self.card = FenceCard(uuid.uuid4().hex, socket.gethostname(), os.getpid(), user, command, since)
        self.version: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="fence", daemon=True)

    def __enter__(self) -> "_Fence":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(UserError):  # it expires
            if self._beat():  # proves that it is ours, and that nobody takes it over now
                self.folder.remove(FENCE_FILE)

    def acquire(self) -> bool:
        """Get the fence, waiting for one without heartbeat to expire. Returns False if the store ignores conditions."""
        if self._put("create"):
            return not self._put("create")  # such a store would replace the file
        return self._take_over()

    def _put(self, mode: Any) -> bool:
        """Write the file under a condition. Returns False if the condition does not hold."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            self.version = _condition(obstore.put(self.store, self.key, self.card.to_bytes(), mode=mode))
        except (AlreadyExistsError, PreconditionError):
            return False
        except FileNotFoundError as error:
            if mode == "create":  # there is no such bucket
                raise self._refused(error) from None
            return False
        except BaseError as error:
            raise self._refused(error) from None
        return True

    def _refused(self, error: Exception) -> UserError:
        problem = " ".join(str(error).split())[:200]
        return UserError(f"{self.folder} cannot be locked ({problem}): check the address and its credentials")

    def _take_over(self) -> bool:
        """Watch the fence of another command until it changes, which raises UserError, or expires."""
        expires = expires_s()
        held, version = self._look()
        if held is None:
            return self.acquire()
        who = f"`{held.command}` of {held.user} on {held.host} (process {held.pid}) since {held.since}"
        say(f"  {self.folder} is used by {who}: waiting up to {expires:.0f} s for its next sign of life")
        end = time.monotonic() + expires
        while time.monotonic() < end:
            time.sleep(expires / HEARTBEATS / POLLS)
            now, newer = self._look()
            if now is None:
                return self.acquire()
            if newer != version:
                raise UserError(
                    f"{self.folder} is used by {who}, last heartbeat just now: wait until it ends, or choose another "
                    f"folder; if that process is gone, repeat the command {expires:.0f} s after its end"
                )
        say(f"  {self.folder}: no sign of life for {expires:.0f} s; taking over")
        return self._put(version) or self._take_over()

    def _look(self) -> tuple[FenceCard | None, Any]:
        """Who holds the fence, and the version of the file."""
        import obstore
        from obstore.exceptions import BaseError

        try:
            found = obstore.get(self.store, self.key)
            content = json.loads(bytes(found.bytes()))
        except FileNotFoundError:
            return None, None
        except BaseError as error:
            raise self._refused(error) from None
        known = {name: content[name] for name in FenceCard.__dataclass_fields__ if name in content}
        return FenceCard(**known), _condition(found.meta)

    def _keep(self) -> None:
        while not self._stop.wait(expires_s() / HEARTBEATS):
            with contextlib.suppress(UserError):  # an outage of the store: the next heartbeat tries again
                if not self._beat():
                    say(f"  {self.folder} was taken over by another command, because the store got no heartbeat")
                    return

    def _beat(self) -> bool:
        """Write the next heartbeat. Returns False if another command holds the fence."""
        self.card = FenceCard(**{**asdict(self.card), "heartbeat": self.card.heartbeat + 1})
        if self._put(self.version):
            return True
        held, version = self._look()  # perhaps an earlier answer of the store was lost
        if held is None or held.owner != self.card.owner:
            return False
        return self._put(version)


def _condition(found: Any) -> Any:
    """The condition of a write that replaces this version of the file, and no other."""
    return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for the user
        return str(os.getuid())
