"""Storage: folders and files that are written whole or not at all, and locks that keep others out."""

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from patchloom.errors import UserError

PIECE_BYTES = 1 << 18  # of more at once Linux fills large pages, which a virtual machine may have to get from its host


def local_path(text: str | os.PathLike[str]) -> Path:
    """An absolute local path; refuses a remote URI in words."""
    name = os.fspath(text)
    if "://" in name and not name.startswith("file://"):
        raise UserError(f"{name} is a remote address, and folders are local in this version: mount it or copy it here")
    return Path(name.removeprefix("file://")).expanduser().absolute()


def make_folder(path: Path) -> Path:
    """Make a folder and its parents, or say why that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): choose a folder that can be written") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written (permission denied): choose another folder")
    return path


def write_atomic(path: Path, content: Any, sync: bool = True) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    sync: wait until it would outlive a power cut too; not needed for one of many files whose checksums are kept.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            whole = memoryview(content.encode() if isinstance(content, str) else content)
            for first in range(0, len(whole), PIECE_BYTES):
                file.write(whole[first : first + PIECE_BYTES])
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, with a stable order of keys as given."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, or say which one is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove it or restore it") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # what follows the last newline was never finished
    try:
        return [json.loads(line) for line in whole.splitlines() if line]
    except ValueError as error:
        raise UserError(f"{path} has a damaged line ({error}): remove that line or restore the file") from None


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends well, and is removed when not."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep_partial(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that this process has locked."""
    for leftover in folder.glob(".*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process; the lock falls with the process, however it ends."""
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
                        f"{folder} is in use by another process: wait for it, or choose another folder"
                    ) from None
                time.sleep(0.2)
        yield
    finally:
        handle.close()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
