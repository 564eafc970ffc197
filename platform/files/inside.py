"""Inside: names from cards, manifests, archives, listings and checkpoints, none of which leaves its folder.

Other people may have made these files, so that every name in them is checked here before it becomes a path.
"""

import os
import re
import stat
from pathlib import Path

from patchloom.errors import UserError

DRIVE = re.compile(r"[A-Za-z]:[\\/]")
SHOWN_NAME = 120  # characters of a name in a message


def inner_name(name: str, place: object) -> str:
    """The name of a file below a folder: relative, with slashes.

    Args:
        name: the relative path.
        place: what has this name, for the error message.

    Raises:
        UserError: the name is absolute, has a drive letter, a NUL or an empty part, or leaves its folder by `..`.
    """
    if "" in name.split("/") or ".." in re.split(r"[/\\]", name) or "\0" in name or DRIVE.match(name):
        shown = name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}..."
        raise UserError(f"{place} names the file {shown!r}, which is outside of its folder: use a relative path")
    return name


def inner_path(folder: Path, name: str, place: object) -> Path:
    """The path of a file that a table, card or line names. The file may be missing.

    Args:
        folder: where the file must be.
        name: the relative path.
        place: what has this name, for the error message.

    Raises:
        UserError: as in `inner_name`, or a link leads out of the folder, or the path is not that of a regular file.
    """
    path = folder / inner_name(name, place)
    check_links(folder, path, place)
    if path.exists() and not path.is_file():
        raise UserError(f"{place} names {name!r}, which is not a regular file: remove it")
    return path


def check_links(folder: Path, path: Path, place: object) -> None:
    """Raise UserError if a link leads from a path below a folder out of that folder."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        name = path.relative_to(folder)
        raise UserError(f"{place}: {name} leads out of {folder} by a link: replace the link by the file")


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file; raises OSError. Reading a pipe would wait, and a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor
