"""Paired: ways of doing one thing, timed in turns, so that a noisy machine is as noisy for each of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch

Work = Callable[[], float]  # does a piece of work and says how many units it was


@dataclass(frozen=True)
class Spread:
    """A number that was measured several times: its median, and the middle half of what was seen."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Median and quartiles; of a few values the quartiles lie between the nearest two."""
        ordered = sorted(values)
        last = len(ordered) - 1

        def at(share: float) -> float:
            below = int(share * last)
            above = min(below + 1, last)
            return ordered[below] + (share * last - below) * (ordered[above] - ordered[below])

        return Spread(median(ordered), at(0.25), at(0.75))


@dataclass(frozen=True)
class Turns:
    """What each way did in each round: units a second, and units a second of a core's own time."""

    by_clock: dict[str, list[float]] = field(default_factory=dict)
    by_core: dict[str, list[float]] = field(default_factory=dict)

    def rate(self, way: str) -> Spread:
        """Units a second by the clock."""
        return Spread.of(self.by_clock[way])

    def seconds(self, way: str) -> Spread:
        """Seconds a unit by the clock."""
        return Spread.of([1 / rate for rate in self.by_clock[way]])

    def ratio(self, way: str, other: str, *, of_core: bool = False) -> Spread:
        """How many times as fast a way is as another one of the same round."""
        rates = self.by_core if of_core else self.by_clock
        return Spread.of([one / two for one, two in zip(rates[way], rates[other], strict=True)])


def in_turns(
    ways: Mapping[str, Work], rounds: int, warm_up: int = 1, say: Callable[[str], None] = lambda _: None
) -> Turns:
    """Do each way's work once a round, in an order that turns round every time; the first rounds do not count.

    What drifts while a round lasts (heat, neighbours) then falls on all ways alike. say: told of each round.
    """
    turns = Turns({way: [] for way in ways}, {way: [] for way in ways})
    for number in range(-warm_up, rounds):
        say(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
        for way in list(ways)[:: 1 if number % 2 else -1]:
            clock, core = now(), time.process_time()
            units = ways[way]()
            seconds, core_seconds = now() - clock, time.process_time() - core
            if number >= 0:
                turns.by_clock[way].append(units / seconds)
                turns.by_core[way].append(units / max(core_seconds, 1e-9))
    return turns


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
