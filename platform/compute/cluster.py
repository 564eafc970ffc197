"""The earlier `map_on_actors`, for rows that are dictionaries; `patchloom.platform.compute.actors` replaces it."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from patchloom.platform.compute.session import begin_work as begin_work
from patchloom.platform.compute.session import ray_session, session_cpus

LOOK_EVERY_S = 1.0


def map_on_actors(
    actor: type,
    argument: Any,
    items: list[dict[str, Any]],
    workers: int | None,
    on_gpus: bool = False,
    watch: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """What `actor(argument)(item)` returns for every item, as they come, from a pool of actors on Ray Data.

    workers: how many at most; all CPUs of the session by default, or, with `on_gpus` where there are any,
    all GPUs, one an actor; 0 does it in this process, without Ray. All are asked for at once, and those that are there
    begin. An actor that dies hard is restarted twice, and its item tried again. watch: called now and then with the
    sum of what the actors have counted in a `Tally`, which they find as `argument["tally"]`.
    """
    if not items:
        return
    if workers == 0:
        yield from map(actor(argument), items)
        return
    with ray_session(), _watched(watch) as tally:
        import ray.data
        import ray.util.annotations

        gpus = int(ray.cluster_resources().get("GPU", 0)) if on_gpus else 0
        most = max(1, min(workers or gpus or session_cpus(), len(items)))
        pool = ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=most,  # grown by load, a pool of few long items stays at one
            # one item ahead hides the way to the actor; of few items, the first actor would take another's share
            max_tasks_in_flight_per_actor=2 if len(items) > 4 * most else 1,
        )  # fmt: skip
        with warnings.catch_warnings():  # without the restart options a dead worker's item is retried for ever
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            made = ray.data.from_items(items, override_num_blocks=len(items)).map(
                actor, fn_constructor_args=(argument if watch is None else argument | {"tally": tally},), compute=pool,
                num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=2, max_task_retries=2,
            )  # fmt: skip
        yield from made.iter_rows()


class Tally:
    """How far every item of a pool has come; an actor of its own, told by those that work."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def count(self, item: str, done: int) -> None:
        """Say how much of an item is done; one that is begun again is counted anew."""
        self._counts[item] = done

    def total(self) -> int:
        """What all items have come to."""
        return sum(self._counts.values())


@contextlib.contextmanager
def _watched(watch: Callable[[int], None] | None) -> Iterator[Any]:
    """A tally for the block, looked at every second; progress is not worth a failure, so one that is lost is let go."""
    if watch is None:
        yield None
        return
    import ray

    tally = ray.remote(num_cpus=0)(Tally).remote()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):
                total = ray.get(tally.total.remote(), timeout=60)
                if total:
                    watch(total)

    thread = threading.Thread(target=look, name="tally", daemon=True)
    thread.start()
    try:
        yield tally
    finally:
        stop.set()
        thread.join()
        ray.kill(tally)
