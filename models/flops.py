"""FLOPs: what one crop costs to train on, counted by torch on tensors that hold no data."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchloom.models.denoiser import Denoiser, build_denoiser


def training_flops(config: dict[str, Any], size: int) -> int:
    """FLOPs of one crop of `size` pixels, forward and backward, attention included.

    A multiply-add counts 2, and the backward pass twice the forward. config: see `build_denoiser`. Raises
    ValueError for a network that cannot be built, or a size that it cannot halve.
    """
    try:
        return _counted(config, size, "meta")
    except NotImplementedError:  # a backbone may need numbers to work with
        return _counted(config, size, "cpu")


def _counted(config: dict[str, Any], size: int, device: str) -> int:
    with torch.device(device):
        denoiser = build_denoiser(config).eval()
        noisy = torch.zeros(1, config["channels"], size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(noisy, torch.ones(1))
    return 3 * int(counter.get_total_flops())


def parameter_count(denoiser: Denoiser) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in denoiser.parameters())
