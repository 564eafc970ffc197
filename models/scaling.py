"""Scaling: the time of a step on N workers, estimated from the time of crops and of the all-reduce."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from patchloom.models.patches import PatchSchedule

# of the computation of a step: the FLOPs of the backward pass are twice those of the forward pass
BACKWARD_SHARE = 2 / 3


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

    def reduce_seconds(self, gradient_bytes: float, buckets: int = 1) -> float:
        """Seconds of all-reduces: the bandwidth of a ring, the latency of two binary trees.

        A ring sends 1/N of the gradients 2 (N - 1) times (Patarasuk and Yuan 2009). NCCL's two trees need about the
        same time for many bytes, and log2(N) messages up and down for few (Sanders, Speck and Träff 2009).
        """
        sent = 2 * (self.count - 1) / self.count * gradient_bytes
        return sent / self.bytes_per_second + buckets * 2 * math.ceil(math.log2(self.count)) * self.latency_s

    @property
    def crowding(self) -> float:
        """The slow-down of workers that share processors."""
        return max(1.0, self.count / (self.processors or self.count))


def expected_slowest(costs: Mapping[float, float], draws: int) -> float:
    """The mean of the largest of several independent draws.

    Args:
        costs: probability of each cost.
        draws: number of draws n.
    """
    return sum(cost * share for cost, share in _slowest(costs, draws).items())


def _slowest(costs: Mapping[float, float], draws: int) -> dict[float, float]:
    """The probability of each cost to be the largest of n draws: F(c)^n - F(below c)^n, F(c) that of c or less."""
    shares, reached = {}, 0.0
    for cost in sorted(costs):
        below, reached = reached, min(1.0, reached + costs[cost])
        shares[cost] = reached**draws - below**draws
    return shares


def waiting_seconds(reduce_s: float, backward_s: float, buckets: int) -> float:
    """Seconds that a step waits for its gradients after the backward pass.

    Buckets of equal size that are ready at equal intervals: either the last one is sent after the backward pass, or
    sending never pauses once the first one is ready.

    Args:
        reduce_s: seconds of the sums of all buckets.
        backward_s: seconds of the backward pass.
        buckets: number of buckets; with one, nothing overlaps.
    """
    return max(reduce_s / buckets, reduce_s - backward_s * (buckets - 1) / buckets)


def step_seconds(
    schedule: PatchSchedule,
    draw: str,
    batch_of_worker: int,
    seconds_of_crop: Mapping[int, float],
    gradient_bytes: float,
    workers: Workers,
    buckets: int = 1,
) -> float:
    """The mean seconds of a step, with the all-reduce of the gradients.

    With the draws "shared" and "stratified" a step costs the mean. With "independent" it waits for the slowest worker;
    if the workers share processors, it takes at least the time of all work. The all-reduce overlaps the backward pass
    of the last group of crops: the only one, or the smallest size with "stratified".

    Args:
        schedule: the patch sizes.
        draw: "shared", "stratified" or "independent".
        batch_of_worker: full-size images per step and worker.
        seconds_of_crop: by patch size in pixels, for a worker with a processor of its own.
        gradient_bytes: size of the gradients.
        workers: the workers.
        buckets: parts in which the gradients are summed during the backward pass; 1: all after it.
    """
    costs: dict[float, float] = {}
    for size in schedule.sizes:
        cost = batch_of_worker * size.batch_multiplier * seconds_of_crop[size.pixels] * workers.crowding
        costs[cost] = costs.get(cost, 0.0) + size.probability
    mean = sum(cost * share for cost, share in costs.items())
    last_groups = costs  # probability of the cost of the last group of a step
    if draw == "stratified":
        last_groups = {[cost * share for cost, share in costs.items() if share][-1]: 1.0}
    if draw == "independent":
        last_groups = _slowest(costs, workers.count)
        mean = max(mean, expected_slowest(costs, workers.count) / workers.crowding)
    reduce_s = workers.reduce_seconds(gradient_bytes, buckets)
    return mean + sum(
        share * waiting_seconds(reduce_s, BACKWARD_SHARE * cost, buckets) for cost, share in last_groups.items()
    )


def images_per_second(schedule: PatchSchedule, batch_of_worker: int, workers: Workers, seconds: float) -> float:
    """Counted images (crops) of all workers per second, if a step takes `seconds`."""
    return batch_of_worker * schedule.mean_multiplier * workers.count / seconds
