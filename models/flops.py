"""FLOPs: of one crop in training, and the peak of a device."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from patchloom.models.cards import DenoiserConfig
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import Denoiser, build_denoiser, skeleton
from patchloom.models.layers import Block, Convolution
from patchloom.models.unet import UNet

# Dense peak FLOP/s of the tensor cores in bf16 and fp16, by part of the device name (NVIDIA's data sheets).
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "V100": 125e12, "L40S": 362e12, "T4": 65e12,
}  # fmt: skip
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # sides of the matrices that measure the peak
LONG_ENOUGH_S = 0.01
TRAINING_OVER_FORWARD = 3  # a backward pass costs as much as two forward passes


def training_flops(config: DenoiserConfig, size: int) -> int:
    """FLOPs of one crop in training: forward and backward, with attention.

    A multiply-add counts as 2, and the backward pass as twice the forward pass. That of a ControlNet is counted,
    because its frozen base needs less.

    Args:
        config: the network.
        size: side of the crop in pixels.

    Raises:
        ValueError: the network cannot be built, or cannot halve the size.
    """
    return flops_by_size(config, [size])[size]


def flops_by_size(config: DenoiserConfig, sizes: Iterable[int]) -> dict[int, int]:
    """`training_flops` of crops of several sizes, by size. Builds the network once."""
    return _by_size(config, sizes, _training_flops)


def evaluation_flops(config: DenoiserConfig, size: int) -> int:
    """FLOPs of one evaluation of the network; arguments and errors are those of `training_flops`."""
    return _by_size(config, [size], _evaluation_flops)[size]


_known: dict[tuple[str, str], dict[int, int]] = {}  # a plan asks for the same counts again and again


def _by_size(
    config: DenoiserConfig, sizes: Iterable[int], count: Callable[[DenoiserConfig, Denoiser, int], int]
) -> dict[int, int]:
    """Counts by size. Each is made once in this process."""
    known, wanted = _known.setdefault((count.__name__, repr(config)), {}), list(sizes)
    if not known.keys() >= set(wanted):
        denoiser = skeleton(config)
        known |= {size: count(config, denoiser, size) for size in wanted if size not in known}
    return {size: known[size] for size in wanted}


def _training_flops(config: DenoiserConfig, denoiser: Denoiser, size: int) -> int:
    if isinstance(denoiser.model, ControlNetwork):
        return _counted(denoiser, size, "meta", backward=True)
    return TRAINING_OVER_FORWARD * _evaluation_flops(config, denoiser, size)


def _evaluation_flops(config: DenoiserConfig, denoiser: Denoiser, size: int) -> int:
    if isinstance(denoiser.model, UNet):
        denoiser.model.check_size(size, size)
        return _forward_flops(denoiser.model, size)
    try:
        return _counted(denoiser, size, "meta")
    except NotImplementedError:  # a backbone may not support the meta device
        return _counted(build_denoiser(config), size, "cpu")


def _forward_flops(network: UNet, size: int) -> int:
    """FLOPs of the forward pass, layer by layer; torch's own counter is slow to import."""
    resolution = network.resolution
    counted = [*network.enc.items(), *network.dec.items()]
    total = sum(_layer_flops(layer, int(name.split("x")[0]) * size // resolution) for name, layer in counted)
    inside = (network.enc, network.dec, network.map_augment)  # without augmentation
    rest = [layer for layer in network.children() if not any(layer is other for other in inside)]
    return total + sum(_layer_flops(layer, size) for layer in rest)


def _layer_flops(layer: nn.Module, side: int) -> int:
    """FLOPs of a layer and its submodules, for an output of `side` x `side` pixels."""
    total = 0
    for module in layer.modules():
        if isinstance(module, Block):
            if module.heads:  # scores, and their weighted sum
                total += 4 * module.channels_out * side**4
            resampled = (each for each in (module.conv0, module.skip) if each is not None)
            total += sum(_filter_flops(each, module.channels_in, side) for each in resampled)
        elif isinstance(module, Convolution) and module.weight is not None:
            total += 2 * module.weight.numel() * _convolved_side(module, side) ** 2
        elif isinstance(module, nn.Linear):
            total += 2 * module.weight.numel()
    if isinstance(layer, Convolution) and layer.filter_last and layer.weight is not None:
        total += _filter_flops(layer, layer.weight.shape[0], side)
    return total


def _convolved_side(layer: Convolution, side: int) -> int:
    """Side of the output of a convolution; it is larger before a final filter that halves it."""
    if layer.filter_last and layer.resample == "down":
        return 2 * side + 2 * ((layer.resample_filter.shape[-1] - 1) // 2)
    return side


def _filter_flops(layer: Convolution, channels: int, side: int) -> int:
    """FLOPs of the low-pass filter of a resampling layer; pooling and repetition count as 0."""
    if layer.resample is None or layer.is_box:
        return 0
    pixels = side**2 if layer.resample == "down" else (side // 2) ** 2
    return 2 * channels * layer.resample_filter.numel() * pixels


def _counted(denoiser: Denoiser, size: int, device: str, backward: bool = False) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device(device):
        noisy = torch.zeros(1, denoiser.channels, size, size)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            estimate = denoiser.eval()(noisy, torch.ones(1))
            if backward:
                estimate.sum().backward()
    return int(counter.get_total_flops())


def parameter_count(denoiser: Denoiser) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in denoiser.parameters())


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak FLOP/s of a device, and its source.

    Args:
        device: the device.
        dtype: the precision.

    Returns:
        The peak, and "data sheet" for GPUs with a known half-precision peak, or "measured" (takes about 0.1 s).
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        if known is not None:
            return known, "data sheet"
    return _measured_peak(device, dtype), "measured"


@torch.no_grad()
def _measured_peak(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """The best rate over products of growing matrices, until one takes long enough to measure."""
    generator = torch.Generator(device).manual_seed(0)  # not zeros, which are faster on some GPUs
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
    began = device_time(matrix.device)
    torch.mm(matrix, matrix)
    return device_time(matrix.device) - began


def device_time(device: torch.device) -> float:
    """The time in seconds, once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
