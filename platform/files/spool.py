"""Spools: temporary files for what is too much for memory. They have no name, so that nothing is left behind."""

import os
import tempfile
from array import array


class Spool:
    """Texts or bytes that are kept in a temporary file, by number.

    Args:
        size: how many numbers there are.
    """

    def __init__(self, size: int) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed with the object
        self._starts, self._sizes = array("q", [-1]) * size, array("q", [0]) * size
        self._end = 0

    def __contains__(self, number: int) -> bool:
        return self._starts[number] >= 0

    def keep(self, number: int, content: bytes) -> None:
        """Keep the content of a number."""
        self._file.write(content)
        self._starts[number], self._sizes[number] = self._end, len(content)
        self._end += len(content)

    def read(self, number: int) -> bytes:
        """The content of a number that is kept. Several threads may read."""
        return os.pread(self._file.fileno(), self._sizes[number], self._starts[number])
