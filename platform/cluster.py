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

from patchloom.platform.errors import UserError
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
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its default waits for minutes on a server that is away
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
OBJECT_STORE_BYTES = 1 << 30


def quiet_environment() -> None:
    """Usage statistics and chatter off, in this process and those that Ray starts, unless the user set them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


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
    if not os.environ.get("RAY_ADDRESS"):
        say("  starting Ray on this machine ...")
        options |= {
            "address": "local",  # not whatever cluster runs, or once ran, on this machine
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": True,  # Ray Tune's clean-up asks its State API
        }
    with warnings.catch_warnings(), _silent_stderr():
        warnings.simplefilter("ignore")
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} ({error}): unset it to run here"
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
    actor: type, argument: Any, items: list[dict[str, Any]], workers: int | None, on_gpus: bool = False
) -> Iterator[dict[str, Any]]:
    """What `actor(argument)(item)` returns for every item, as they come, from a pool of actors on Ray Data.

    workers: how many at most; all CPUs of the session by default, or, with `on_gpus` where there are any,
    all GPUs, one an actor. An actor that dies hard is restarted twice, and its item tried again.
    """
    if not items:
        return
    with ray_session():
        import ray.data
        import ray.util.annotations

        gpus = int(ray.cluster_resources().get("GPU", 0)) if on_gpus else 0
        most = max(1, min(workers or gpus or session_cpus(), len(items)))
        with warnings.catch_warnings():  # without the restart options a dead worker's item is retried for ever
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most)
            made = ray.data.from_items(items, override_num_blocks=len(items)).map(
                actor, fn_constructor_args=(argument,), compute=pool, num_cpus=1, num_gpus=1 if gpus else 0,
                max_restarts=2, max_task_retries=2,
            )  # fmt: skip
        yield from made.iter_rows()


@dataclass(frozen=True)
class Worker:
    """Which of how many workers this process is, and how it adds up tensors with the others."""

    rank: int = 0
    count: int = 1

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
        quiet_environment()
        import torch

        context = ray.train.get_context()
        if not torch.cuda.is_available():
            torch.set_num_threads(settings["cpus"])
        return loop(Worker(context.get_world_rank(), context.get_world_size()), settings["config"])

    say(f"  waiting for {workers} worker{'s' if workers > 1 else ''} of Ray Train (half a minute on a laptop) ...")
    gpus = ray.cluster_resources().get("GPU", 0)
    cpus = max(1, available // workers) if not os.environ.get("RAY_ADDRESS") else 1
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"config": config, "cpus": cpus},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if min_workers == workers else (min_workers, workers),
            use_gpu=gpus >= workers,
            resources_per_worker={"CPU": cpus},
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
