"""Limits: the best rates that this machine reaches, measured next to the work."""

import torch
import torch.nn.functional as F

from patchloom.benchmarks.interleaved import now
from patchloom.models.flops import peak_flops

CONVOLUTIONS = ((8, 64, 64), (8, 128, 32), (32, 128, 64), (64, 256, 32))  # batch, channels, side
LONG_ENOUGH_S = 0.01
REPEATS = 10  # the best of them counts, because a machine that is busy for a moment gives a limit that is too low


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products, the best of `REPEATS`; takes about a second."""
    return max(peak_flops(device, dtype)[0] for _ in range(REPEATS))


@torch.no_grad()
def convolution_flops(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> float:
    """FLOP/s of the fastest 3x3 convolution among typical shapes of a U-Net, the best of `repeats` each."""
    best = 0.0
    for batch, channels, side in CONVOLUTIONS:
        x = torch.rand(batch, channels, side, side, device=device).to(dtype)
        weight = torch.rand(channels, channels, 3, 3, device=device).to(dtype)
        if dtype != torch.float32:
            x, weight = (each.to(memory_format=torch.channels_last) for each in (x, weight))
        F.conv2d(x, weight, padding=1)
        for _ in range(repeats):
            start = now()
            F.conv2d(x, weight, padding=1)
            seconds = now() - start
            best = max(best, 2 * 9 * batch * (channels * side) ** 2 / seconds)
        if device.type == "cpu" and seconds > LONG_ENOUGH_S:
            break
    return best


@torch.no_grad()
def copy_bytes_per_second(device: torch.device, mebibytes: int = 256, repeats: int = REPEATS) -> float:
    """Bytes per second that a copy in memory reads and writes, the best of `repeats`."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = 0.0
    for _ in range(repeats):
        start = now()
        target.copy_(source)
        best = max(best, 2 * source.numel() * 4 / (now() - start))
    return best
