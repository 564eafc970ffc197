"""Actors: a pool of processes of Ray Data that do the same work on many items."""

import contextlib
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from patchloom.platform.compute.session import begin_work, ray_session, session_cpus, session_gpus

Argument = TypeVar("Argument")
Item = TypeVar("Item")
ItemResult = TypeVar("ItemResult")

Report = Callable[[int], None]  # called while an item is processed, with how much of it is done
Actor = Callable[[Item, Report], ItemResult]

COUNT_EVERY_S = 1.0  # how often the progress of a pool is read


def map_on_actors(
    actor: Callable[[Argument], Actor[Item, ItemResult]],
    argument: Argument,
    items: Sequence[Item],
    workers: int | None,
    on_gpus: bool = False,
    watch: Callable[[int], None] | None = None,
) -> Iterator[tuple[Item, ItemResult]]:
    """Process items on a pool of actors. Each process calls `actor(argument)` once, and the result for each item.

    An actor that dies is restarted up to twice, and its item is processed again. The pool starts work as soon as its
    first actor is ready.

    Args:
        actor: a class, whose objects are called as `object(item, report)`. `report(done)` says how much of the item
            is done, in any unit.
        argument: the argument of its constructor; pickled.
        items: what to process; pickled.
        workers: the largest number of processes. None: one per CPU of the session, or, with `on_gpus`, one per GPU if
            there are any. 0: this process, without Ray.
        on_gpus: give each process a GPU, if there are any.
        watch: called about once per second with the sum of what the actors reported.

    Yields:
        Each item with its result, in the order in which they are finished.
    """
    if not items:
        return
    if workers == 0:
        yield from _map_here(actor, argument, items, watch)
        return
    with ray_session(), _counter(watch) as counter:
        numbers = _map_on_ray(_Call(actor, argument, counter), items, workers, on_gpus)
        for number, result in numbers:
            yield items[number], result


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
    """What an actor's process needs: its class, the argument, and the handle of the counter, if progress is watched."""

    actor: Callable[[Argument], Actor[Item, ItemResult]]
    argument: Argument
    counter: Any


class _ActorProcess:
    """One process of the pool. Its rows are dictionaries of a number and bytes, as Ray Data wants them."""

    def __init__(self, call: _Call[Any, Any, Any]) -> None:
        begin_work()
        self.process, self.counter = call.actor(call.argument), call.counter

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])

        def report(done: int) -> None:
            if self.counter is not None:
                self.counter.set.remote(number, done)

        return {"number": number, "result": pickle.dumps(self.process(pickle.loads(row["item"]), report))}


def _map_on_ray(
    call: _Call[Argument, Item, ItemResult], items: Sequence[Item], workers: int | None, on_gpus: bool
) -> Iterator[tuple[int, ItemResult]]:
    import ray.data
    import ray.util.annotations

    gpus = int(session_gpus()) if on_gpus else 0
    most = max(1, min(workers or gpus or session_cpus(), len(items)))
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=most, initial_size=most,  # a pool that grows with its load would stay at one actor
        # a second item in flight hides the latency of Ray; with few items, it would keep another actor idle
        max_tasks_in_flight_per_actor=2 if len(items) > 4 * most else 1,
    )  # fmt: skip
    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    with warnings.catch_warnings():  # without the deprecated options, the item of a dead actor is retried for ever
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _ActorProcess, fn_constructor_args=(call,), compute=pool,
            num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=2, max_task_retries=2,
        )  # fmt: skip
    for row in results.iter_rows():
        yield int(row["number"]), pickle.loads(row["result"])


class ItemCounts:
    """How much of each item of a pool is done. It runs as an actor of its own."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def set(self, number: int, done: int) -> None:
        """Set how much of an item is done. An item that starts again starts from its new count."""
        self._counts[number] = done

    def total(self) -> int:
        """The sum over all items."""
        return sum(self._counts.values())


@contextlib.contextmanager
def _counter(watch: Callable[[int], None] | None) -> Iterator[Any]:
    """The handle of an `ItemCounts` actor, whose total a thread passes to `watch`; None if nothing is watched.

    If that actor is lost, progress is no longer shown and the work continues.
    """
    if watch is None:
        yield None
        return
    import ray

    counter = ray.remote(num_cpus=0)(ItemCounts).remote()
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(COUNT_EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):
                total = ray.get(counter.total.remote(), timeout=60)
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
