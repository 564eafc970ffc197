"""Agreement: all workers of a run start from the same checkpoint, with the same recipe and the same bits of state."""

import hashlib
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from patchloom.errors import UserError, WorkersFailed
from patchloom.models.step import TrainingState
from patchloom.pipelines.train.checkpointer import CHECKPOINTS, newest_checkpoint
from patchloom.platform.compute.workers import Worker

SHARED_FOLDER_WAIT_S = 30.0  # until a node sees a file that another node has written, on NFS for example
SEEN_EVERY_S = 0.5
WORD_TYPES = {1: torch.uint8, 2: torch.int16}  # by bytes per value; of all other types, int32


def starting_checkpoint(worker: Worker, folder: Path) -> Path | None:
    """The checkpoint that all workers start from: the newest one that worker 0 sees. None for a new run.

    All workers must call it.

    Raises:
        WorkersFailed: a worker does not see it.
    """
    newest = newest_checkpoint(folder)
    name = worker.gather(newest.name if newest else None)[0]
    if name is None:
        return None
    chosen = folder / CHECKPOINTS / name
    hosts = worker.gather("" if _is_seen(chosen) else socket.gethostname())
    if missing := _by_rank([(rank, host) for rank, host in enumerate(hosts) if host]):
        raise WorkersFailed(
            f"{chosen} is the newest checkpoint for worker 0 and is missing on {missing}: check that all nodes see the "
            "same run folder"
        )
    return chosen


def _is_seen(checkpoint: Path) -> bool:
    deadline = time.monotonic() + SHARED_FOLDER_WAIT_S
    while not (is_seen := (checkpoint / "checkpoint.json").is_file()) and time.monotonic() < deadline:
        time.sleep(SEEN_EVERY_S)
    return is_seen


@torch.no_grad()
def share_initial_weights(worker: Worker, network: nn.Module) -> None:
    """Give all workers the weights of worker 0: another CPU may round the same random numbers in another way."""
    for tensor in _tensors(network):
        worker.share(tensor)


def check_agreement(worker: Worker, settings: str, state: TrainingState) -> None:
    """Compare the workers of a run before their first step. All workers must call it.

    Args:
        worker: this worker.
        settings: what the run is, as text.
        state: the state that this worker starts with.

    Raises:
        UserError: the workers have different settings.
        WorkersFailed: the workers start at different steps or with different weights, averages or moments. A new
            start may help.
    """
    hosts = worker.gather(socket.gethostname())
    everyone = worker.gather({"settings": hashlib.sha256(settings.encode()).hexdigest()[:12]} | _state_of(state))
    if problem := _difference(everyone, hosts, "settings"):
        raise UserError(f"the workers have different recipes: {problem}: check that all nodes see the same files")
    if problem := _difference(everyone, hosts, "step"):
        raise WorkersFailed(f"the workers start at different steps: {problem}")
    for part in ("weights", "averages", "optimizer"):
        if problem := _difference(everyone, hosts, part):
            raise WorkersFailed(f"the workers start with different {part} (checksums): {problem}")


def _state_of(state: TrainingState) -> dict[str, str]:
    """What all workers must have in common, as texts."""
    moments = state.optimizer.state_dict()["state"]
    return {
        "step": str(state.step),
        "weights": checksum(_tensors(state.denoiser)),
        "averages": checksum(chain.from_iterable(_tensors(average.module) for average in state.emas)),
        "optimizer": checksum(value for values in moments.values() for value in values.values()),
    }


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    return chain(network.parameters(), network.buffers())


def _difference(everyone: Sequence[Mapping[str, str]], hosts: Sequence[str], key: str) -> str:
    """The value of worker 0 and of the workers with other values; empty if there are none."""
    values = [one[key] for one in everyone]
    others = [(rank, f"{value} on {hosts[rank]}") for rank, value in enumerate(values) if value != values[0]]
    return _by_rank([(0, f"{values[0]} on {hosts[0]}"), *others]) if others else ""


def _by_rank(texts: Sequence[tuple[int, str]]) -> str:
    return ", ".join(f"{text} (worker {rank})" for rank, text in texts)


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> str:
    """A number of 64 bits as hexadecimal text, which depends on every bit of the tensors and on its place.

    It is the same on every device, because sums of whole numbers modulo 2^64 do not depend on their order.
    """
    total = 0
    for tensor in tensors:
        words = tensor.reshape(-1).view(WORD_TYPES.get(tensor.element_size(), torch.int32)).long()
        odd = torch.arange(1, 2 * len(words), 2, device=tensor.device)
        total = (total * 1_000_003 + int((words * odd).sum()) + len(words)) % 2**64
    return f"{total:016x}"
