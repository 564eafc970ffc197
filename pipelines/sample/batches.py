"""Batches: how many images go through the network together, unless the user says so."""

from pathlib import Path

from patchloom.models.checkpoints import sampling_skeleton
from patchloom.models.generate import Sampling
from patchloom.models.memory import largest_batch, sampling_bytes
from patchloom.pipelines.sample.options import DEFAULT_BATCH

MEMORY_SHARE = 0.5  # the estimate does not see cuDNN's workspaces and what the allocator cannot reuse
LARGEST_BATCH = 64  # a GPU gains little from more, and the last batch is padded


def default_batch(model: Path, sampling: Sampling, kind: str, memory_bytes: int, with_gradients: bool = False) -> int:
    """8 on a CPU; on a GPU the largest power of two up to 64 that needs at most half of its total memory.

    Args:
        model: the model folder.
        sampling: the options of the sampler.
        kind: kind of the device of the workers, "cpu" or "cuda".
        memory_bytes: total memory of a GPU.
        with_gradients: whether sampling needs gradients through the network.
    """
    if kind == "cpu":
        return DEFAULT_BATCH
    skeleton = sampling_skeleton(model)

    def bytes_of(batch: int) -> int:
        return sampling_bytes(skeleton, sampling, batch, kind, with_gradients)

    try:
        return largest_batch(MEMORY_SHARE * memory_bytes, bytes_of, DEFAULT_BATCH, LARGEST_BATCH)
    except NotImplementedError:  # a backbone may not support the meta device
        return DEFAULT_BATCH
