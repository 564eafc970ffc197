"""Profiles: what a few steps of a run spend their time on, named in a line and kept as a trace."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from patchloom.platform.progress import say

SKIPPED_STEPS, PROFILED_STEPS = 4, 8
COSTS_NAMED = 3


class Profiler:
    """Watches the first steps after the warm-up; `off` watches none."""

    def __init__(self, folder: Path, off: bool) -> None:
        self.folder, self._profile = folder, None
        if off:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of its own start and stop
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._tell,
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

    def _tell(self, found: Any) -> None:
        on_gpu = torch.cuda.is_available()
        events = [event for event in found.key_averages() if not event.key.startswith("ProfilerStep")]

        def own_time(event: Any) -> float:
            return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

        total = sum(map(own_time, events)) or 1.0
        events.sort(key=own_time, reverse=True)
        costs = ", ".join(f"{event.key} {own_time(event) / total:.0%}" for event in events[:COSTS_NAMED])
        say(f"  profile of {PROFILED_STEPS} steps: {costs}; the trace is {self.folder / 'profile.json'}")
        found.export_chrome_trace(str(self.folder / "profile.json"))
