"""Remote shards: those of a dataset at a store, fetched into the bounded cache of the node as a run needs them."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchloom.platform.files.parts import BUSY_PAUSE_S, FULL_PAUSE_S, CachedParts, PartState

FETCHES_AT_ONCE = 4
IDLE_S = 0.5


@dataclass(frozen=True)
class ShardsInNeed:
    """Shards that a run needs at about the same time.

    Args:
        numbers: (n,) int64, the shards, which are kept here.
        order: the shards in the order in which the run needs them; computed as they are fetched.
    """

    numbers: np.ndarray
    order: Iterator[int]


class RemoteShards:
    """The shards of a remote dataset on this node: `ShardFiles` for a `ShardReader`.

    Args:
        parts: the shards in the cache, by their numbers.
    """

    are_verified = True

    def __init__(self, parts: CachedParts) -> None:
        self.parts = parts
        self.forget: Callable[[Iterable[int]], None] = lambda _: None  # closes the maps of shards
        self._open: Counter[int] = Counter()  # shards that are mapped or about to be, in the order of their opening
        self._released: deque[int] = deque()
        self._needed: list[ShardsInNeed] = []
        self._again: deque[int] = deque()  # shards that another process is fetching
        self._mutex = threading.RLock()
        self._ended: threading.Event | None = None  # of the threads that fetch, once they are started

    def path_of(self, number: int) -> Path:
        """The file of a shard. It is fetched if it is not here, and stays until the call of `release`.

        Raises:
            UserError: it cannot be fetched, or it is damaged at the store.
        """
        self._end_holds()
        self.parts.hold(np.array([number]))
        with self._mutex:
            self._open[number] += 1
        try:
            return self.parts.get(number, self._give_up)
        except BaseException:
            self.release(number)
            raise

    def release(self, number: int) -> None:
        """The reader has closed the file. Does not wait: a garbage collection may call it anywhere."""
        self._released.append(number)

    def need(self, stages: Sequence[ShardsInNeed]) -> None:
        """Fetch these shards in the background and keep them here, those of earlier stages first.

        The shards of the previous call that are not among them are let go, and their maps are closed.
        """
        with self._mutex:
            for stage in stages:
                self.parts.hold(stage.numbers)
            before, self._needed = self._needed, list(stages)
            self._again.clear()
        for stage in before:
            self.parts.let_go(stage.numbers)
        self.forget(self._unneeded())
        self._end_holds()
        if self._ended is None:
            self._ended = threading.Event()
            for _ in range(FETCHES_AT_ONCE):
                threading.Thread(target=self._fetch, args=(self._ended,), daemon=True).start()
        self.parts.notify()

    def missing_bytes(self, numbers: np.ndarray) -> int:
        """The size of those of these shards that are not here."""
        return sum(self.parts.size(number) for number in numbers.tolist() if not self.parts.is_here(number))

    def close(self) -> None:
        """Stop to fetch in the background after what is under way, and let all shards go that are not open."""
        if self._ended is not None:
            self._ended.set()  # nothing waits for the threads: a store may not answer
            self._ended = None
        with self._mutex:
            before, self._needed = self._needed, []
        for stage in before:
            self.parts.let_go(stage.numbers)
        self._end_holds()

    def _fetch(self, ended: threading.Event) -> None:
        """Fetch what is needed, until the end. Errors are raised by the reader, when it needs the shard."""
        while not ended.is_set():
            number = self._next()
            if number is None:
                self._end_holds()
                self.parts.wait(IDLE_S)
                continue
            self.parts.hold(np.array([number]))
            while (state := self.parts.attempt(number)) is PartState.FULL and self._is_needed(number):
                self._end_holds()
                self.parts.wait(FULL_PAUSE_S)
            self.parts.let_go(np.array([number]))
            if state is PartState.BUSY:
                with self._mutex:
                    self._again.append(number)
                self.parts.wait(BUSY_PAUSE_S)

    def _next(self) -> int | None:
        """The next shard to fetch; None if all are here."""
        with self._mutex:
            for stage in self._needed:
                for number in stage.order:
                    if not self.parts.is_here(number):
                        return number
            while self._again:
                number = self._again.popleft()
                if self._is_needed(number):
                    return number
        return None

    def _is_needed(self, number: int) -> bool:
        with self._mutex:
            return any(number in stage.numbers for stage in self._needed)

    def _unneeded(self) -> list[int]:
        """Shards that are open and not needed."""
        self._end_holds()
        with self._mutex:
            return [number for number in self._open if not self._is_needed(number)]

    def _give_up(self) -> bool:
        """Let shards go, those first that the run needs last; returns False if that is not possible."""
        self.forget(self._unneeded())
        if self._end_holds():
            return True
        with self._mutex:
            last = self._needed.pop() if self._needed else None
        if last is not None:
            self.parts.let_go(last.numbers)
            return True
        return False

    def _end_holds(self) -> bool:
        """Let shards go that the reader has closed; returns whether there were any."""
        ended = False
        while self._released:
            try:
                number = self._released.popleft()
            except IndexError:  # another thread was faster
                break
            with self._mutex:
                self._open[number] -= 1
                if not self._open[number]:
                    del self._open[number]
            self.parts.let_go(np.array([number]))
            ended = True
        return ended
