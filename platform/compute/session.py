"""Ray sessions: one on this machine, or a connection to the cluster at RAY_ADDRESS."""

import contextlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.compute.answering import check_ray_address
from patchloom.platform.compute.machine import keep_freed_memory
from patchloom.platform.compute.messages import connected_ray, forward_messages, showing_messages
from patchloom.platform.compute.stopping import kept_sigterm_handler
from patchloom.platform.progress import say

# Ray and MLflow read these when they are imported or when their processes start. A value that the user set is kept.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # detects a killed worker quickly
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ core prints warnings about errors that are handled
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a search at once; its folder has everything needed to continue
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default waits for minutes if the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# For a session on this machine only: features that are not useful there and slow down every step on a few cores.
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the only node is never preempted
    "RAY_TRAIN_METRICS_ENABLED": "0",  # there is no Prometheus server
    "RAY_enable_metrics_collection": "0",
}
OBJECT_STORE_GIB = 1.0


def read_environment_file() -> None:
    """Set the variables of the file PATCHLOOM_ENV_FILE, with lines NAME=VALUE: secrets that no job's settings show.

    Raises:
        UserError: the file cannot be read.
    """
    path = os.environ.get("PATCHLOOM_ENV_FILE")
    if not path:
        return
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"PATCHLOOM_ENV_FILE={path} cannot be read on {os.uname().nodename} ({error.strerror}): every node needs it"
        ) from None
    for line in lines:
        name, mark, value = line.strip().removeprefix("export ").partition("=")
        if mark and not name.startswith("#"):
            os.environ[name.strip()] = value.strip().strip("\"'")


def quiet_environment() -> None:
    """Turn usage statistics and log output off, in this process and in those of Ray, unless the user set them."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def begin_work() -> None:
    """Set up a process that does the work of a command: quiet, and with freed memory kept for the next step."""
    read_environment_file()
    quiet_environment()
    keep_freed_memory()
    forward_messages()


@contextlib.contextmanager
def ray_session(cpus: int = 1, object_store_gib: float | None = None) -> Iterator[None]:
    """Make a Ray session available during the block.

    Uses the running session if there is one, else the cluster at RAY_ADDRESS, else starts a session on this machine.

    Args:
        cpus: CPUs that the work needs at once. A session on this machine offers at least that many, even with
            fewer cores.
        object_store_gib: size of the object store of a session on this machine; 1 by default.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS.
    """
    quiet_environment()
    check_cluster()
    import ray

    if ray.is_initialized():
        with showing_messages():
            yield
        return
    is_local = not os.environ.get("RAY_ADDRESS")
    starts_here = os.environ.get("RAY_ADDRESS") in (None, "", "local")
    say("  starting Ray on this machine ..." if starts_here else "  connecting to the Ray cluster ...")
    with environment_defaults(LOCAL_ENVIRONMENT if is_local else {}):
        _start_ray(max(os.cpu_count() or 1, cpus) if is_local else None, object_store_gib or OBJECT_STORE_GIB)
        try:
            with showing_messages():
                yield
        finally:
            ray.shutdown()


def check_cluster() -> None:
    """Raise UserError if this process has no Ray session and no cluster answers at RAY_ADDRESS."""
    if connected_ray() is None:
        quiet_environment()  # the check can import Ray
        check_ray_address()


def session_cpus() -> int:
    """The number of CPUs of all nodes of the session."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


@contextlib.contextmanager
def environment_defaults(defaults: dict[str, str]) -> Iterator[None]:
    """Set environment variables during the block, except those that the user has set."""
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(unset)
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _start_ray(local_cpus: int | None, object_store_gib: float) -> None:
    """Start Ray on this machine, or connect to the cluster at RAY_ADDRESS if `local_cpus` is None."""
    import ray
    from ray.exceptions import RayError

    start = partial(ray.init, logging_level=logging.ERROR, log_to_driver=False)
    if local_cpus is not None:
        start = partial(
            start,
            address="local",  # not a cluster that runs, or ran, on this machine
            num_cpus=local_cpus,
            object_store_memory=round(object_store_gib * 2**30),
            include_dashboard=True,  # Ray Tune uses its State API when it cleans up
        )
    with warnings.catch_warnings(), _silent_stderr(), kept_sigterm_handler(), _in_own_process_groups():
        warnings.simplefilter("ignore")
        try:
            start()
        except (ConnectionError, RayError) as error:
            problem = str(error).strip().split("\n")[0]
            raise UserError(
                f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: Ray cannot connect ({problem}): check that the cluster "
                "runs; on a machine that is none of its nodes, use `patchloom launch COMMAND...`, or unset RAY_ADDRESS "
                "to run on this machine"
            ) from None
    protect_token()
    _quiet_loggers()


@contextlib.contextmanager
def _in_own_process_groups() -> Iterator[None]:
    """Start processes outside of the group of this one during the block.

    A batch scheduler sends SIGTERM to the whole group. Ray's processes would end at once, and with them the workers,
    which have a checkpoint to write first.
    """
    init = subprocess.Popen.__init__

    def init_in_group(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **{"process_group": 0} | options)

    subprocess.Popen.__init__ = init_in_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = init  # type: ignore[method-assign]


def protect_token() -> None:
    """Let only its owner read the token of Ray's sessions, which Ray writes readable for everyone."""
    path = Path("~/.ray/auth_token").expanduser()
    with contextlib.suppress(OSError):  # it belongs to somebody else, or there is none
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's C++ core writes to stderr while it starts. Python exceptions are not affected."""
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:  # noqa: PTH123
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _quiet_loggers() -> None:
    import ray.data

    for name in ("ray.data", "ray.train", "ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are returned as exceptions or results
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
