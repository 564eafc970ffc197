"""Doctor of one machine: check what the commands need here."""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import patchloom
from patchloom.platform.compute.session import ray_session
from patchloom.platform.progress import say
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.origin import code_commit
from patchloom.platform.tracking.store import shown_registry_uri, shown_uri
from patchloom.platform.tracking.versions import list_versions
from patchloom.redaction import redacted

COUNTED_VERSIONS = 100


@dataclass(frozen=True)
class ServiceCheck:
    """Whether a service works, and what was found there, or its error."""

    works: bool
    found: str


@dataclass(frozen=True)
class MachineHealth:
    """What a machine has and what works there.

    Args:
        versions: by name.
        commit: that of Patchloom's code, empty for installed code.
        system: name and version of the operating system.
        cpus: cores of the machine.
        gpus: names of the GPUs that torch sees.
        folder: the working folder.
        free_gib: free space there.
        services: MLflow and Ray.
    """

    versions: dict[str, str]
    commit: str
    system: str
    cpus: int
    gpus: list[str]
    folder: str
    free_gib: float
    services: dict[str, ServiceCheck]

    @property
    def works(self) -> bool:
        """Whether MLflow and Ray both work."""
        return all(service.works for service in self.services.values())

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {"works": self.works, **asdict(self)}


def check_machine() -> MachineHealth:
    """Check torch, GPUs, disk space, MLflow and Ray, and print one line for each as soon as it is known."""
    import torch

    versions, commit, system, cpus = versions_here(), code_commit(), platform.platform(), os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    lines = [
        f"patchloom {versions['patchloom']}{f', commit {commit[:12]}' if commit else ''}",
        f"Python {versions['python']} on {system}",
        ", ".join(f"{name} {versions[name]}" for name in ("ray", "mlflow", "torch")),
        f"{cpus} CPUs, {len(gpus)} GPUs",
        *(f"  GPU {number}: {name}" for number, name in enumerate(gpus)),
        f"disk: {free_gib:.0f} GiB free in {Path.cwd()}",
    ]
    say("\n".join(lines), is_result=True)
    services = {}
    for name, check in (("MLflow", _check_mlflow), ("Ray", _check_ray)):
        services[name] = one = _checked(check)
        say(f"{name}: {'' if one.works else 'FAILED, '}{one.found}", is_result=True)
    return MachineHealth(versions, commit, system, cpus, gpus, str(Path.cwd()), free_gib, services)


def versions_here() -> dict[str, str]:
    """The versions of Patchloom, of Python, and of the packages that the commands need most."""
    packages = {name: version(name) for name in ("torch", "ray", "mlflow")}
    return {"patchloom": patchloom.__version__, "python": platform.python_version(), **packages}


def _checked(check: Callable[[], str]) -> ServiceCheck:
    try:
        return ServiceCheck(True, check())
    except Exception as error:  # any failure of these libraries is a finding
        lines = str(error).splitlines()
        return ServiceCheck(False, redacted(lines[0]) if lines else type(error).__name__)


def _check_mlflow() -> str:
    require_reachable()
    found = len(list_versions(limit=COUNTED_VERSIONS))
    stores = shown_uri() if shown_registry_uri() == shown_uri() else f"{shown_uri()}, registry {shown_registry_uri()},"
    return f"{stores} works, {found}{' or more' if found == COUNTED_VERSIONS else ''} registered versions"


def _check_ray() -> str:
    with ray_session():
        import ray

        resources = ray.cluster_resources()
        return f"{resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs"
