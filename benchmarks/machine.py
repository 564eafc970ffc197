"""The machine of a measurement: processor, memory, GPUs and versions, and how busy other processes keep it."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from patchloom.platform.compute.hardware import gpu_names, machine_words, memory_gib, processor_name, usable_cores

PACKAGES = ("torch", "ray", "mlflow", "diffusers", "numpy", "pyarrow", "pillow")


@dataclass(frozen=True)
class Machine:
    """What a benchmark ran on; nothing that names the host. The fields are the keys of the result file."""

    processor: str
    cpus: int | None
    memory_gib: int
    gpus: list[str]
    cuda: str | None
    cudnn: int | None
    threads: int
    python: str
    versions: dict[str, str]
    words: str  # all of it in one line


def describe_machine() -> Machine:
    """This machine."""
    gpus = gpu_names()
    return Machine(
        processor=processor_name(),
        cpus=usable_cores(),
        memory_gib=memory_gib(),
        gpus=gpus,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if gpus else None,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name))},
        words=f"{machine_words()}, torch {torch.__version__}",
    )


def busy_share(seconds: float = 1.0) -> float:
    """The share of all cores that is busy while this process waits."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
