"""Versions: what must be equal in all processes of a command, so that they compute the same."""

import functools
import hashlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import patchloom
from patchloom.errors import UserError

LIBRARIES = ("torch", "ray", "numpy")
COMMAND = "the command"
INSTALL_ALIKE = "install the same versions on all nodes"


@dataclass(frozen=True)
class ProcessVersions:
    """The versions of one process.

    Args:
        place: where it runs, for messages.
        versions: the version by the name of the code.
    """

    place: str
    versions: Mapping[str, str]


def own_versions(place: str = "") -> ProcessVersions:
    """The versions of this process. The place starts with the name of the host."""
    return ProcessVersions(f"{socket.gethostname()}{f' ({place})' if place else ''}", _versions())


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "patchloom": f"{patchloom.__version__} ({_code_digest(Path(patchloom.__file__).parent)[:12]})",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{library: metadata.version(library) for library in LIBRARIES},
    }


def _code_digest(package: Path) -> str:
    """The sha256 of all Python files of the package: names and contents. `launch` sends the same function to nodes."""
    digest = hashlib.sha256()
    files = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    for path in sorted(path for path in files if path.suffix == ".py"):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_versions(processes: Sequence[ProcessVersions]) -> None:
    """Check that all processes have equal versions.

    Raises:
        UserError: a version differs; the message names each version with the places that have it.
    """
    problems = []
    for name in dict.fromkeys(name for process in processes for name in process.versions):
        places: dict[str, list[str]] = {}
        for process in processes:
            places.setdefault(process.versions.get(name, "missing"), []).append(process.place)
        if len(places) > 1:
            problems.append(f"{name} is " + " and ".join(f"{value} on {_some(at)}" for value, at in places.items()))
    if problems:
        raise UserError(f"the processes of this command differ: {'; '.join(problems)}: {INSTALL_ALIKE}")


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
