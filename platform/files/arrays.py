"""Arrays: `.npy` and `.npz` from elsewhere, read within bounds. What is damaged raises ValueError, whatever it is."""

import io
import math
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

MAGIC = b"\x93NUMPY"
MOST_NPY_HEADER_BYTES = 10_000  # as NumPy's own limit, which it checks after reading
ARRAY_PIECE_BYTES = 1 << 23
MOST_ARRAY_BYTES = 1 << 30  # of an array that is read whole


@dataclass(frozen=True)
class ArrayHeader:
    """The start of a `.npy`: its shape, its type, and whether it is stored column by column."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_columns: bool

    @property
    def row_bytes(self) -> int:
        """The size of an entry along the first axis."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def size_bytes(self) -> int:
        """The size of all values."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_array_header(file: IO[bytes]) -> ArrayHeader:
    """Read the header of a `.npy`, which ends at the first value; raises ValueError for what is no plain array."""
    start = file.read(8)
    if len(start) < 8 or start[:6] != MAGIC:
        raise ValueError("it is not an array of NumPy")
    length = file.read(2 if start[6] == 1 else 4)
    size = int.from_bytes(length, "little")
    if size > MOST_NPY_HEADER_BYTES:
        raise ValueError(f"its header has {size:,} bytes")
    read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
    try:
        shape, by_columns, dtype = read(io.BytesIO(length + file.read(size)))
    except Exception as error:  # NumPy evaluates a Python literal here, which raises many types
        raise ValueError(f"its header is damaged ({' '.join(str(error).split())[:200]})") from None
    if dtype.hasobject or dtype.itemsize == 0 or dtype.subdtype is not None:
        raise ValueError(f"it has values of type {str(dtype)[:80]} and not numbers or texts")
    if any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"its shape is {str(shape)[:80]}")
    return ArrayHeader(tuple(shape), dtype, bool(by_columns))


def read_values(file: IO[bytes], header: ArrayHeader, most_bytes: int = MOST_ARRAY_BYTES) -> np.ndarray:
    """The values after a header, whole; raises ValueError if they are too many or incomplete."""
    if header.size_bytes > most_bytes:
        raise ValueError(f"it has {header.size_bytes:,} bytes, and at most {most_bytes:,} are read")
    content = bytearray()  # grows with what is there, whatever the header claims
    while len(content) < header.size_bytes:
        piece = file.read(min(ARRAY_PIECE_BYTES, header.size_bytes - len(content)))
        if not piece:
            raise ValueError("it ends early")
        content += piece
    values = np.frombuffer(content, header.dtype)
    return values.reshape(header.shape[::-1]).T if header.by_columns else values.reshape(header.shape)


def read_array(content: bytes, most_bytes: int = MOST_ARRAY_BYTES) -> np.ndarray:
    """The array of a `.npy` file; raises ValueError if it is damaged or too large."""
    file = io.BytesIO(content)
    return read_values(file, read_array_header(file), most_bytes)


def read_arrays(file: IO[bytes], names: tuple[str, ...], most_bytes: int = MOST_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """Those of some arrays that an `.npz` contains, by name, whole.

    Args:
        file: the `.npz`.
        names: the arrays that are wanted.
        most_bytes: for each one.

    Raises:
        ValueError: the file is damaged, or an array is too large or of Python objects.
    """
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in names:
                if f"{name}.npy" in archive.NameToInfo:
                    with archive.open(f"{name}.npy") as member:
                        found[name] = read_values(member, read_array_header(member), most_bytes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return found
