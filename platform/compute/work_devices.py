"""Work devices: on which kind of device the workers of a job will compute, and its memory, known before they start."""

import os
from dataclasses import dataclass

from patchloom.platform.compute.actors import actor_shape
from patchloom.platform.compute.devices import own_device
from patchloom.platform.compute.resources import Resources, wait_for_workers
from patchloom.platform.compute.session import ray_session


@dataclass(frozen=True)
class WorkDevice:
    """A device of a worker.

    Args:
        kind: "cpu" or "cuda".
        memory_bytes: total memory of a GPU; 0 for a CPU.
    """

    kind: str = "cpu"
    memory_bytes: int = 0


def process_device() -> WorkDevice:
    """The device of this process."""
    device = own_device()
    if device.type != "cuda":
        return WorkDevice()
    import torch

    return WorkDevice("cuda", torch.cuda.get_device_properties(device).total_memory)


def job_device(workers: int | None, resources: Resources) -> WorkDevice:
    """The device of the workers of a job that uses GPUs if there are any. Waits for a node of a cluster that has one.

    Args:
        workers: as for `run_job`: 0 for this process.
        resources: the nodes that the workers may use.

    Raises:
        UserError: the cluster has no room for a worker.
    """
    if workers == 0 or not os.environ.get("RAY_ADDRESS"):  # a session on this machine has the devices of this process
        return WorkDevice() if workers != 0 and resources.gpus_per_worker == 0 else process_device()
    with ray_session():
        import ray

        shape = actor_shape(on_gpus=True, resources=resources)
        if "GPU" not in shape.bundle:
            return WorkDevice()
        wait_for_workers(1, shape, resources.wait_minutes)
        ask = ray.remote(process_device).options(
            num_cpus=shape.bundle["CPU"], num_gpus=shape.bundle["GPU"], resources=shape.other_resources,
            label_selector=shape.labels or None,
        )  # fmt: skip
        found: WorkDevice = ray.get(ask.remote())
        return found
