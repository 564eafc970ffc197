"""Inception: the network of 2015-12-05 that the Fréchet Inception Distance is defined on, in eager torch.

The layout is that of TensorFlow's graph (Szegedy et al. 2015). It differs from other Inceptions: average pools ignore
the border, the last block has a maximum pool, and images are resized by TensorFlow 1's bilinear filter.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, POOL_WIDTH, LOGITS = 299, 2048, 1008
RESIZE = "bilinear of TensorFlow 1 (no half-pixel centres, no antialiasing)"
SPATIAL_CHANNELS = 7  # of Mixed_6d's 1 x 1 branch, after its ReLU (Nash et al. 2021)

# name: (channels out, kernel height, kernel width, stride, padded)
Convs = dict[str, tuple[int, int, int, int, bool]]


class ConvNorm(nn.Module):
    """A convolution, batch normalisation with fixed moments, and a ReLU."""

    def __init__(self, channels_in: int, out: int, height: int, width: int, stride: int = 1, padded: bool = True):
        super().__init__()
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(channels_in, out, (height, width), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches, concatenated along the channels.

    Args:
        channels_in: channels of the input.
        convs: convolutions by name.
        branches: each a sequence of names: a convolution, a pool of `POOLS`, or two convolutions of the same input
            joined by "+".
    """

    def __init__(self, channels_in: int, convs: Convs, branches: list[list[str]]) -> None:
        super().__init__()
        self.branches = branches
        self.channels_out = 0
        for branch in branches:
            channels = channels_in
            for step in branch:
                if step in POOLS:
                    continue
                for name in step.split("+"):
                    self.add_module(name, ConvNorm(channels, *convs[name]))
                channels = sum(convs[name][0] for name in step.split("+"))
            self.channels_out += channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels_out, H', W')."""
        return torch.cat([self._branch(x, branch) for branch in self.branches], 1)

    def _branch(self, x: Tensor, steps: list[str]) -> Tensor:
        for step in steps:
            if step in POOLS:
                x = POOLS[step](x)
            else:
                x = torch.cat([self.get_submodule(name)(x) for name in step.split("+")], 1)
        return x


POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halving": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _mixed_5(pool: int) -> tuple[Convs, list[list[str]]]:
    convs = {
        "branch1x1": (64, 1, 1, 1, True),
        "branch5x5_1": (48, 1, 1, 1, True),
        "branch5x5_2": (64, 5, 5, 1, True),
        "branch3x3dbl_1": (64, 1, 1, 1, True),
        "branch3x3dbl_2": (96, 3, 3, 1, True),
        "branch3x3dbl_3": (96, 3, 3, 1, True),
        "branch_pool": (pool, 1, 1, 1, True),
    }
    branches = [["branch1x1"], ["branch5x5_1", "branch5x5_2"], _numbered("branch3x3dbl", 3), ["average", "branch_pool"]]
    return convs, branches


def _mixed_6a() -> tuple[Convs, list[list[str]]]:
    convs = {
        "branch3x3": (384, 3, 3, 2, False),
        "branch3x3dbl_1": (64, 1, 1, 1, True),
        "branch3x3dbl_2": (96, 3, 3, 1, True),
        "branch3x3dbl_3": (96, 3, 3, 2, False),
    }
    return convs, [["branch3x3"], _numbered("branch3x3dbl", 3), ["halving"]]


def _mixed_6(width: int) -> tuple[Convs, list[list[str]]]:
    convs = {
        "branch1x1": (192, 1, 1, 1, True),
        "branch7x7_1": (width, 1, 1, 1, True),
        "branch7x7_2": (width, 1, 7, 1, True),
        "branch7x7_3": (192, 7, 1, 1, True),
        "branch7x7dbl_1": (width, 1, 1, 1, True),
        "branch7x7dbl_2": (width, 7, 1, 1, True),
        "branch7x7dbl_3": (width, 1, 7, 1, True),
        "branch7x7dbl_4": (width, 7, 1, 1, True),
        "branch7x7dbl_5": (192, 1, 7, 1, True),
        "branch_pool": (192, 1, 1, 1, True),
    }
    branches = [["branch1x1"], _numbered("branch7x7", 3), _numbered("branch7x7dbl", 5), ["average", "branch_pool"]]
    return convs, branches


def _mixed_7a() -> tuple[Convs, list[list[str]]]:
    convs = {
        "branch3x3_1": (192, 1, 1, 1, True),
        "branch3x3_2": (320, 3, 3, 2, False),
        "branch7x7x3_1": (192, 1, 1, 1, True),
        "branch7x7x3_2": (192, 1, 7, 1, True),
        "branch7x7x3_3": (192, 7, 1, 1, True),
        "branch7x7x3_4": (192, 3, 3, 2, False),
    }
    return convs, [_numbered("branch3x3", 2), _numbered("branch7x7x3", 4), ["halving"]]


def _mixed_7(pool: str) -> tuple[Convs, list[list[str]]]:
    convs = {
        "branch1x1": (320, 1, 1, 1, True),
        "branch3x3_1": (384, 1, 1, 1, True),
        "branch3x3_2a": (384, 1, 3, 1, True),
        "branch3x3_2b": (384, 3, 1, 1, True),
        "branch3x3dbl_1": (448, 1, 1, 1, True),
        "branch3x3dbl_2": (384, 3, 3, 1, True),
        "branch3x3dbl_3a": (384, 1, 3, 1, True),
        "branch3x3dbl_3b": (384, 3, 1, 1, True),
        "branch_pool": (192, 1, 1, 1, True),
    }
    branches = [
        ["branch1x1"],
        ["branch3x3_1", "branch3x3_2a+branch3x3_2b"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a+branch3x3dbl_3b"],
        [pool, "branch_pool"],
    ]
    return convs, branches


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{number}" for number in range(1, count + 1)]


MIXED = {
    "Mixed_5b": _mixed_5(32), "Mixed_5c": _mixed_5(64), "Mixed_5d": _mixed_5(64), "Mixed_6a": _mixed_6a(),
    "Mixed_6b": _mixed_6(128), "Mixed_6c": _mixed_6(160), "Mixed_6d": _mixed_6(160), "Mixed_6e": _mixed_6(192),
    "Mixed_7a": _mixed_7a(), "Mixed_7b": _mixed_7("average"), "Mixed_7c": _mixed_7("maximum"),
}  # fmt: skip


class Inception(nn.Module):
    """Images to features. Parameter names are those of the port `pt_inception-2015-12-05`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 3, padded=False)
        channels = 192
        for name, (convs, branches) in MIXED.items():
            block = Mixed(channels, convs, branches)
            self.add_module(name, block)
            channels = block.channels_out

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) of any dtype, 0 ... 255 -> `pool` (B, 2048), `spatial` (B, 2023) and the early `pool64` (B, 64).

        `spatial` has 7 channels of 17 x 17, channels last as in TensorFlow (sFID, Nash et al. 2021). `pool64` has the
        means after the first maximum pool.
        """
        x = (tensorflow_resize(images.float(), SIDE) - 128) / 128
        x = POOLS["halving"](self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        features = {"pool64": x.mean((2, 3))}
        x = POOLS["halving"](self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in MIXED:
            block = self.get_submodule(name)
            if name == "Mixed_6d":
                spatial = block.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
                features["spatial"] = spatial.permute(0, 2, 3, 1).flatten(1)
            x = block(x)
        return features | {"pool": x.mean((2, 3))}


def tensorflow_resize(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resize: (B, C, H, W) float -> (B, C, side, side).

    Output pixel i is at i * H / side of the input; the last input pixel is repeated. There is no antialiasing.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        if length == side:
            continue
        place = torch.arange(side, dtype=torch.float32, device=images.device) * (length / side)
        low = place.long()  # floor, as places are not negative
        share = (place - low).view(-1, *(1,) * (3 - axis))
        first, second = (images.index_select(axis, at.clamp(max=length - 1)) for at in (low, low + 1))
        images = first + (second - first) * share
    return images


def inception_state(tensors: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], Tensor | None]:
    """The weights of an Inception file of 2015-12-05, with the names of this network.

    Args:
        tensors: a state dict (any shape) with the names of the port (`Mixed_5b.branch1x1.conv.weight`, ...) or of
            TensorFlow (`...layers.mixed.conv.weight`, `.beta`, `.mean`, `.var`) in the same order.

    Returns:
        The weights, and the (1008, 2048) classifier or None.

    Raises:
        ValueError: the tensors belong to another network.
    """
    with torch.device("meta"):
        wanted = Inception().state_dict()
    wanted = OrderedDict((name, tensor) for name, tensor in wanted.items() if "num_batches" not in name)
    found = OrderedDict(zip(wanted, _in_order(tensors), strict=False)) if _is_tensorflow(tensors) else tensors
    missing = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
    if missing:
        raise ValueError(f"{missing[0]} is missing or has another shape than in the Inception of 2015-12-05")
    heads = [tensors[name] for name in ("fc.weight", "output.weight") if name in tensors]
    classifier = heads[0].float() if heads and heads[0].shape == (LOGITS, POOL_WIDTH) else None
    return OrderedDict((name, found[name].float().contiguous()) for name in wanted), classifier


def _is_tensorflow(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(".beta") for name in tensors)


def _in_order(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Weight, gain (1, as TensorFlow has none), offset, mean and variance of each layer."""
    for name in tensors:
        layer = name.removesuffix(".weight")
        if layer != name and f"{layer}.beta" in tensors:
            beta = tensors[f"{layer}.beta"]
            yield from (tensors[name], torch.ones_like(beta), beta, tensors[f"{layer}.mean"], tensors[f"{layer}.var"])


def load_inception(state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Inception:
    """Build the network from the weights of `inception_state` (any shape), with folded batch normalisations."""
    network = Inception().eval().requires_grad_(False)
    network.load_state_dict(dict(state), strict=False)  # the counters of training are missing
    for module in list(network.modules()):
        if isinstance(module, ConvNorm) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(device)
