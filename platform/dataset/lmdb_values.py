"""LMDB: databases of encoded images, as those of LSUN, read through the package `lmdb` (the extra `lmdb`)."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.files.bounds import check_image_bytes, reading_damaged


class LmdbFile:
    """An open database. A process may have each file open once, so that readers share it.

    Args:
        path: its file, usually `data.mdb`.
        name: what the user gave, for messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        try:
            import lmdb
        except ImportError:
            raise UserError(f"{name} is an LMDB, which needs the package lmdb: pip install 'patchloom[lmdb]'") from None
        self.name = name
        with reading_damaged(name, "a complete LMDB"):
            self._file: Any = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
            pages, size_bytes = self._file.info()["last_pgno"] + 1, path.stat().st_size
            if size_bytes < pages * self._file.stat()["psize"]:  # reading beyond the end would kill the process
                self._file.close()
                raise ValueError(f"it has {size_bytes:,} bytes and not {pages:,} pages")

    def entries(self) -> Iterator[tuple[bytes, int]]:
        """Each key with the size of its value in bytes, in the order of the keys. Values are not read."""
        with reading_damaged(self.name, "a complete LMDB"), self._file.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                yield bytes(key), len(value)

    def value(self, key: bytes) -> bytes:
        """The value of a key, which is an encoded image; raises ValueError if there is none, or if it is too large."""
        with self._file.begin(buffers=True) as transaction:
            found = transaction.get(key)
            if found is None:
                raise ValueError("its key is not in the database")
            check_image_bytes(len(found))
            return bytes(found)


_opened: weakref.WeakValueDictionary[Path, LmdbFile] = weakref.WeakValueDictionary()


def lmdb_file(path: Path, name: str) -> LmdbFile:
    """The open database at a local path, which all readers of this process share."""
    found = _opened.get(path)
    if found is None:
        found = _opened[path] = LmdbFile(path, name)
    return found
