"""Agreement: all workers of a run start at the same step, with the same recipe and weights."""

import hashlib
import socket
from typing import Any

import torch

from patchloom.errors import UserError, WorkersFailed
from patchloom.models.step import TrainingState
from patchloom.platform.compute.workers import Worker

TOLERANCE = 1e-4  # of sums and norms of weights; random numbers may be rounded in another way on another CPU


def check_agreement(worker: Worker, settings: str, state: TrainingState) -> None:
    """Compare the workers of a run before their first step. All workers must call it.

    Args:
        worker: this worker.
        settings: what the run is, as text.
        state: the state that this worker starts with.

    Raises:
        UserError: the workers have different settings.
        WorkersFailed: the workers start at different steps or with different weights. A new start may help.
    """
    everyone = worker.gather({
        "host": socket.gethostname(), "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
        "step": state.step, "weights": _weight_sums(state),
    })  # fmt: skip
    if problem := _difference(everyone, "settings"):
        raise UserError(f"the workers have different recipes: {problem}: check that all nodes see the same files")
    if problem := _difference(everyone, "step"):
        raise WorkersFailed(f"the workers start at different steps: {problem}")
    first = torch.tensor(everyone[0]["weights"])
    for rank, other in enumerate(everyone):
        if not torch.allclose(torch.tensor(other["weights"]), first, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise WorkersFailed(f"worker {rank} on {other['host']} starts with other weights than worker 0")


def _difference(everyone: list[dict[str, Any]], key: str) -> str:
    """The values of the workers if they differ."""
    if len({str(one[key]) for one in everyone}) == 1:
        return ""
    return ", ".join(f"{one[key]} on {one['host']} (worker {rank})" for rank, one in enumerate(everyone))


def _weight_sums(state: TrainingState) -> list[float]:
    """The sum of the values of each parameter divided by its norm, and the norm."""
    sums: list[float] = []
    for parameter in state.denoiser.parameters():
        values = parameter.detach().double()
        norm = float(values.norm())
        sums += [float(values.sum()) / (norm or 1.0), norm]
    return sums
