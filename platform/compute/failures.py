"""Failures of workers: which end a run, and the short message about them. Imported only where Ray is in use."""

from collections.abc import Callable, Mapping
from typing import Any

import ray.exceptions
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from patchloom.errors import UserError, WorkersFailed
from patchloom.platform.compute.messages import forward_messages
from patchloom.platform.compute.worker_log import end_of_log
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say

MOST_FAILURES = 3  # in a row, without a newer checkpoint between them
START_FAILURES = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
OUT_OF_MEMORY = ("out of memory", "out_of_memory", "low on memory")
GUESSES = "Some common causes"  # where Ray begins to list what may have killed a process; memory is always in the list
OF_ANOTHER_WORKER = ("gloo", "nccl", "connection", "broken pipe")  # how workers fail after one of them died


class FailureLimit(ray.train.UserCallback):
    """Ends a run whose workers fail again and again without progress. Ray Train calls it in its controller.

    A preempted node is no failure. A mistake of the user ends the run at once.

    Args:
        newest_step: the step of the newest checkpoint.
        reset: called at each failure, when no workers train.
        run: the run folder with the logs of the workers, if there is one.
    """

    def __init__(self, newest_step: Callable[[], int], reset: Callable[[], None], run: Folder | None) -> None:
        self.newest_step, self.reset, self.run = newest_step, reset, run
        self._step, self._failures = -1, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count a failure; raises what ends the run."""
        self.reset()
        for error in worker_exceptions.values():
            if (mistake := user_error(error)) is not None:
                raise mistake
        if any(_is_preempted(error) for error in worker_exceptions.values()):
            return
        title, lines = describe_failure(worker_exceptions, self.run)
        step = self.newest_step()
        self._failures = self._failures + 1 if step <= self._step else 1
        self._step = max(step, self._step)
        if self._failures > MOST_FAILURES:
            newer = f"than that of step {step:,}" if step else "(there is none yet)"
            raise WorkersFailed(
                f"{title}; this was failure {self._failures} without a newer checkpoint {newer}: remove the cause and "
                f"continue with --resume\n{lines}".strip()
            )
        forward_messages()
        say(f"  {title}; the workers start again from step {step:,}, failure {self._failures} at this step")


def fit(trainer: Any, newest_step: Callable[[], int]) -> Any:
    """Run a trainer of Ray Train; returns what its loop returned on rank 0.

    Workers that cannot start, such as after the loss of a node, are waited for again if there was progress before.

    Raises:
        UserError: a worker raised one.
        WorkersFailed: the workers failed too often without progress.
    """
    step = -1
    while True:
        try:
            return trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            cause, newest = getattr(error, "controller_failure", None), newest_step()
            if not isinstance(cause, START_FAILURES) or newest <= step:
                raise _reported(error) from error
            step = newest


def _reported(error: Exception) -> Exception:
    """The error that the user sees."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, START_FAILURES):
        return WorkersFailed(f"the workers could not be started again ({reason(cause)}): continue with --resume")
    if isinstance(cause, WorkersFailed):
        return cause
    failures = getattr(error, "worker_failures", None)
    return user_error(error) or WorkersFailed(describe_failure(failures)[0] if failures else reason(cause or error))


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError in an error, also if Ray wrapped it in errors of its own."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        inner = getattr(error, "controller_failure", None) or getattr(error, "cause", None)
        error = inner or error.__cause__
    return None


def describe_failure(errors: Mapping[int, Exception], run: Folder | None = None) -> tuple[str, str]:
    """The failure of the worker that failed first: in one line, and the last lines of its log."""
    rank = min(errors, key=lambda rank: (_is_consequence(errors[rank]), rank))
    host, lines = end_of_log(run, rank) if run else ("", "")
    return f"worker {rank}{f' on {host}' if host else ''} failed ({reason(errors[rank])})", lines


def _is_consequence(error: Exception) -> bool:
    """Whether a worker probably failed because another one did."""
    is_dead = isinstance(_inner(error), ray.exceptions.RayActorError)
    return not is_dead and any(word in str(error).lower() for word in OF_ANOTHER_WORKER)


def reason(error: Exception) -> str:
    """Why a worker or a trial failed, in a few words."""
    inner = _inner(error)
    text = str(inner).partition(GUESSES)[0]
    if "OOM" in text or any(words in text.lower() for words in OUT_OF_MEMORY):
        return "out of memory"
    if isinstance(inner, ray.exceptions.RayActorError):
        return "its node was lost" if "node" in text.lower() and "died" in text.lower() else "its process was killed"
    lines = text.strip().splitlines() or [""]
    return f"{type(inner).__name__}: {lines[-1].strip()}" if lines[-1].strip() else type(inner).__name__


def _inner(error: Exception) -> Exception:
    """The error below the one with which Ray Train reports a worker that does not answer."""
    inner: Exception = getattr(error, "health_check_failure", error)
    return inner


def _is_preempted(error: Exception) -> bool:
    inner = _inner(error)
    return isinstance(inner, ray.exceptions.RayActorError) and bool(inner.preempted)
