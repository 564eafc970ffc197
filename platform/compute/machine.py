"""Machine: what this node is busy with, under the names that MLflow's pages know as system metrics; and its memory."""

import contextlib
import ctypes
import os
from functools import cache
from typing import Any

import psutil

MEGABYTE = 1e6
# mallopt's parameters (malloc.h): above the first, memory is asked of the kernel piece by piece and given back at once;
# what is free at the heap's end is given back where it is more than the second.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
KEPT_BYTES, KEPT_BYTES_BEFORE_2_35 = (1 << 31) - 1, 1 << 25  # the largest that mallopt takes


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free for the next ones, where glibc is its allocator.

    Every step makes and frees the same tensors. Left alone, glibc hands most of it back to the kernel, which clears
    each page anew: a tenth of a training step on two cores, more of sampling and encoding. The process then holds
    its peak to its end, and that peak is up to a fifth higher.
    """
    is_chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if is_chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # by the user
    with contextlib.suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        # the second alone would have every larger tensor cleared anew
        if libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES_BEFORE_2_35):
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def system_load() -> dict[str, float]:
    """CPU since the last call, memory, disk, network since the start of the machine, and GPUs where NVML answers.

    What the machine does not tell, as in a container without `/proc/net`, is left out.
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
    """NVML's handles of the GPUs; none where there is no driver or `pynvml` is not installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except Exception:
        return []
