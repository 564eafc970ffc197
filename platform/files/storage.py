"""Local files and folders: atomic writes, JSON, and locks between processes."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from patchloom.errors import UserError
from patchloom.redaction import redacted

MAX_NAME_BYTES = 255  # of a file or folder, on all common file systems
WRITE_PIECE_BYTES = 1 << 18  # for larger writes Linux uses large pages, which are slow to get on a virtual machine


def local_path(text: str | os.PathLike[str]) -> Path:
    """An absolute local path; raises UserError for a remote address and for what cannot be a path."""
    name = os.fspath(text)
    if "://" in name and not name.startswith("file://"):
        raise UserError(
            f"{name} is a remote address, and this must be a local path: mount it, or copy it to this machine"
        )
    path = Path(name.removeprefix("file://")).expanduser().absolute()
    if "\0" in name or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise UserError(f"{name[:80]!r}... is not a path: a name in it has more than {MAX_NAME_BYTES} bytes or a NUL")
    return path


def existing_file(text: str) -> Path | None:
    """The file that a text names, for options that take a word or a path; None if the text is only a word."""
    try:
        path = Path(text).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long for a name, a NUL, or the home of an unknown user
        return None


def whole_number(text: str) -> int | None:
    """The number that a text of ASCII digits writes; None for other texts, such as "²" and "-1"."""
    return int(text) if re.fullmatch("[0-9]{1,4000}", text) else None


def make_folder(path: Path) -> Path:
    """Create a folder and its parents; raises UserError if that fails or the folder cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be created ({error.strerror}): choose another folder") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written (permission denied): choose another folder")
    return path


def write_atomic(path: Path, content: Any, sync: bool = True) -> None:
    """Write a file so that readers see the old content or the new content, never a part of it.

    Args:
        path: the file.
        content: text, which is written without secrets, or bytes.
        sync: also wait until the file survives a power failure. Not needed for files with a stored checksum.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            data = memoryview(redacted(content).encode() if isinstance(content, str) else content)
            for first in range(0, len(data), WRITE_PIECE_BYTES):
                file.write(data[first : first + WRITE_PIECE_BYTES])
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, with the keys in the given order."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text; raises ValueError if it is damaged, or nested deeper than Python can read."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_object(content: bytes | str) -> dict[str, Any]:
    """The value of a JSON text that is an object; raises ValueError otherwise."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__} and no object")
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file; raises UserError if it is damaged."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): remove it or restore it") from None


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file, without an incomplete last line and empty lines; empty if there is no file."""
    return whole_lines(path.read_bytes() if path.is_file() else b"")


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of the content of a file, without an incomplete last line and empty lines."""
    return [line for line in content[: content.rfind(b"\n") + 1].splitlines() if line]


def each_json_line(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, without an incomplete last line; none if there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.strip() and line.endswith(b"\n"):
                try:
                    yield parse_json_object(line)
                except ValueError as error:
                    raise UserError(
                        f"{path} has a damaged line ({error}): remove the line or restore the file"
                    ) from None


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole."""
    write_atomic(path, json_lines(rows))


def json_lines(rows: list[dict[str, Any]]) -> str:
    """The content of a JSON-lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` at the end of the block, or is removed if the block raises.

    What a user has put into the old folder moves into the new one. After a kill in between, it is in the old folder,
    which then has a name that ends in `.replaced` and is never removed.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if not path.exists():
            partial.rename(path)
            return
        replaced = partial.with_suffix(".replaced")
        path.rename(replaced)
        partial.rename(path)
        for name in {entry.name for entry in replaced.iterdir()} - {entry.name for entry in path.iterdir()}:
            (replaced / name).rename(path / name)
        shutil.rmtree(replaced)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_own_partial(name: str) -> bool:
    """Whether a name is a temporary one of `write_atomic` or `whole_folder`."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.partial", name) is not None


def sweep_partial(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder of ours that this process has locked."""
    for leftover in folder.glob(".*.partial"):
        if not is_own_partial(leftover.name) or leftover.is_symlink():
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
    """Lock a folder during the block. The lock ends with the process.

    Args:
        folder: the folder.
        name: name of the lock file in it.
        wait_s: how long to wait for another process.

    Raises:
        UserError: another process has the lock.
    """
    handle: IO[str] = (folder / name).open("a")
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"{folder} is used by another process: wait until it ends, or choose another folder"
                    ) from None
                time.sleep(0.2)
        yield
    finally:
        handle.close()


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
