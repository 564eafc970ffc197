"""Clusters: the one door to Ray. A session is a laptop's own or a cluster's; the commands are the same."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.compute.machine import keep_freed_memory
from patchloom.platform.progress import say

# Ray reads these when it is imported or when its processes start; what the user set stays.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a killed worker is noticed soon
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ core warns on stderr of what is handled
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a search at once; its folder has all that goes on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its default waits for minutes on a server that is away
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# In a session of its own only: what nobody there can see, and what every step on a few cores would pay for.
OWN_SESSION = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes the only node away
    "RAY_TRAIN_METRICS_ENABLED": "0",  # for a Prometheus that is not there
    "RAY_enable_metrics_collection": "0",
}
OBJECT_STORE_BYTES = 1 << 30
LOOK_EVERY_S = 1.0
PART_OF_A_CPU = 0.01  # for the process of a trial that waits for workers of its own


def quiet_environment() -> None:
    """Usage statistics and chatter off, in this process and those that Ray starts, unless the user set them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def begin_work() -> None:
    """What a process that works for a command does first: chatter off, and memory kept from one step to the next."""
    quiet_environment()
    keep_freed_memory()


@contextlib.contextmanager
def ray_session(cpus: int = 1) -> Iterator[None]:
    """A Ray session for the block: the one that is already there, the cluster at RAY_ADDRESS, or one of its own.

    cpus: how many the work needs at once; an own session offers at least that many, however few cores there are.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    is_own = not os.environ.get("RAY_ADDRESS")
    if is_own:
        say("  starting Ray on this machine ...")
        options |= {
            "address": "local",  # not whatever cluster runs, or once ran, on this machine
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": True,  # Ray Tune's clean-up asks its State API
        }
    with _environment(OWN_SESSION if is_own else {}):
        with warnings.catch_warnings(), _silent_stderr():
            warnings.simplefilter("ignore")
            try:
                ray.init(**options)
            except ConnectionError as error:
                raise UserError(
                    f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} ({error}): "
                    "unset it to run here"
                ) from None
        _quiet_loggers()
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's C++ core writes to stderr while it starts; Python's exceptions still come through."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_loggers() -> None:
    import ray.data

    for name in ("ray.data", "ray.train", "ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed comes back as an exception or a result
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def session_cpus() -> int:
    """CPUs that the session's nodes have in all."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


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


@dataclass(frozen=True)
class Worker:
    """Which of how many workers this process is, and how it adds up tensors with the others.

    loses_a_node: whether a node of any worker has got notice that it will be taken away; all must ask alike.
    """

    rank: int = 0
    count: int = 1
    loses_a_node: Callable[[], bool] = lambda: False

    def reduce(self, tensor: Any) -> None:
        """Sum a tensor over all workers, in place."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.all_reduce(tensor)

    def any(self, mine: bool) -> bool:
        """Whether any worker says yes; all of them must ask at the same moment."""
        if self.count == 1:
            return mine
        import torch
        import torch.distributed

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        votes = torch.tensor([float(mine)], device=device)
        torch.distributed.all_reduce(votes)
        return votes.item() > 0


def run_workers(
    loop: Callable[[Worker, dict[str, Any]], Any],
    config: dict[str, Any],
    workers: int,
    scratch: Path,
    name: str,
    min_workers: int | None = None,
    on_stop: Callable[[], None] | None = None,
) -> Any:
    """Run `loop(worker, config)` on Ray Train workers and return rank 0's value; a worker that dies is restarted.

    workers: 0 runs the loop in this process, without Ray. scratch: where Ray Train keeps its own notes.
    min_workers: go on with fewer where nodes were lost, down to these, and with more when they come back.
    on_stop: called on SIGTERM, in place of an end; it is for the loop to return then.
    """
    if workers == 0:
        begin_work()
        with _on_sigterm(on_stop):
            return loop(Worker(), config)
    # a lost node's place may take minutes to fill; where it need not be filled, nobody waits long
    is_elastic = min_workers is not None and min_workers < workers
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30" if is_elastic else "600"}
    # in this order: Ray sets a signal handler of its own
    with _environment(patience), ray_session(workers), _on_sigterm(on_stop):
        return _run_on_ray_train(loop, config, workers, min_workers or workers, scratch, name)


@contextlib.contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Variables for the block and the processes it starts, where the user has not set them."""
    mine = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _on_sigterm(action: Callable[[], None] | None) -> Iterator[None]:
    """Do something else than to die on SIGTERM while this holds; only a main thread can."""
    if action is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_on_ray_train(
    loop: Callable[[Worker, dict[str, Any]], Any],
    config: dict[str, Any],
    workers: int,
    min_workers: int,
    scratch: Path,
    name: str,
) -> Any:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    available = session_cpus()
    if workers > available:
        raise UserError(f"--workers {workers} was asked and the session has {available} CPUs: ask for fewer workers")

    def worker_loop(settings: dict[str, Any]) -> Any:
        begin_work()
        import torch

        context = ray.train.get_context()
        if not torch.cuda.is_available():
            torch.set_num_threads(settings["cpus"])
        worker = Worker(
            context.get_world_rank(), context.get_world_size(), lambda: ray.train.get_preemption_info() is not None
        )
        return loop(worker, settings["config"])

    say(f"  waiting for {workers} worker{'s' if workers > 1 else ''} of Ray Train (half a minute on a laptop) ...")
    gpus = ray.cluster_resources().get("GPU", 0)
    is_trial = ray.get_runtime_context().get_actor_id() is not None  # of a search, beside other trials
    cpus = 1 if is_trial or os.environ.get("RAY_ADDRESS") else max(1, available // workers)
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"config": config, "cpus": cpus},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if min_workers == workers else (min_workers, workers),
            use_gpu=gpus >= workers,
            resources_per_worker={"CPU": cpus - PART_OF_A_CPU if is_trial else cpus},  # a trial's process has the rest
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=3, controller_failure_limit=3),
        ),
    )
    result = trainer.fit().return_value
    shutil.rmtree(scratch, ignore_errors=True)
    return result
