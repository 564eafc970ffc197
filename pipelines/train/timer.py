"""The timer of a run: how long a worker waited, and for what."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Returned = TypeVar("Returned")


class WaitTimer:
    """Measures waits by name, on the clock of the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waits: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        """The current time of the device. Does not wait for a GPU."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        return time.perf_counter()

    def seconds_between(self, before: Any, after: Any) -> float:
        """Seconds between two marks. A GPU must have reached both."""
        return float(before.elapsed_time(after)) / 1000 if self.device.type == "cuda" else after - before

    def timed(self, name: str, function: Callable[..., Returned]) -> Callable[..., Returned]:
        """A function that does the same and counts its time as `name`."""

        def counted(*arguments: Any) -> Returned:
            start = self.mark()
            try:
                return function(*arguments)
            finally:
                self._waits[name].append((start, self.mark()))

        return counted

    def take(self, name: str) -> list[float]:
        """Seconds of each wait since the last call, in order. A GPU must be synchronised."""
        waits, self._waits[name] = self._waits[name], []
        return [self.seconds_between(*wait) for wait in waits]
