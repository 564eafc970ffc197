"""Machine: what was measured on, in words and numbers, and how busy others keep it."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "ray", "mlflow", "diffusers", "numpy", "pyarrow", "pillow")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU, threads and versions; nothing that names the host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    described: dict[str, Any] = {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
    }
    words = f"{described['processor']}, {described['cpus']} cores, {described['memory_gib']} GiB"
    described["words"] = ", ".join([*gpus, words, f"torch {torch.__version__}"])
    return described


def code_digest() -> str:
    """Twelve hexadecimal digits of the sha256 of all of the package's Python files: which code was measured."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for room in ("benchmarks", "models", "pipelines", "platform"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def busy_share(seconds: float = 1.0) -> float:
    """What share of all cores is at work while this process only waits."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
