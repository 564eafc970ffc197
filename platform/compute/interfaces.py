"""Interfaces: over which network interface the workers of a training run reach each other."""

import math
import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from patchloom.platform.compute.devices import DEVICE_VARIABLE

INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo reads it, and so does torch's own rendezvous


class _BoundTorchBackend(_TorchBackend):
    """Sets the interface on each worker before the workers connect to each other."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_ray)
        super().on_start(worker_group, backend_config)


@dataclass
class BoundTorchConfig(TorchConfig):
    """The torch process group of Ray Train, on the interface that Ray uses.

    Without it, gloo looks up the host name. On a node whose name has no address, or that of the loopback interface,
    other nodes could not reach it.
    """

    @property
    def backend_cls(self) -> type[_BoundTorchBackend]:
        """What sets up the process group."""
        return _BoundTorchBackend


def torch_config(collective_minutes: float) -> BoundTorchConfig:
    """The process group of a run: NCCL if Ray reserves GPUs for its workers and they use them, otherwise gloo.

    Args:
        collective_minutes: how long a worker waits for another one in an operation of all workers.
    """
    uses_cpu = os.environ.get(DEVICE_VARIABLE, "").startswith("cpu")
    return BoundTorchConfig(backend="gloo" if uses_cpu else None, timeout_s=math.ceil(60 * collective_minutes))


def use_interface_of_ray() -> None:
    """Let gloo use the interface with the address of this Ray node, unless the user chose one."""
    import ray.util

    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """The name of the network interface with an address; None if there is none."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.family in families and found.address.split("%")[0] == address for found in addresses):
            return str(name)
    return None
