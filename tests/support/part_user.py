"""A process that holds parts of a folder at a store.

Its argument is the address. Lines of its input are `get` or `let` and numbers.
"""

import hashlib
import sys
from typing import Any

import numpy as np

from patchloom.platform.files.folder import Folder
from patchloom.platform.files.parts import CachedParts, PartList

COUNT, SIZE, CARD_SIZE = 12, 1000, 100
CONTENTS = [np.random.default_rng(number).bytes(SIZE) for number in range(COUNT)]


def opened(there: Folder, name: str = "parts") -> CachedParts:
    """The parts of a folder with `COUNT` parts and a card."""
    parts = CachedParts("kind", name, there, COUNT, lambda: {"card": CARD_SIZE})
    hashes = [hashlib.sha256(content).hexdigest() for content in CONTENTS]
    parts.list = PartList(np.full(COUNT, SIZE), lambda number: f"part-{number}", lambda number: hashes[number])
    return parts


def main() -> None:
    """Do what the lines of the input say; answer each with `done` and the number of files fetched so far."""
    fetched, fetch = 0, Folder.fetch_hashed

    def counted(*arguments: Any) -> tuple[int, str]:
        nonlocal fetched
        fetched += 1
        print("fetching", flush=True)
        return fetch(*arguments)

    Folder.fetch_hashed = counted  # type: ignore[method-assign, assignment]
    parts = opened(Folder(sys.argv[1]))
    for line in sys.stdin:
        action, *numbers = line.split()
        for number in map(int, numbers):
            if action == "let":
                parts.let_go(np.array([number]))
            else:
                parts.hold(np.array([number]))
                assert parts.get(number, lambda: False).read_bytes() == CONTENTS[number]
        print("done", fetched, flush=True)


if __name__ == "__main__":
    main()
