"""Layers: the parts of the U-Nets, with EDM's initialisation and parameter names.

Written from Karras et al. 2022 ("EDM", appendix F.2), Song et al. 2021 and Dhariwal & Nichol 2021.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Initialiser:
    """Draws initial weights: uniform, with EDM's gain per layer.

    Args:
        fan: "average" (Xavier, SongUNet) or "in" (Kaiming, DhariwalUNet).
        gain: factor of the weights.
        bias_gain: factor of the biases.
    """

    def __init__(self, fan: str = "average", gain: float = 1.0, bias_gain: float = 0.0) -> None:
        self.fan, self.gain, self.bias_gain = fan, gain, bias_gain

    def scaled(self, gain: float) -> "Initialiser":
        """The same rule with another gain of the weights; a gain of 0 also gives biases of 0."""
        return Initialiser(self.fan, gain, self.bias_gain if gain else 0.0)

    def __call__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Draw the weights and biases (any shape) of a layer in place; nothing on the meta device."""
        if weight.is_meta:
            return
        receptive = weight[0, 0].numel()
        fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] * receptive
        bound = (3 / fan_in) ** 0.5 if self.fan == "in" else (6 / (fan_in + fan_out)) ** 0.5
        nn.init.uniform_(weight, -bound, bound)
        weight.data.mul_(self.gain)
        if bias is not None:
            nn.init.uniform_(bias, -bound, bound)
            bias.data.mul_(self.bias_gain)


def linear(features_in: int, features_out: int, init: Initialiser, bias: bool = True) -> nn.Linear:
    """A linear layer drawn by `init`."""
    layer = nn.Linear(features_in, features_out, bias=bias)
    init(layer.weight, layer.bias)
    return layer


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least 4 channels (EDM, F.2.1).

    Raises:
        ValueError: the channels do not divide into the groups.
    """
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ValueError(f"{channels} channels do not divide into groups: make every width a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=eps)


def silu_in_place(x: Tensor) -> Tensor:
    """SiLU of a tensor of any shape; in place without gradients, so nothing else may read the tensor."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def on_default_device(constant: Tensor) -> Tensor:
    """Move a constant of any shape to the default device.

    Computing it on the meta device would make torch import its compiler.
    """
    return constant.to(torch.get_default_device())


class Convolution(nn.Module):
    """A convolution that may first halve or double the image through a low-pass filter.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        kernel: side of the kernel; 0 only resamples.
        init: draws the weights.
        resample: "down", "up" or None.
        filter_taps: taps of the low-pass filter.
        filter_last: convolve before the filter, as in the residual input of NCSN++.
        bias: whether there is a bias.
    """

    resample_filter: Tensor

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        init: Initialiser,
        *,
        resample: str | None = None,
        filter_taps: Sequence[int] = (1, 1),
        filter_last: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.kernel, self.resample, self.filter_last = kernel, resample, filter_last
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(channels_out, channels_in, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(channels_out)) if bias else None
            init(self.weight, self.bias)
        self.is_box = tuple(filter_taps) == (1, 1)
        if resample:
            taps = torch.tensor(filter_taps, dtype=torch.float32, device="cpu")
            self.register_buffer("resample_filter", on_default_device((taps.outer(taps) / taps.sum() ** 2)[None, None]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'), halved or doubled if the layer resamples."""
        if self.filter_last and self.resample == "down" and self.weight is not None:
            margin = self.kernel // 2 + (self.resample_filter.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight.to(x.dtype), padding=margin)
            x = self._filter(x, padding=0)
            return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]
        if self.resample:
            x = self._filter(x, padding=(self.resample_filter.shape[-1] - 1) // 2)
        if self.weight is None:
            return x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.kernel // 2)

    def _filter(self, x: Tensor, padding: int) -> Tensor:
        if self.is_box:  # the 2x2 box is pooling or repetition, which is faster than a depthwise convolution
            if self.resample == "down":
                return F.avg_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, groups=channels, stride=2, padding=padding)
        return F.conv_transpose2d(x, 4 * taps, groups=channels, stride=2, padding=padding)


class DropoutMasks(Protocol):
    """The dropout masks of a batch, which do not depend on how workers share the batch."""

    def kept(self, x: Tensor, rate: float, layer: int) -> Tensor:
        """A mask of 0 and 1 in the shape of x (B, C, H, W), from the number of the layer; a share `rate` of it is 0."""


class Dropout(nn.Module):
    """Dropout whose masks are set before a training step. Without them torch draws."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.masks: DropoutMasks | None = None
        self.number = 0  # number of the layer, so that masks of layers differ

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); in training a share of the values is 0 and the others are scaled up."""
        if not self.training or not self.rate or self.masks is None:
            return F.dropout(x, self.rate, self.training)
        return (x * self.masks.kept(x, self.rate, self.number)).div_(1 - self.rate)


class Block(nn.Module):
    """A residual block: normalisation, convolution, noise embedding, convolution and optional attention."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        init: Initialiser,
        *,
        heads: int = 0,
        resample: str | None = None,
        filter_taps: Sequence[int] = (1, 1),
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        adaptive_scale: bool = True,
        project_resampled: bool = False,
        last_gain: float = 0.0,
        attention_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels_in, self.channels_out, self.heads = channels_in, channels_out, heads
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        resampling: dict[str, Any] = {"resample": resample, "filter_taps": filter_taps}
        self.norm0 = group_norm(channels_in, eps)
        self.conv0 = Convolution(channels_in, channels_out, 3, init, **resampling)
        self.affine = linear(embedding, channels_out * (2 if adaptive_scale else 1), init)
        self.norm1 = group_norm(channels_out, eps)
        self.dropout = Dropout(dropout)
        self.conv1 = Convolution(channels_out, channels_out, 3, init.scaled(last_gain))
        self.skip: Convolution | None = None
        if channels_in != channels_out or resample:
            kernel = 1 if channels_in != channels_out or project_resampled else 0
            self.skip = Convolution(channels_in, channels_out, kernel, init, **resampling)
        if heads:
            self.norm2 = group_norm(channels_out, eps)
            self.qkv = Convolution(channels_out, 3 * channels_out, 1, init.scaled(attention_gain))
            self.proj = Convolution(channels_out, channels_out, 1, init.scaled(last_gain))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, H, W) and (B, E) -> (B, C', H', W')."""
        residual = x if self.skip is None else self.skip(x)
        x = self.conv0(silu_in_place(self.norm0(x)))
        condition = self.affine(embedding).to(x.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            x = silu_in_place(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = silu_in_place(self.norm1(x.add_(condition)))
        x = self.conv1(self.dropout(x)).add_(residual).mul_(self.skip_scale)
        if self.heads:
            x = self._attend(self.norm2(x)).add_(x).mul_(self.skip_scale)
        return x

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # EDM's channel order: head, feature, then query, key and value
        qkv = self.qkv(x).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        query, key, value = (part.transpose(-1, -2).contiguous() for part in qkv.unbind(3))
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(-1, -2).reshape(batch, channels, height, width))
        return out


class NoiseEmbedding(nn.Module):
    """A number as sines and cosines.

    Args:
        channels: width of the embedding.
        kind: "positional" (DDPM) or "fourier" (random frequencies, NCSN++).
        endpoint: whether the frequencies include the smallest one.
        sines_first: sines before cosines, as in EDM's SongUNet.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(
        self, channels: int, kind: str = "positional", endpoint: bool = False, sines_first: bool = False
    ) -> None:
        super().__init__()
        half = channels // 2
        if kind == "fourier":
            self.register_buffer("freqs", on_default_device(torch.randn(half, device="cpu") * 16))
        elif kind == "positional":
            steps = torch.arange(half, dtype=torch.float32, device="cpu") / (half - (1 if endpoint else 0))
            self.register_buffer("frequencies", on_default_device((1 / 10000) ** steps), persistent=False)
        else:
            raise ValueError(f"embedding {kind!r} is unknown: choose positional or fourier")
        self.kind, self.sines_first = kind, sines_first

    def forward(self, values: Tensor) -> Tensor:
        """(B,) -> (B, channels)."""
        if self.kind == "fourier":
            angles = values.outer((2 * torch.pi * self.get_buffer("freqs")).to(values.dtype))
        else:
            angles = values.outer(self.get_buffer("frequencies").to(values.dtype))
        parts = [angles.sin(), angles.cos()] if self.sines_first else [angles.cos(), angles.sin()]
        return torch.cat(parts, dim=1)
