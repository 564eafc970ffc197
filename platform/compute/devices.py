"""Devices: the one GPU or CPU on which this process computes. Nothing else asks torch or Ray for it.

Ray Train shows all workers of a node the same GPUs, and a thread starts with GPU 0 as its current device. So every
tensor, stream and event gets the device with its index, and every thread that computes begins with `use_device`.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from patchloom.errors import UserError
from patchloom.platform.compute.messages import connected_ray

if TYPE_CHECKING:
    import torch

DEVICE_VARIABLE = "PATCHLOOM_DEVICE"  # overrides the choice, such as `cpu` on a machine whose GPU must stay free


@cache
def own_device() -> "torch.device":
    """The device of this process, with its index.

    In a process that Ray started, the first GPU that Ray reserved for it, or the CPU if Ray reserved none. Elsewhere
    the first visible GPU, if there is one.

    Raises:
        UserError: torch cannot use the GPU that Ray reserved.
    """
    import torch

    if chosen := os.environ.get(DEVICE_VARIABLE):
        return torch.device(chosen)
    if not _is_started_by_ray():
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    import ray

    if not ray.get_gpu_ids():
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    if not torch.cuda.is_available():
        raise UserError(
            f"Ray reserved GPU {device.index} of {os.uname().nodename} for this process, and torch {torch.__version__} "
            f"finds no GPU there: install torch for its CUDA driver, or set {DEVICE_VARIABLE}=cpu"
        )
    return device


def use_device(device: "torch.device") -> None:
    """Make a GPU the current device of this thread, for calls that take no device. Does nothing for the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def device_thread(name: str) -> ThreadPoolExecutor:
    """A thread that does one thing after the other on the device of this process.

    Args:
        name: the name of the thread.
    """
    return ThreadPoolExecutor(1, name, initializer=use_device, initargs=(own_device(),))


def _is_started_by_ray() -> bool:
    ray = connected_ray()
    return ray is not None and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
