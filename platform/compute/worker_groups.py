"""Groups of workers: the checkpoint before an elastic run replaces them, and messages about missing nodes.

Ray Train has no public way to learn of these events, so this follows its internal callbacks.
"""

import contextlib
import time
from collections.abc import Iterator
from threading import Timer
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from patchloom.platform.compute.messages import forward_messages
from patchloom.platform.compute.stopping import RunControl
from patchloom.platform.progress import say

CHECKPOINT_WAIT_S = 120.0  # then the workers are replaced without it
LOOK_EVERY_S = 0.5
NOTICE_AFTER_S = 20.0  # of waiting for nodes


class CheckpointBeforeResize(ControllerCallback):
    """Asks running workers for a checkpoint and waits for it. Ray Train calls it in its controller.

    Args:
        control: the run.
    """

    def __init__(self, control: RunControl) -> None:
        self.control = control

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called when Ray Train has decided to replace the workers, which still run."""
        if not isinstance(current_state, ResizingState) or not self.control.has_begun():
            return
        step, deadline = self.control.newest_step(), time.monotonic() + CHECKPOINT_WAIT_S
        self.control.save()
        while self.control.newest_step() <= step and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
        self.control.reset()


class GroupNotice(WorkerGroupCallback):
    """Says that workers wait for nodes, and how many train then. Ray Train calls it in its controller.

    Args:
        workers: number of workers that the user wants.
    """

    def __init__(self, workers: int) -> None:
        self.workers, self._training, self._starting = workers, workers, workers
        self._timer: Timer | None = None

    @contextlib.contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Wait for the nodes of a group of workers during the block."""
        try:
            yield
        finally:
            if self._timer:
                self._timer.cancel()

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Called before Ray waits for the nodes."""
        forward_messages()
        self._starting, since = worker_group_context.num_workers, time.strftime("%H:%M:%S")
        text = f"  waiting since {since} for nodes for {self._starting} workers: nodes are missing or busy"
        self._timer = Timer(NOTICE_AFTER_S, _say_if_pending, [text, self._starting])
        self._timer.daemon = True
        self._timer.start()

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called when the processes of the workers run."""
        if self._starting != self._training:
            say(f"  {self._starting} of {self.workers} workers train since {time.strftime('%H:%M:%S')}")
        self._training = self._starting


def _say_if_pending(text: str, workers: int) -> None:
    """Say it, unless the nodes are there and the processes of the workers merely start slowly."""
    from ray.util import placement_group_table

    groups = placement_group_table().values()
    if any(group["state"] == "PENDING" and len(group["bundles"]) == workers for group in groups):
        say(text)
