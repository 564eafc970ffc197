"""Resizing: an elastic run writes a checkpoint before its workers are replaced by more or fewer of them."""

import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

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

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called when Ray Train has decided to replace the workers, which still run."""
        if not isinstance(current_state, ResizingState) or not self.control.has_begun():
            return
        step, deadline = self.control.newest_step(), time.monotonic() + CHECKPOINT_WAIT_S
        self.control.save()
        while self.control.newest_step() <= step and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
        self.control.reset()
