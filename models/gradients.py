"""Gradients: all in one flat tensor, whose parts are summed over the workers while the backward pass goes on."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from patchloom.errors import UserError

BUCKETS = 16  # at most: only whole buckets overlap the backward pass, and each one costs a round of messages
LEAST_BUCKET_BYTES = 2**18
FLOAT_BYTES = 4

StartSum = Callable[[Tensor], Callable[[], object] | None]
"""Starts to sum a tensor over all workers, in place. Returns a function that waits for it; None if it is done."""


class Gradients:
    """All gradients in one flat tensor, followed by sums of losses and counts of crops.

    The tensor has the order of the parameters. Its buckets are parts of it, from its end to its start, because the
    last layers get their gradients first. Neither changes during a run, so a restarted run sums in the same order as
    an uninterrupted one.

    Args:
        module: the network; its gradients become views of the tensor.
        record: shape of the loss record: (patch sizes, sigma bins) in training.
        least_bucket_bytes: smallest size of a bucket; the first layers may have a smaller one.
    """

    def __init__(
        self, module: nn.Module, record: tuple[int, ...], least_bucket_bytes: int = LEAST_BUCKET_BYTES
    ) -> None:
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.length = sum(p.numel() for p in parameters.values())
        self._record_shape = (*record, 2)
        device = next(iter(parameters.values())).device
        self.flat = torch.zeros(self.length + math.prod(self._record_shape), device=device)
        starts = bucket_starts([p.numel() for p in parameters.values()], least_bucket_bytes)
        self.buckets = [self.flat[start:end] for start, end in zip(starts, [len(self.flat), *starts[:-1]], strict=True)]
        self._buckets_of: dict[str, int] = {}  # by the name of the parameter
        start = 0
        for name, parameter in parameters.items():
            flat = self.flat[start : start + parameter.numel()]
            parameter.grad = flat.as_strided(parameter.shape, parameter.stride())  # in the layout of the parameter
            self._buckets_of[name] = next(number for number, first in enumerate(starts) if first <= start)
            start += parameter.numel()
        self._parameters = parameters
        self._has_hooks = False
        self._start_sum: StartSum | None = None  # during the last backward pass of a step

    @property
    def loss_and_crops(self) -> Tensor:
        """(*record, 2): sum of the losses and number of crops."""
        return self.flat[self.length :].view(self._record_shape)

    def clean(self) -> None:
        """Replace NaN by 0 and infinity by 1e5 (EDM), so that one bad crop does not end a run."""
        torch.nan_to_num(self.flat[: self.length], nan=0, posinf=1e5, neginf=-1e5, out=self.flat[: self.length])

    @contextmanager
    def summed(self, start_sum: StartSum | None) -> Iterator[None]:
        """Sum over all workers, during the last backward pass of a step, which the `with` block makes.

        A bucket starts when it has all its gradients and the buckets before it have started, so all workers start
        them in the same order. What did not start, because parameters got no gradient, starts at the end of the block.
        The sums are complete after the block. The loss record must be complete before its backward pass.

        Args:
            start_sum: starts to sum a bucket; None for one worker.

        Raises:
            UserError: a parameter got a second gradient after its bucket had started.
        """
        if start_sum is None:
            yield
            return
        self._add_hooks()
        self._missing = [0] * len(self.buckets)
        for bucket in self._buckets_of.values():
            self._missing[bucket] += 1
        self._started, self._waits = 0, list[Callable[[], object]]()
        self._start_sum = start_sum
        try:
            yield
            while self._started < len(self.buckets):
                self._start_next()
        finally:
            self._start_sum = None
        for wait in self._waits:
            wait()

    def _add_hooks(self) -> None:
        """Count the gradients as they come. A run of one worker never needs it."""
        if not self._has_hooks:
            self._has_hooks = True
            for name, parameter in self._parameters.items():
                parameter.register_post_accumulate_grad_hook(self._counter(name))

    def _counter(self, name: str) -> Callable[[Tensor], None]:
        bucket = self._buckets_of[name]

        def count(_: Tensor) -> None:
            if self._start_sum is None:
                return
            if bucket < self._started:
                raise UserError(
                    f"the parameter {name} of the network got two gradients in one backward pass, and the first one is "
                    "already sent: use checkpoint(..., use_reentrant=False) in the network, or train with one worker"
                )
            self._missing[bucket] -= 1
            while self._started < len(self.buckets) and self._missing[self._started] <= 0:
                self._start_next()

        return count

    def _start_next(self) -> None:
        assert self._start_sum is not None  # only called inside `summed`
        wait = self._start_sum(self.buckets[self._started])
        self._started += 1
        if wait is not None:
            self._waits.append(wait)


def bucket_starts(numels: list[int], least_bytes: int = LEAST_BUCKET_BYTES) -> list[int]:
    """Where the buckets of a flat gradient start, from its end to its start.

    Args:
        numels: elements of the parameters, in their order.
        least_bytes: smallest size of a bucket.

    Returns:
        Indices of first elements, falling to 0.
    """
    least = max(-(-sum(numels) // BUCKETS), least_bytes // FLOAT_BYTES, 1)
    starts, start, end = [], sum(numels), sum(numels)
    for numel in reversed(numels):
        start -= numel
        if end - start >= least or start == 0:
            starts.append(start)
            end = start
    return starts
