"""A profile of a few steps of a run: the most expensive operations in one line, and a trace."""

import os
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from patchloom.platform.compute.devices import own_device
from patchloom.platform.progress import say

SKIPPED_STEPS, PROFILED_STEPS = 4, 8
NAMED_OPERATIONS = 3


class Profiler:
    """Profiles the steps after a warm-up. With `off` it does nothing."""

    def __init__(self, folder: Path, off: bool) -> None:
        self.folder, self._profile = folder, None
        if off:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages when it starts and stops
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if own_device().type == "cuda" else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._report,
            acc_events=True,
        )

    def __enter__(self) -> "Profiler":
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def after_step(self) -> None:
        """Count a step."""
        if self._profile is not None:
            self._profile.step()

    def _report(self, profiled: Any) -> None:
        """Print the most expensive operations, and write the trace."""
        events = [event for event in profiled.key_averages() if not event.key.startswith("ProfilerStep")]
        total = sum(map(_own_time, events)) or 1.0
        events.sort(key=_own_time, reverse=True)
        costs = ", ".join(f"{event.key} {_own_time(event) / total:.0%}" for event in events[:NAMED_OPERATIONS])
        say(f"  profile of {PROFILED_STEPS} steps: {costs}; the trace is {self.folder / 'profile.json'}")
        try:
            profiled.export_chrome_trace(str(self.folder / "profile.json"))
        except (OSError, RuntimeError) as error:
            say(f"  the trace was not written ({error}); training continues")


def _own_time(event: Any) -> float:
    """Time in an operation without the operations it calls, on the GPU if there is one."""
    return float(event.self_device_time_total if own_device().type == "cuda" else event.self_cpu_time_total)
