"""References: registered versions whose files stay in an object store, fetched from there and checked."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.cache import cache_folder, cached_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.inside import inner_name
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.records.reference import StoredFile, StoredModel
from patchloom.redaction import redacted

_kept: dict[Path, tuple[int, Path]] = {}  # this process keeps the copies that it fetched


def stored_model(address: str, folder: Path) -> StoredModel:
    """The record of a model folder in an object store.

    Args:
        address: the folder in the store.
        folder: a copy of it on this machine.
    """
    files = {
        name: StoredFile(size_bytes=size, sha256=file_sha256(folder / name))
        for name, size in sorted(Folder(str(folder)).files().items())
    }
    return StoredModel(address=redacted(address), files=files)


def fetch_stored(stored: StoredModel) -> Path:
    """Fetch the files of a model into the cache of this node.

    Raises:
        UserError: a file is gone or was changed, or the store does not answer.
    """
    there = Folder.at(stored.address)
    if not there.is_remote:
        raise UserError(f"{there}, which a registered version refers to, is not in an object store: register it again")

    def fill(folder: Path) -> None:
        for name, file in stored.files.items():
            _fetch_checked(there, inner_name(name, there), file, folder)

    return kept_copy(stored.to_json(), sum(file.size_bytes for file in stored.files.values()), fill)


def kept_copy(identity: str, size_bytes: int, fill: Callable[[Path], object]) -> Path:
    """A copy of a model in the cache of this node, filled once for all processes, and kept until this one ends.

    Args:
        identity: a text that is another one for other files.
        size_bytes: their size.
        fill: writes the files into the folder.
    """
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    place = cache_folder("models") / key
    if place not in _kept:
        _kept[place] = cached_copy("models", key, size_bytes, fill)
    return _kept[place][1]


def _fetch_checked(there: Folder, name: str, file: StoredFile, folder: Path) -> None:
    what = f"{there}/{name}"
    try:
        there.fetch(name, folder / name)
    except FileNotFoundError:
        raise UserError(
            f"{what}, which a registered version refers to, is gone: restore it, or register the model again"
        ) from None
    found = file_sha256(folder / name)
    if found != file.sha256:
        raise UserError(
            f"{what} was changed after a version was registered that refers to it (sha256 {found[:12]}, not "
            f"{file.sha256[:12]}): restore it, or register the model again"
        )
