"""An actor for tests of `map_on_actors`; a module of its own, because the processes of Ray import it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Number:
    """An item."""

    value: int


@dataclass(frozen=True)
class Square:
    """A result, and the process that computed it."""

    value: int
    process: int


class Squares:
    """Squares numbers. It dies once at the number 3 if it is given a file to remember that."""

    def __init__(self, died: Path | None) -> None:
        self.died = died

    def __call__(self, item: Number, report: Callable[[int], None]) -> Square:
        """The square of an item; reports its value as done."""
        if item.value == 3 and self.died is not None and not self.died.exists():
            self.died.touch()
            os._exit(1)
        report(item.value)
        return Square(item.value**2, os.getpid())
