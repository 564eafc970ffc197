"""Several workers in one process: threads whose all-reduce adds in the order of ranks, as a ring would each time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Together:
    """So many workers that meet at every `reduce`."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._barrier = threading.Barrier(workers)
        self._parts: list[Tensor | None] = [None] * workers

    def run(self, work: Callable[[int, Callable[[Tensor], None]], Result]) -> list[Result]:
        """`work(rank, reduce)` of every rank, at the same time."""
        with ThreadPoolExecutor(self.workers) as pool:
            ended = [pool.submit(self._guarded, work, rank) for rank in range(self.workers)]
            return [future.result() for future in ended]

    def _guarded(self, work: Callable[[int, Callable[[Tensor], None]], Any], rank: int) -> Any:
        try:
            return work(rank, lambda tensor: self._reduce(rank, tensor))
        except BaseException:
            self._barrier.abort()  # the others would wait for ever
            raise

    def _reduce(self, rank: int, tensor: Tensor) -> None:
        self._parts[rank] = tensor.clone()
        self._barrier.wait()
        total = torch.stack([part for part in self._parts if part is not None]).sum(0)
        self._barrier.wait()
        tensor.copy_(total)
