"""Resizing: an elastic run writes a checkpoint before its workers are replaced by more or fewer of them."""

import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

from patchloom.platform.compute.stopping import RunControl

CHECKPOINT_WAIT_S = 120.0  # then the workers are replaced without it
LOOK_EVERY_S = 0.5


class CheckpointBeforeResize(ControllerCallback):
    """Asks running workers for a checkpoint and waits for it. Ray Train calls it in its controller.

    Ray Train has no public way to learn of a resize before it happens.

    Args:
        control: the run.
    """

    def __init__(self, control: RunControl) -> None:
        self.control = control

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called before workers start, and before they are replaced. Only the latter have something to save."""
        if not self.control.has_begun():
            return
        step, deadline = self.control.newest_step(), time.monotonic() + CHECKPOINT_WAIT_S
        self.control.save()
        while self.control.newest_step() <= step and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
        self.control.reset()
