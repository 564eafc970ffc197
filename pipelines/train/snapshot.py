"""Snapshots: the averaged weights after a step, which are measured while training goes on."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from patchloom.pipelines.train.run import TrainingRun


class Snapshot:
    """The first average of a run, as it is after the current step.

    Args:
        run: the run.
        is_copied: copy the weights, so that training can go on. Otherwise they are those of the run.
    """

    def __init__(self, run: TrainingRun, is_copied: bool) -> None:
        self.step, self.device = run.state.step, run.device
        average: Any = run.state.emas[0].module
        self.denoiser: Any = copy.deepcopy(average) if is_copied else average
        self._copied: Any = None  # an event after the copy on a GPU
        if is_copied and self.device.type == "cuda":
            self._copied = torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Measure a copy on a GPU on a stream of its own, in the thread of the block. Steps do not wait for it."""
        if self._copied is None:
            yield
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_event(self._copied)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
