"""Interleaved timing: all alternatives run in every round, so noise of the machine affects all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch

Work = Callable[[], float]  # does one piece of work and returns its number of units


@dataclass(frozen=True)
class Spread:
    """A number that was measured several times: the median and the quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Median and quartiles, with linear interpolation between the two nearest values."""
        ordered = sorted(values)
        last = len(ordered) - 1

        def quantile(share: float) -> float:
            below = int(share * last)
            above = min(below + 1, last)
            return ordered[below] + (share * last - below) * (ordered[above] - ordered[below])

        return Spread(median(ordered), quantile(0.25), quantile(0.75))

    def scaled(self, factor: float) -> "Spread":
        """The same measurement in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Timings:
    """Rates of each alternative by round: units per second of elapsed time, and units per second of CPU time."""

    wall_rates: dict[str, list[float]] = field(default_factory=dict)
    cpu_rates: dict[str, list[float]] = field(default_factory=dict)

    def rate(self, name: str) -> Spread:
        """Units per second of elapsed time."""
        return Spread.of(self.wall_rates[name])

    def seconds(self, name: str) -> Spread:
        """Elapsed seconds per unit."""
        return Spread.of([1 / rate for rate in self.wall_rates[name]])

    def ratio(self, name: str, other: str, *, cpu_time: bool = False) -> Spread:
        """How many times as fast one alternative is as another one in the same round."""
        rates = self.cpu_rates if cpu_time else self.wall_rates
        return Spread.of([rate / other_rate for rate, other_rate in zip(rates[name], rates[other], strict=True)])


def interleave(
    alternatives: Mapping[str, Work], rounds: int, warm_up: int = 1, say: Callable[[str], None] = lambda _: None
) -> Timings:
    """Run every alternative once per round, in alternating order.

    A drift within a round (heat, other processes) then affects all alternatives.

    Args:
        alternatives: what to run, by name.
        rounds: the number of rounds that count.
        warm_up: the number of rounds before them that do not count.
        say: called with one line of progress per round.

    Returns:
        The rates of each alternative.
    """
    timings = Timings({name: [] for name in alternatives}, {name: [] for name in alternatives})
    for number in range(-warm_up, rounds):
        say(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
        for name in list(alternatives)[:: 1 if number % 2 else -1]:
            wall_start, cpu_start = now(), time.process_time()
            units = alternatives[name]()
            seconds, cpu_seconds = now() - wall_start, time.process_time() - cpu_start
            if number >= 0:
                timings.wall_rates[name].append(units / seconds)
                timings.cpu_rates[name].append(units / max(cpu_seconds, 1e-9))
    return timings


def now() -> float:
    """Elapsed seconds, after a GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
