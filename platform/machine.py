"""Machine: what this node is busy with, under the names that MLflow's pages know as system metrics."""

import contextlib
from functools import cache
from typing import Any

import psutil

MEGABYTE = 1e6


def system_load() -> dict[str, float]:
    """CPU since the last call, memory, disk, network since the start of the machine, and GPUs where NVML answers."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    load = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
        "network_receive_megabytes": network.bytes_recv / MEGABYTE,
        "network_transmit_megabytes": network.bytes_sent / MEGABYTE,
    }
    for number, handle in enumerate(_gpus()):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            used = pynvml.nvmlDeviceGetMemoryInfo(handle)
            load[f"gpu_{number}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            load[f"gpu_{number}_memory_usage_percentage"] = 100 * used.used / used.total
            load[f"gpu_{number}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return load


@cache
def _gpus() -> list[Any]:
    """NVML's handles of the GPUs; none where there is no driver or `pynvml` is not installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except Exception:
        return []
