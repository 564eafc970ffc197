"""U-Nets: the three networks of EDM (DDPM++, NCSN++ and ADM), sized by numbers and free of image size.

Written from Karras et al. 2022 ("EDM", appendix F.2 and Table 7), Song et al. 2021 and Dhariwal &
Nichol 2021. Parameter names follow EDM's published snapshots, so that their weights load one to one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT_HALF = 0.5**0.5


class Initialiser:
    """How a network draws its first weights: uniform, with EDM's gain per layer.

    `fan` is "average" (Xavier, SongUNet) or "in" (Kaiming, DhariwalUNet); `gain` multiplies the weights
    and `bias_gain` the biases.
    """

    def __init__(self, fan: str = "average", gain: float = 1.0, bias_gain: float = 0.0) -> None:
        self.fan, self.gain, self.bias_gain = fan, gain, bias_gain

    def scaled(self, gain: float) -> "Initialiser":
        """The same rule with weights `gain` times the usual; a gain of 0 silences the bias too."""
        return Initialiser(self.fan, gain, self.bias_gain if gain else 0.0)

    def __call__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Draw a layer's weights and biases in place."""
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
    """Group normalisation with at most 32 groups of at least 4 channels (EDM, F.2.1)."""
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in groups: make every width a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=eps)


class Convolution(nn.Module):
    """A convolution that may first halve or double the image through a low-pass filter.

    `kernel` 0 resamples only. `filter_last` convolves before the filter, as NCSN++'s residual input does.
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
            taps = torch.tensor(filter_taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), H and W halved or doubled where the layer resamples."""
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
        if self.is_box:  # the 2x2 box is pooling or repetition, far cheaper than a depthwise convolution
            if self.resample == "down":
                return F.avg_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, groups=channels, stride=2, padding=padding)
        return F.conv_transpose2d(x, 4 * taps, groups=channels, stride=2, padding=padding)


class Dropout(nn.Module):
    """Dropout whose masks come from one generator a block of the batch, so that workers can share a batch.

    `generators` are set before a training step; without any, torch's own dropout draws.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generators: list[torch.Generator] = []

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same with a share of values at 0 and the others scaled up, in training."""
        if not self.training or not self.rate or not self.generators:
            return F.dropout(x, self.rate, self.training)
        shape = (len(x) // len(self.generators), *x.shape[1:])
        luck = [torch.rand(shape, generator=generator, device=x.device) for generator in self.generators]
        return x * (torch.cat(luck) >= self.rate) / (1 - self.rate)


class Block(nn.Module):
    """A residual block: normalise, convolve, add the noise embedding, convolve, and perhaps attend."""

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
        x = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(embedding).to(x.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + condition))
        x = self.conv1(self.dropout(x))
        x = (x + residual) * self.skip_scale
        if self.heads:
            x = (self._attend(self.norm2(x)) + x) * self.skip_scale
        return x

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # EDM's channel order: head, then feature, then which of query, key and value.
        qkv = self.qkv(x).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        query, key, value = (part.transpose(-1, -2).contiguous() for part in qkv.unbind(3))
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(-1, -2).reshape(batch, channels, height, width))
        return out


class NoiseEmbedding(nn.Module):
    """The noise level as sines and cosines: `positional` (DDPM) or `fourier` (random, NCSN++)."""

    def __init__(self, channels: int, kind: str = "positional", endpoint: bool = False) -> None:
        super().__init__()
        half = channels // 2
        if kind == "fourier":
            self.register_buffer("freqs", torch.randn(half) * 16)
        elif kind == "positional":
            steps = torch.arange(half, dtype=torch.float32) / (half - (1 if endpoint else 0))
            self.register_buffer("frequencies", (1 / 10000) ** steps, persistent=False)
        else:
            raise ValueError(f"embedding {kind!r} is unknown: choose positional or fourier")
        self.kind = kind

    def forward(self, noise_condition: Tensor) -> Tensor:
        """(B,) -> (B, channels), cosines first."""
        if self.kind == "fourier":
            angles = noise_condition.outer((2 * torch.pi * self.get_buffer("freqs")).to(noise_condition.dtype))
        else:
            angles = noise_condition.outer(self.get_buffer("frequencies").to(noise_condition.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module, ABC):
    """What the networks share: an encoder whose every output is kept, and a decoder that takes them back."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict

    @abstractmethod
    def embed(self, noise_condition: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) noise condition and (B, K) labels -> (B, E) embedding that every block reads."""

    @abstractmethod
    def finish(self, x: Tensor) -> Tensor:
        """The last normalisation and convolution: (B, C, H, W) features -> (B, channels_out, H, W)."""

    def _build(
        self,
        resolution: int,
        channels_in: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        heads_of: Any,
        block: Any,
        init: Initialiser,
        first_width: int,
        attention_only_last: bool,
        residual_input: bool,
        filter_taps: Sequence[int],
    ) -> int:
        """Lay out the encoder and decoder, names as in EDM's snapshots; returns the decoder's last width."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        kept, width, aux_width = [], first_width, channels_in
        for level, level_width in enumerate(widths):
            size = resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Convolution(channels_in, first_width, 3, init)
            else:
                self.enc[f"{size}x{size}_down"] = block(width, width, resample="down")
                if residual_input:
                    self.enc[f"{size}x{size}_aux_residual"] = Convolution(
                        aux_width, width, 3, init, resample="down", filter_taps=filter_taps, filter_last=True
                    )
                    aux_width = width
            kept.append(width)
            for index in range(blocks):
                heads = heads_of(level_width) if size in attention else 0
                self.enc[f"{size}x{size}_block{index}"] = block(width, level_width, heads=heads)
                width = level_width
                kept.append(width)
        for level, level_width in reversed(list(enumerate(widths))):
            size = resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(width, width, heads=heads_of(width))
                self.dec[f"{size}x{size}_in1"] = block(width, width)
            else:
                self.dec[f"{size}x{size}_up"] = block(width, width, resample="up")
            for index in range(blocks + 1):
                attends = size in attention and (index == blocks or not attention_only_last)
                heads = heads_of(level_width) if attends else 0
                self.dec[f"{size}x{size}_block{index}"] = block(width + kept.pop(), level_width, heads=heads)
                width = level_width
        return width

    def forward(self, x: Tensor, noise_condition: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) and one-hot (B, K) -> (B, channels_out, H, W)."""
        embedding = self.embed(noise_condition, labels)
        kept: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = kept[-1] = aux = (x + layer(aux)) * SQRT_HALF
            else:
                x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
                kept.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                if x.shape[1] != layer.channels_in:
                    x = torch.cat([x, kept.pop()], dim=1)
                x = layer(x, embedding)
        return self.finish(x)


class SongUNet(UNet):
    """DDPM++ (`embedding="positional"`, box filter) and NCSN++ (`embedding="fourier"`, residual input).

    Sizes follow EDM, Table 7: `width` channels times each of `width_multipliers`, `blocks` residual
    blocks a level, attention at the `attention` resolutions of the full-size image.
    """

    def __init__(
        self,
        resolution: int,
        channels_in: int,
        channels_out: int,
        classes: int = 0,
        width: int = 128,
        width_multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding: str = "positional",
        residual_input: bool = False,
        filter_taps: Sequence[int] = (1, 1),
        noise_width_multiplier: int = 1,
    ) -> None:
        super().__init__()
        embedding_width, noise_width = 4 * width, width * noise_width_multiplier
        init = Initialiser("average")
        self.map_noise = NoiseEmbedding(noise_width, embedding, endpoint=True)
        self.map_label = linear(classes, noise_width, init) if classes else None
        self.map_layer0 = linear(noise_width, embedding_width, init)
        self.map_layer1 = linear(embedding_width, embedding_width, init)

        def block(block_in: int, block_out: int, **options: Any) -> Block:
            return Block(
                block_in, block_out, embedding_width, init, dropout=dropout, skip_scale=SQRT_HALF, eps=1e-6,
                adaptive_scale=False, project_resampled=True, filter_taps=filter_taps,
                last_gain=1e-5, attention_gain=0.2**0.5, **options,
            )  # fmt: skip

        last = self._build(
            resolution, channels_in, [width * m for m in width_multipliers], blocks, attention,
            heads_of=lambda _: 1, block=block, init=init, first_width=width, attention_only_last=True,
            residual_input=residual_input, filter_taps=filter_taps,
        )  # fmt: skip
        self.last_level = f"{resolution}x{resolution}"
        self.dec[f"{self.last_level}_aux_norm"] = group_norm(last, 1e-6)
        self.dec[f"{self.last_level}_aux_conv"] = Convolution(last, channels_out, 3, init.scaled(1e-5))

    def embed(self, noise_condition: Tensor, labels: Tensor | None) -> Tensor:
        """Noise, then labels scaled to unit variance, through two layers with SiLU (EDM, F.2.1)."""
        embedding = self.map_noise(noise_condition)
        embedding = embedding.unflatten(1, (2, -1)).flip(1).flatten(1)  # DDPM puts the sines first
        if self.map_label is not None and labels is not None:
            embedding = embedding + self.map_label(labels * self.map_label.in_features**0.5)
        out: Tensor = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        return out

    def finish(self, x: Tensor) -> Tensor:
        """The decoder's own last layers, under the names of the full-size level."""
        x = F.silu(self.dec[f"{self.last_level}_aux_norm"](x))
        out: Tensor = self.dec[f"{self.last_level}_aux_conv"](x)
        return out


class DhariwalUNet(UNet):
    """ADM: more heads, scale-and-shift conditioning, attention in every block of its levels (EDM, F.2.2)."""

    def __init__(
        self,
        resolution: int,
        channels_in: int,
        channels_out: int,
        classes: int = 0,
        width: int = 192,
        width_multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        head_width: int = 64,
    ) -> None:
        super().__init__()
        embedding_width = 4 * width
        init = Initialiser("in", gain=(1 / 3) ** 0.5, bias_gain=(1 / 3) ** 0.5)
        self.map_noise = NoiseEmbedding(width)
        self.map_layer0 = linear(width, embedding_width, init)
        self.map_layer1 = linear(embedding_width, embedding_width, init)
        self.map_label = None
        if classes:
            self.map_label = linear(classes, embedding_width, init, bias=False)
            nn.init.normal_(self.map_label.weight)  # Kaiming's 1/sqrt(K) times EDM's sqrt(K)

        def block(block_in: int, block_out: int, **options: Any) -> Block:
            return Block(
                block_in, block_out, embedding_width, init, dropout=dropout,
                attention_gain=(1 / 3) ** 0.5, **options,
            )  # fmt: skip

        last = self._build(
            resolution, channels_in, [width * m for m in width_multipliers], blocks, attention,
            heads_of=lambda channels: max(1, channels // head_width), block=block, init=init,
            first_width=width * width_multipliers[0], attention_only_last=False, residual_input=False,
            filter_taps=(1, 1),
        )  # fmt: skip
        self.out_norm = group_norm(last, 1e-5)
        self.out_conv = Convolution(last, channels_out, 3, init.scaled(0.0))

    def embed(self, noise_condition: Tensor, labels: Tensor | None) -> Tensor:
        """Noise through two layers; labels join before the last SiLU (EDM, F.2.2)."""
        embedding = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise_condition))))
        if self.map_label is not None and labels is not None:
            embedding = embedding + self.map_label(labels)
        return F.silu(embedding)

    def finish(self, x: Tensor) -> Tensor:
        """The last normalisation, SiLU and convolution."""
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out


NETWORKS: dict[str, type[nn.Module]] = {"song": SongUNet, "dhariwal": DhariwalUNet}
