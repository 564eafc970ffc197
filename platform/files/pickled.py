"""Pickled data: dictionaries, lists, texts and arrays of plain numbers, read from a pickle without running it.

A pickle is a program that can call any function. Here it can call the four that build an array of NumPy, each
replaced by one that only keeps bytes, shape and type. Every other name is refused without importing it.
"""

import io
import math
import pickle
from typing import Any, cast

import numpy as np

from patchloom.pickles import scan_pickle

PLAIN_TYPES = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}
MOST_PICKLED_DIMENSIONS = 8


class PickledArray:
    """An array in a pickle. `values` is None until its state has come."""

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        """Take NumPy's state: version, shape, type, whether it is stored by columns, and bytes."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array has no shape and values")
        _, shape, kind, by_columns, content = state
        self.values = _array(content, kind, shape, "F" if by_columns else "C")


class _PickledType:
    """The type of the numbers of an array."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("latin1") if isinstance(name, bytes) else name
        if text not in PLAIN_TYPES:
            raise ValueError(f"values of type {str(text)[:40]!r} are refused: only plain numbers are read")
        self.name, self.order = str(text), "<"

    def __setstate__(self, state: object) -> None:
        """Take the byte order from NumPy's state of a type."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "="):
            raise ValueError("a type of numbers has no byte order")
        self.order = "<" if order in ("|", "=") else str(order)


def _array(content: object, kind: object, shape: object, order: object) -> np.ndarray:
    """An array over bytes, without a copy."""
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _PickledType) or order not in ("C", "F"):
        raise ValueError("an array is not made of bytes")
    if not isinstance(shape, tuple) or len(shape) > MOST_PICKLED_DIMENSIONS or not all(map(_is_length, shape)):
        raise ValueError("the shape of an array is not valid")
    values = np.frombuffer(content, np.dtype(f"{kind.order}{kind.name}"))
    if math.prod(shape) != values.size:
        raise ValueError(f"an array of {math.prod(shape):,} values has {values.size:,}")
    return values.reshape(shape, order=cast(Any, order))


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _empty_array(*_: object) -> PickledArray:
    return PickledArray()


def _buffer_array(content: object, kind: object, shape: object, order: object) -> PickledArray:
    found = PickledArray()
    found.values = _array(content, kind, shape, order)
    return found


def _number(kind: object, content: object) -> Any:
    return _array(content, kind, (1,), "C")[0].item()


def _encoded(text: object, encoding: object = "latin1") -> bytes:
    """Bytes as Python 3 writes them in old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise ValueError("bytes are not valid")
    return text.encode("latin1")


BUILDERS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _PickledType,
    ("_codecs", "encode"): _encoded,
    **{
        (f"numpy.{core}.{module}", name): builder
        for core in ("core", "_core")
        for module, name, builder in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _number),
            ("numeric", "_frombuffer", _buffer_array),
        )
    },
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The replacement of a name; raises ValueError for every other name."""
        if (module, name) not in BUILDERS:
            shown = f"{module}.{name}"[:200].encode("unicode_escape").decode()
            raise ValueError(f"it names {shown}, which no data needs: it is refused and nothing was run")
        builder = BUILDERS[module, name]
        return lambda *arguments: builder(*arguments)  # a new one each time: a file can leave nothing behind


def read_pickled(content: bytes) -> Any:
    """The value in a pickle of plain data, whose arrays are `PickledArray`. Texts of Python 2 are bytes.

    Raises:
        ValueError: it is not a complete pickle, takes more than data needs, or names anything else.
    """
    try:
        scan_pickle(io.BytesIO(content))
        return _DataUnpickler(io.BytesIO(content), encoding="bytes").load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
