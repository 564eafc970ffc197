"""The journal of a working copy: what the store has of it, so that work that was never sent can be told apart."""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import write_json

JOURNAL_FILE = ".sent.json"
JOURNAL_FORMAT = 1
Stamp = tuple[int, int]  # size in bytes and time of modification in ns
LOG_FOLDER = "logs"  # of the workers of a run
NOT_SENT: Stamp = (-1, -1)


@dataclass
class Journal:
    """What the store has of a working copy.

    Args:
        copy_id: identity of the copy.
        sent: the stamp of each file when it was sent or fetched.
    """

    copy_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    sent: dict[str, Stamp] = field(default_factory=dict)

    @staticmethod
    def read(here: Path) -> "Journal":
        """The journal of a copy. Without one, or with a damaged one, nothing is known to be sent."""
        try:
            content = json.loads((here / JOURNAL_FILE).read_bytes())
            return Journal(
                str(content["copy_id"]), {name: (int(a), int(b)) for name, (a, b) in content["sent"].items()}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Journal()

    def write(self, here: Path) -> None:
        """Write the journal atomically."""
        write_json(here / JOURNAL_FILE, {"format_version": JOURNAL_FORMAT, "copy_id": self.copy_id, "sent": self.sent})

    def unsent(self, here: Path) -> list[str]:
        """The files of a copy that the store does not have in this state, sorted."""
        return [name for name, stamp in stamps_of(here).items() if self.sent.get(name) != stamp]


def has_unsent(here: Path) -> bool:
    """Whether a working copy contains work that was written here and never sent."""
    return (here / JOURNAL_FILE).is_file() and bool(Journal.read(here).unsent(here))


def stamps_of(here: Path) -> dict[str, Stamp]:
    """The stamps of the files of a local folder that are not hidden, sorted by name."""
    stamps = {}
    for name in Folder(str(here)).files():
        if not is_hidden_name(name):
            try:
                status = (here / name).stat()
            except FileNotFoundError:  # a checkpoint that was removed just now
                continue
            stamps[name] = (status.st_size, status.st_mtime_ns)
    return stamps


def is_hidden_name(name: str) -> bool:
    """Whether a file is not copied: a hidden one, or a log, which each worker sends itself."""
    return name.startswith(f"{LOG_FOLDER}/") or any(part.startswith(".") for part in name.split("/"))
