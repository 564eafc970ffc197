"""Precision: the arithmetic of sampling, and what makes its results repeatable."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from patchloom.models.step import HALF_PRECISIONS, set_rounding


def half_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which torch computes convolutions and products in half precision, as in training.

    Args:
        device: the device that computes.
        precision: "bf16" or "fp16"; any other value changes nothing.
    """
    half = HALF_PRECISIONS.get(precision)
    return nullcontext() if half is None else torch.autocast(device.type, half)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread inside the block. The number of threads changes the order of sums, and so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def kept_arithmetic() -> Iterator[None]:
    """Restore at the end of the block how this process rounds and chooses kernels on GPUs."""
    cudnn, rounding = torch.backends.cudnn, torch.get_float32_matmul_precision()
    flags = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(rounding)
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = flags


@contextmanager
def fixed_arithmetic() -> Iterator[None]:
    """Compute the same bytes each time inside the block, and restore the settings of this process at its end.

    The CPU uses one thread. GPUs use neither TF32 nor kernels that were chosen by their speed or add in any order.
    """
    with kept_arithmetic(), one_thread():
        set_rounding("fp32")
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        yield
