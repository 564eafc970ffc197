"""Outputs: what a command may write: a new folder or file, or one that an earlier call of the same command wrote."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import is_own_partial

# locks of earlier calls, and what systems and version control leave in folders; none of it is changed or removed
IGNORED_NAMES = frozenset({
    ".lock", ".worker.lock", ".copy.lock", ".fence.json", ".writer.json", ".sent.json", ".DS_Store", ".gitkeep",
    ".gitignore", ".keep",
})  # fmt: skip
NAMED_FILES = 3  # of what was found, in a message


def check_output_folder(folder: Folder, noun: str, card: str, before: Mapping[str, str] | None = None) -> None:
    """Raise UserError unless a folder is missing or empty, or has the card of an earlier call of the same command.

    Locks count as nothing, and so do temporary files of a call that was killed before it had written its card.

    Args:
        folder: the folder that a command is about to write.
        noun: what the command writes, for the message.
        card: the name of its card. The caller compares what is in it.
        before: texts by name of the files that the command writes before its card.
    """
    if not folder.is_remote and folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder} is a file: choose a new or empty folder")
    if folder.has(card):
        return
    expected = {name: text.encode() for name, text in (before or {}).items()}
    found: list[str] = []
    for name in _entries(folder):
        if name in IGNORED_NAMES or _target_of(name) in (card, *expected):
            continue
        if name in expected and folder.read(name) == expected[name]:
            continue
        found.append(name)
        if len(found) > NAMED_FILES:
            break
    if found:
        names = ", ".join(found[:NAMED_FILES]) + (", ..." if len(found) > NAMED_FILES else "")
        raise UserError(f"{folder} is not empty and contains no {noun} (found {names}): choose a new or empty folder")


def _target_of(name: str) -> str:
    """The file that a temporary file of a killed call was to become."""
    parent, slash, base = name.rpartition("/")
    return f"{parent}{slash}{base[1:].rpartition('.partial')[0].rpartition('.')[0]}" if is_own_partial(base) else ""


def _entries(folder: Folder) -> Iterator[str]:
    """The names of everything in a folder that is not a folder itself: also links, pipes and hidden files."""
    if folder.is_remote:
        yield from folder.files()
    else:
        yield from _local_entries(folder.path, "")


def _local_entries(path: Path, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            inner = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path} cannot be listed ({error.strerror}): choose another folder") from None
    for name, is_folder in inner:
        if is_folder:
            yield from _local_entries(path / name, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}"


def check_new_file(folder: Folder, name: str, noun: str, is_ours: Callable[[bytes], bool]) -> None:
    """Raise UserError if a file exists that the same command did not write.

    Args:
        folder: the folder of the file.
        name: its name.
        noun: what the command writes, for the message.
        is_ours: whether content was written by the command.
    """
    if not folder.is_remote and not folder.path.is_dir():
        return
    if folder.has(name) and not is_ours(folder.read(name)):
        raise UserError(f"{folder}/{name} exists and is no {noun}: choose another name, or remove it")
