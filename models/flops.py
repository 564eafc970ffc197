"""FLOPs: what one crop costs to train on, and how many a second a device can do."""

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchloom.models.denoiser import Denoiser, build_denoiser

# Dense peaks of the tensor cores in bf16 and fp16, FLOP/s, by what the device's name holds (NVIDIA's data sheets)
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "V100": 125e12, "L40S": 362e12, "T4": 65e12,
}  # fmt: skip
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of the matrices of a measured peak
LONG_ENOUGH_S = 0.01


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


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The most FLOP/s of a device in a precision, and where the number is from.

    "data sheet" for GPUs whose half-precision peak is known; else "measured": the fastest product of two
    square matrices here and now, on this process's threads. It takes about 0.1 s.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        if known is not None:
            return known, "data sheet"
    return _measured_peak(device, dtype), "measured"


@torch.no_grad()
def _measured_peak(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Products of growing matrices, the best of `repeats` each, until one takes long enough to be timed well."""
    generator = torch.Generator(device).manual_seed(0)  # zeros would be faster than numbers on some GPUs
    best = 0.0
    for side in SIDES:
        matrix = torch.rand(side, side, generator=generator, device=device).to(dtype)
        torch.mm(matrix, matrix)
        seconds = min(_seconds_of_product(matrix) for _ in range(repeats))
        best = max(best, 2 * side**3 / seconds)
        if seconds > LONG_ENOUGH_S:
            break
    return best


def _seconds_of_product(matrix: torch.Tensor) -> float:
    began = _now(matrix.device)
    torch.mm(matrix, matrix)
    return _now(matrix.device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
