"""Actors: a pool of processes of Ray Data that do the same work on many items."""

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from patchloom.errors import UserError
from patchloom.platform.compute.metrics import JOB_ATTEMPTS, JOB_UNIT_SECONDS, NO_COMMAND, MetricRecorder
from patchloom.platform.compute.resources import (
    DEFAULT_RESOURCES,
    Resources,
    WorkerShape,
    autoscaler_state,
    wait_for_workers,
    workers_that_fit,
)
from patchloom.platform.compute.session import begin_work, ray_session
from patchloom.platform.compute.shared_paths import NO_PATHS, UsedPaths, check_shared
from patchloom.platform.compute.supply import session_shape
from patchloom.platform.compute.versions import COMMAND, ProcessVersions, check_versions, own_versions

Argument = TypeVar("Argument")
Item = TypeVar("Item")
ItemResult = TypeVar("ItemResult")

Report = Callable[[int], None]  # called while an item is processed, with how much of it is done
Actor = Callable[[Item, Report], ItemResult]

COUNT_EVERY_S = 1.0  # how often the progress of a pool is read
COUNT_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 5  # at one item; more are not the fault of the nodes
MAX_REQUESTED = 256  # processes for which an autoscaler is asked for nodes, without `workers`


def map_on_actors(
    actor: Callable[[Argument], Actor[Item, ItemResult]],
    argument: Argument,
    items: Sequence[Item],
    workers: int | None,
    on_gpus: bool = False,
    watch: Callable[[int], None] | None = None,
    resources: Resources = DEFAULT_RESOURCES,
    paths: UsedPaths = NO_PATHS,
    metrics: MetricRecorder = NO_COMMAND,
) -> Iterator[tuple[Item, ItemResult]]:
    """Process items on a pool of actors. Each process calls `actor(argument)` once, and the result for each item.

    An actor whose process or node dies is restarted, on another node if necessary, and its items are processed
    again. The pool starts work as soon as its first actor is ready, and grows while nodes are added.

    Args:
        actor: a class, whose objects are called as `object(item, report)`. `report(done)` says how much of the item
            is done, in any unit.
        argument: the argument of its constructor; pickled.
        items: what to process; pickled.
        workers: the largest number of processes. None: as many as fit on the nodes, and of a cluster with an
            autoscaler as many as it can have. 0: this process, without Ray.
        on_gpus: give each process the GPUs that `resources` names.
        watch: called about once per second with the sum of what the actors reported.
        resources: the nodes that the processes may use, and how long to wait for the first one.
        paths: local paths that all nodes must see.
        metrics: records the attempts at items, and their durations.

    Yields:
        Each item with its result, in the order in which they are finished.

    Raises:
        UserError: the cluster has no room for a process, or an item ended its process several times.
    """
    if not items:
        return
    if workers == 0:
        yield from _map_here(actor, argument, items, watch)
        return
    with ray_session(object_store_gib=resources.object_store_gib):
        shape = actor_shape(on_gpus, resources)
        wait_for_workers(1, shape, resources.wait_minutes)
        check_shared(paths)
        with _counter(watch) as counter:
            for number, result in _map_on_ray(
                _Call(actor, argument, counter, own_versions(COMMAND), metrics), items, workers, shape
            ):
                yield items[number], result


def actor_shape(on_gpus: bool, resources: Resources) -> WorkerShape:
    """What each actor reserves, in the current session. The arguments are those of `map_on_actors`."""
    return session_shape(resources, resources.cpus_per_worker or 1, uses_gpus=on_gpus)


@contextlib.contextmanager
def room_for_pool(workers: int | None, on_gpus: bool, resources: Resources) -> Iterator[Resources]:
    """A session that has room for one process of a pool, before anything is written. On a cluster, waits for a node.

    Yields:
        The resources, with the number of GPUs of each process if it was decided.

    Raises:
        UserError: the cluster does not answer, or has no room for a process.
    """
    needs_gpus = on_gpus and bool(resources.gpus_per_worker)
    if workers == 0 or not (os.environ.get("RAY_ADDRESS") or needs_gpus):
        yield resources  # a session on this machine has room
        return
    with ray_session(object_store_gib=resources.object_store_gib):
        shape = actor_shape(on_gpus, resources)
        wait_for_workers(1, shape, resources.wait_minutes)
        yield resources.with_values(gpus_per_worker=shape.bundle.get("GPU", 0)) if on_gpus else resources


def _map_here(
    actor: Callable[[Argument], Actor[Item, ItemResult]],
    argument: Argument,
    items: Sequence[Item],
    watch: Callable[[int], None] | None,
) -> Iterator[tuple[Item, ItemResult]]:
    begin_work()
    process, counts = actor(argument), ItemCounts()

    def report(number: int, done: int) -> None:
        counts.set(number, done)
        if watch is not None:
            watch(counts.total())

    for number, item in enumerate(items):
        yield item, process(item, lambda done, number=number: report(number, done))  # type: ignore[misc]


@dataclass(frozen=True)
class _Call(Generic[Argument, Item, ItemResult]):
    """What an actor's process needs: its class, the argument, the counter's handle, equal versions, and metrics."""

    actor: Callable[[Argument], Actor[Item, ItemResult]]
    argument: Argument
    counter: Any
    versions: ProcessVersions
    metrics: MetricRecorder


class _ActorProcess:
    """One process of the pool. Its rows are dictionaries of a number and bytes, as Ray Data wants them."""

    def __init__(self, call: _Call[Any, Any, Any]) -> None:
        begin_work()
        self.counter, self.metrics = call.counter, call.metrics
        self.problem: UserError | None = None
        try:
            check_versions([call.versions, own_versions()])
            self.process = call.actor(call.argument)
        except UserError as error:
            self.problem = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = self._result(int(row["number"]), row["item"])
        except UserError as error:  # Ray Data would keep only its traceback
            result = error
        return {"number": int(row["number"]), "result": pickle.dumps(result)}

    def _result(self, number: int, item: bytes) -> Any:
        """The result of an item; raises UserError also if this process cannot work at all."""
        if self.problem is not None:
            raise self.problem
        attempts = self._attempt(number)
        if attempts > MAX_ATTEMPTS:
            raise UserError(
                f"item {number} ended its process {attempts - 1} times, perhaps because memory was full: "
                "use fewer workers per node, or smaller shards or batches"
            )
        self.metrics.record(JOB_ATTEMPTS, 1, attempt=str(attempts))
        began = time.monotonic()
        result = self.process(pickle.loads(item), lambda done: self.counter.set.remote(number, done))
        self.metrics.record(JOB_UNIT_SECONDS, time.monotonic() - began)
        return result

    def _attempt(self, number: int) -> int:
        """How often an item was started, this time included; 1 if the counter does not answer."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            return int(ray.get(self.counter.begin.remote(number), timeout=COUNT_TIMEOUT_S))
        return 1


def _map_on_ray(
    call: _Call[Argument, Item, ItemResult], items: Sequence[Item], workers: int | None, shape: WorkerShape
) -> Iterator[tuple[int, ItemResult]]:
    import ray.data

    most = max(1, min(workers or _room(shape), len(items)))
    pool = ray.data.ActorPoolStrategy(
        size=most,  # those without a node wait for one, so that an autoscaler adds it
        # a second item in flight hides the latency of Ray; with few items, it would keep another actor idle
        max_tasks_in_flight_per_actor=2 if len(items) > 4 * most else 1,
    )
    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _ActorProcess, fn_constructor_args=(call,), compute=pool, num_cpus=shape.bundle["CPU"],
        num_gpus=shape.bundle.get("GPU", 0), label_selector=shape.labels or None, resources=shape.other_resources,
    )  # fmt: skip
    for row in results.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserError):
            raise result
        yield int(row["number"]), result


def _room(shape: WorkerShape) -> int:
    """How many actors a pool has by default."""
    if autoscaler_state().exists:
        return MAX_REQUESTED
    return workers_that_fit(shape)


class ItemCounts:
    """How much of each item of a pool is done, and how often it was started. It runs as an actor of its own."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._attempts: dict[int, int] = {}

    def begin(self, number: int) -> int:
        """Count a start of an item; returns how often it was started."""
        self._attempts[number] = self._attempts.get(number, 0) + 1
        return self._attempts[number]

    def set(self, number: int, done: int) -> None:
        """Set how much of an item is done. An item that starts again starts from its new count."""
        self._counts[number] = done

    def total(self) -> int:
        """The sum over all items."""
        return sum(self._counts.values())


@contextlib.contextmanager
def _counter(watch: Callable[[int], None] | None) -> Iterator[Any]:
    """The handle of an `ItemCounts` actor on this node, whose total a thread passes to `watch`.

    If that actor is lost, progress is no longer shown and the work continues.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    counter = ray.remote(num_cpus=0, scheduling_strategy=here)(ItemCounts).remote()
    stop = threading.Event()

    def poll() -> None:
        while watch is not None and not stop.wait(COUNT_EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):
                total = ray.get(counter.total.remote(), timeout=COUNT_TIMEOUT_S)
                if total:
                    watch(total)

    thread = threading.Thread(target=poll, name="item-counts", daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        stop.set()
        thread.join()
        ray.kill(counter)
