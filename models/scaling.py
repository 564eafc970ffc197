"""Scaling: how long a step takes on N workers, foretold from what crops cost and how gradients travel."""

from collections.abc import Mapping
from dataclasses import dataclass

from patchloom.models.patches import PatchSchedule


@dataclass(frozen=True)
class Workers:
    """As many workers, and the links between them.

    bytes_per_second: what the slowest link of the ring carries, one way. latency_s: of one message. processors:
    how many of them can work at once, where they share cores; all by default.
    """

    count: int
    bytes_per_second: float
    latency_s: float = 0.0
    processors: int | None = None

    def reduce_seconds(self, gradient_bytes: float) -> float:
        """A ring all-reduce: 2 (N - 1) messages of 1/N of the gradients (Patarasuk and Yuan 2009)."""
        messages = 2 * (self.count - 1)
        return messages * (gradient_bytes / self.count / self.bytes_per_second + self.latency_s)

    @property
    def crowding(self) -> float:
        """How many times as long work takes where workers share processors."""
        return max(1.0, self.count / (self.processors or self.count))


def expected_slowest(costs: Mapping[float, float], draws: int) -> float:
    """The mean of the largest of `draws` independent draws; costs: the probability of each cost.

    E[max] = sum of c (F(c)^n - F(below c)^n), with F the share of draws that cost c or less.
    """
    mean, reached = 0.0, 0.0
    for cost in sorted(costs):
        below, reached = reached, min(1.0, reached + costs[cost])
        mean += cost * (reached**draws - below**draws)
    return mean


def step_seconds(
    schedule: PatchSchedule,
    draw: str,
    batch_of_worker: int,
    seconds_of_crop: Mapping[int, float],
    gradient_bytes: float,
    workers: Workers,
) -> float:
    """The mean seconds of a step on these workers, gradients reduced once all have theirs.

    batch_of_worker: full-size images of a worker's step; smaller crops come in multiples of it.
    seconds_of_crop: by patch size in pixels, of a worker that has a processor to itself. draw: "shared" and
    "stratified" steps cost their mean on every worker; with "independent" ones each step waits for the
    slowest worker, and where workers share processors, at least for all their work.
    """
    costs: dict[float, float] = {}
    for size in schedule.sizes:
        cost = batch_of_worker * size.batch_multiplier * seconds_of_crop[size.pixels]
        costs[cost] = costs.get(cost, 0.0) + size.probability
    mean = sum(cost * share for cost, share in costs.items()) * workers.crowding
    if draw == "independent":
        mean = max(mean, expected_slowest(costs, workers.count))
    return mean + workers.reduce_seconds(gradient_bytes)


def images_per_second(schedule: PatchSchedule, batch_of_worker: int, workers: Workers, seconds: float) -> float:
    """Counted images (crops) of all workers a second, at so many seconds a step."""
    return batch_of_worker * schedule.mean_multiplier * workers.count / seconds
