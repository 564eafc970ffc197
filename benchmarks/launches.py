"""Launches: the kernels that work starts on a GPU, or its operations on a CPU, counted by torch's profiler."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "patchloom launches: "  # before the name of a piece


def count_launches(pieces: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Count what each piece of work launches. Each runs once before, because the first call chooses algorithms.

    All pieces share one session of the profiler: on some versions of CUDA, later sessions of a process see no kernels,
    and the first session makes everything after it slower. So call it once, and last.

    Args:
        pieces: the work, by name.
        device: the device that does it.

    Returns:
        The launches of each piece: kernels on a GPU, without copies and fills of memory; on a CPU, operations that no
        other operation called.

    Raises:
        RuntimeError: the profiler saw no kernels of a piece.
    """
    is_gpu = device.type == "cuda"
    for work in pieces.values():
        work()
    wait_for(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiled:
        for work in list(pieces.values())[:1]:  # it may lose the first kernels of a session, so nothing counts yet
            work()
            wait_for(device)
        for name, work in pieces.items():
            with record_function(RANGE + name):
                work()
                wait_for(device)
    counts = launches_by_range(profiled.events(), kernels_of if is_gpu else operations_of)
    if unseen := [name for name in pieces if not counts.get(name)]:
        raise RuntimeError(f"torch's profiler saw no launches of {unseen[0]}: run it where CUPTI works, or as root")
    return counts


def launches_by_range(events: Any, launches_of: Callable[[Any], int]) -> dict[str, int]:
    """Add up the launches of all events that start within each range, on any thread; backward passes have their own.

    Args:
        events: the events of a session.
        launches_of: the launches of an event on the host.
    """
    on_host = [event for event in events if event.device_type.name == "CPU"]
    ranges = {
        event.name.removeprefix(RANGE): event.time_range for event in on_host if event.name.startswith(RANGE)
    }  # on the host: kernels on a GPU have another clock
    work = [event for event in on_host if not event.is_user_annotation]
    return {
        name: sum(launches_of(event) for event in work if when.start <= event.time_range.start <= when.end)
        for name, when in ranges.items()
    }


def kernels_of(event: Any) -> int:
    """The kernels that an operation on the host launched, without copies and fills ("Memcpy", "Memset")."""
    return sum(not kernel.name.startswith("Mem") for kernel in event.kernels)


def operations_of(event: Any) -> int:
    """1 for an operation of torch that no other operation called."""
    parent = event.cpu_parent
    return int(event.name.startswith("aten::") and not (parent and parent.name.startswith("aten::")))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
