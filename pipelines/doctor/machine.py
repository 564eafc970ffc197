"""Doctor of one machine: check what the commands need here."""

import os
import shutil
from pathlib import Path

from patchloom.platform.compute.session import ray_session
from patchloom.platform.progress import say
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.store import shown_registry_uri, shown_uri
from patchloom.platform.tracking.versions import list_versions

COUNTED_VERSIONS = 100


def doctor() -> bool:
    """Check torch, GPUs, disk space, MLflow and Ray, and print one line for each.

    Returns:
        True if MLflow and Ray both work.
    """
    import torch

    say(f"torch {torch.__version__}, {os.cpu_count()} CPUs, {torch.cuda.device_count()} GPUs", is_result=True)
    for index in range(torch.cuda.device_count()):
        say(f"  GPU {index}: {torch.cuda.get_device_name(index)}", is_result=True)
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    say(f"disk: {free_gib:.0f} GiB free in {Path.cwd()}", is_result=True)
    works = True
    for name, check in (("MLflow", _check_mlflow), ("Ray", _check_ray)):
        try:
            say(f"{name}: {check()}", is_result=True)
        except Exception as error:  # any failure of these libraries is a finding
            works = False
            say(f"{name}: FAILED, {str(error).splitlines()[0] if str(error) else type(error).__name__}", is_result=True)
    return works


def _check_mlflow() -> str:
    require_reachable()
    found = len(list_versions(limit=COUNTED_VERSIONS))
    stores = shown_uri() if shown_registry_uri() == shown_uri() else f"{shown_uri()}, registry {shown_registry_uri()},"
    return f"{stores} works, {found}{' or more' if found == COUNTED_VERSIONS else ''} registered versions"


def _check_ray() -> str:
    with ray_session():
        import ray

        resources = ray.cluster_resources()
        return f"version {ray.__version__}, {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs"
