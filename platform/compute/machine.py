"""The machine: its load, under the names of MLflow's system metrics, and the memory allocator."""

import contextlib
import ctypes
import os
from functools import cache
from typing import Any

import psutil

MEGABYTE = 1e6
MOST_GPUS = 16  # of a node, whose load is measured
# Parameters of mallopt (malloc.h): a request above the first is mapped from the kernel and returned when it is freed;
# free memory at the end of the heap is returned if it is more than the second.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
KEPT_BYTES, KEPT_BYTES_BEFORE_2_35 = (1 << 31) - 1, 1 << 25  # the largest values that mallopt accepts


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors in this process for new tensors, if it uses glibc.

    Each step allocates and frees the same tensors. By default, glibc returns most of this memory to the kernel, which
    then clears each page again: that takes a tenth of a training step on two cores, and more of sampling and encoding.
    The process keeps its peak memory until it ends, and the peak is up to a fifth higher.
    """
    is_chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if is_chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # the user chose
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        # with the second alone, pages of larger tensors would still be cleared
        if libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES_BEFORE_2_35):
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


# what `system_load` can return, so that the loads of nodes fill tensors of one shape
LOAD_NAMES = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
    *(
        f"gpu_{number}_{what}"
        for number in range(MOST_GPUS)
        for what in ("utilization_percentage", "memory_usage_percentage", "power_usage_watts")
    ),
)


def system_load() -> dict[str, float]:
    """CPU load since the last call, memory, disk, network traffic since boot, and GPUs if NVML is available.

    Values that the machine does not provide, as in a container without `/proc/net`, are missing.
    """
    load: dict[str, float] = {}
    for part in (_processors, _memory, _disk, _network, _gpus):
        with contextlib.suppress(psutil.Error, OSError, AttributeError):
            load |= part()
    return load


def _processors() -> dict[str, float]:
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def _memory() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
    }


def _disk() -> dict[str, float]:
    disk = psutil.disk_usage("/")
    return {"disk_usage_percentage": disk.percent, "disk_available_megabytes": disk.free / MEGABYTE}


def _network() -> dict[str, float]:
    network = psutil.net_io_counters()
    return {
        "network_receive_megabytes": network.bytes_recv / MEGABYTE,
        "network_transmit_megabytes": network.bytes_sent / MEGABYTE,
    }


def _gpus() -> dict[str, float]:
    load = {}
    for number, handle in enumerate(_handles()):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            used = pynvml.nvmlDeviceGetMemoryInfo(handle)
            load[f"gpu_{number}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            load[f"gpu_{number}_memory_usage_percentage"] = 100 * used.used / used.total
            load[f"gpu_{number}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return load


@cache
def _handles() -> list[Any]:
    """NVML's handles of the GPUs; empty without a driver or the package `pynvml`."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [
            pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(min(pynvml.nvmlDeviceGetCount(), MOST_GPUS))
        ]
    except Exception:
        return []
