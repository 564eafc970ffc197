"""Failures of trials: which of them end a trial. Imported only where Ray is in use."""

import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.exceptions
from ray.tune import Callback

from patchloom.platform.compute.failures import MOST_FAILURES, reason

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

MOST_ERRORS = 1  # of a trial whose function raises an exception
PROGRESS_EVERY_S = 5.0


class TrialFailures(Callback):
    """Ends a trial whose process fails again and again without progress, such as without enough memory.

    Without it, Ray Tune repeats a trial for ever. A preempted node is no failure.

    Args:
        newest_step: the step of the newest checkpoint of a trial, from its configuration.
    """

    def __init__(self, newest_step: Callable[[dict[str, Any]], int]) -> None:
        self.newest_step = newest_step
        self._steps: dict[str, int] = {}  # of trials that have failed and made no progress since
        self._look_at = 0.0

    def on_trial_recover(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: Any) -> None:
        """Limit the failures of a trial that just failed and will run again."""
        self._forget_failures([trial])
        if trial.max_failures < 0:
            most = MOST_ERRORS if _raised(trial) else MOST_FAILURES
            trial.max_failures = max(0, trial.num_failures - 1) + most
            self._steps[trial.trial_id] = self.newest_step(trial.config)

    def on_step_begin(self, iteration: int, trials: "list[Trial]", **info: Any) -> None:
        """Lift the limit from trials that have a newer checkpoint now."""
        if time.monotonic() >= self._look_at:
            self._forget_failures(trials)
            self._look_at = time.monotonic() + PROGRESS_EVERY_S

    def _forget_failures(self, trials: "Sequence[Trial]") -> None:
        for trial in trials:
            if trial.max_failures >= 0 and not trial.is_finished():
                step = self.newest_step(trial.config)
                if step > self._steps.setdefault(trial.trial_id, step):
                    trial.max_failures = -1


def _raised(trial: "Trial") -> bool:
    """Whether the function of a trial raised an exception, so that its process did not die."""
    try:
        error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # there is no such file, or it cannot be read here
        return False
    # another process may have died, which raises an exception in this one
    return isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, ray.exceptions.RayError)


def describe_problem(error: Exception | str | None) -> str | None:
    """Why a trial failed, in one line: the last line of a traceback, or how its process ended."""
    if error is None:
        return None
    if isinstance(error, ray.exceptions.RayActorError) or "low on memory" in str(error):
        failure = Exception(error) if isinstance(error, str) else error
        return f"{reason(failure)}, again and again without a newer checkpoint"
    return str(error).strip().split("\n")[-1]
