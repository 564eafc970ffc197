"""Copies of rows to the device of a worker. To a GPU they go from pinned memory, while it computes the step before."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.models.step import StoredRows


def copied(values: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device. A copy to a GPU is queued on the current stream, and nothing waits for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class CopyStream:
    """A stream of a GPU for the copies of a thread; on the CPU it does nothing.

    Args:
        device: the device of the worker.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copying(self) -> AbstractContextManager[object]:
        """Copies of the block go to this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copied_so_far(self) -> Any:
        """A mark after all copies until now; None on the CPU."""
        return None if self._stream is None else self._stream.record_event()

    def use(self, rows: Iterable[StoredRows], mark: Any) -> None:
        """Let the current stream wait for the copies before a mark, and own the memory of these rows."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(mark)
        for each in rows:
            for tensor in (each.image, each.label, each.std, each.condition, each.text):
                if tensor is not None:
                    tensor.record_stream(computing)  # its memory is not reused before this stream is done with it
