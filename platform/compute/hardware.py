"""The hardware of this machine in words: processor, cores, memory and GPUs. Needs torch alone."""

import os
import platform
from pathlib import Path

import torch


def machine_words() -> str:
    """This machine in a line, without its name: `NVIDIA H100, AMD EPYC 9654, 16 cores, 128 GiB`."""
    return ", ".join([*gpu_names(), f"{processor_name()}, {usable_cores()} cores, {memory_gib()} GiB"])


def gpu_names() -> list[str]:
    """The GPUs that this process can use."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def processor_name() -> str:
    """The model of the processor, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_gib() -> int:
    """The memory of the machine."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
