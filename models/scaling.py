"""Scaling: the time of a step on N workers, estimated from the time of crops and of the all-reduce."""

from collections.abc import Mapping
from dataclasses import dataclass

from patchloom.models.patches import PatchSchedule


@dataclass(frozen=True)
class Workers:
    """Workers and the links between them.

    Args:
        count: number of workers.
        bytes_per_second: bandwidth of the slowest link of the ring, in one direction.
        latency_s: latency of a message.
        processors: workers that can compute at once, if they share processors. Default: all.
    """

    count: int
    bytes_per_second: float
    latency_s: float = 0.0
    processors: int | None = None

    def reduce_seconds(self, gradient_bytes: float) -> float:
        """Seconds of a ring all-reduce: 2 (N - 1) messages of 1/N of the gradients (Patarasuk and Yuan 2009)."""
        messages = 2 * (self.count - 1)
        return messages * (gradient_bytes / self.count / self.bytes_per_second + self.latency_s)

    @property
    def crowding(self) -> float:
        """The slow-down of workers that share processors."""
        return max(1.0, self.count / (self.processors or self.count))


def expected_slowest(costs: Mapping[float, float], draws: int) -> float:
    """The mean of the largest of several independent draws.

    E[max] = sum of c (F(c)^n - F(below c)^n), where F(c) is the probability of a cost of c or less.

    Args:
        costs: probability of each cost.
        draws: number of draws n.
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
    """The mean seconds of a step, with the all-reduce of the gradients.

    With the draws "shared" and "stratified" a step costs the mean. With "independent" it waits for the slowest worker;
    if the workers share processors, it takes at least the time of all work.

    Args:
        schedule: the patch sizes.
        draw: "shared", "stratified" or "independent".
        batch_of_worker: full-size images per step and worker.
        seconds_of_crop: by patch size in pixels, for a worker with a processor of its own.
        gradient_bytes: size of the gradients.
        workers: the workers.
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
    """Counted images (crops) of all workers per second, if a step takes `seconds`."""
    return batch_of_worker * schedule.mean_multiplier * workers.count / seconds
