"""Inputs of a preparation, as lines of JSON: listed once, kept in a temporary file, read again for the shards."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import Protocol

from patchloom.platform.records.prepare import PreparedInput, input_lines


class InputLines(Protocol):
    """The lines of the inputs of a preparation, in order. There may be millions, so they are read one by one."""

    def __len__(self) -> int:
        """The number of inputs."""

    def __iter__(self) -> Iterator[bytes]:
        """Each input as a line of JSON, with its line break."""


class KeptLines:
    """Inputs in a temporary file. They can be read when all have been written, by one reader at a time."""

    def __init__(self, inputs: Iterable[PreparedInput]) -> None:
        self._file, self._size = tempfile.TemporaryFile(), 0  # noqa: SIM115 closed with the object
        for one in inputs:
            self._file.write(input_lines([one]))
            self._size += 1

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        yield from self._file


class DatasetLines:
    """The rows of a prepared dataset as inputs."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[bytes]:
        return (b'{"place":[%d]}\n' % row for row in range(self._rows))


class MirroredLines:
    """Inputs, with a mirror image after each one."""

    def __init__(self, lines: InputLines) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return 2 * len(self._lines)

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            yield line
            yield line[: line.rindex(b"}")] + b',"mirror":true}\n'
