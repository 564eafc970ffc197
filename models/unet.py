"""U-Nets: the three networks of EDM (DDPM++, NCSN++ and ADM), for images of any size.

Written from Karras et al. 2022 ("EDM", appendix F.2 and Table 7), Song et al. 2021 and Dhariwal &
Nichol 2021. Parameter names follow EDM's published snapshots, so that their weights load one to one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.models.layers import Block, Convolution, Initialiser, NoiseEmbedding, group_norm, linear, silu_in_place

SQRT_HALF = 0.5**0.5


def first_layer(channels_in: int, width: int, stem: Sequence[int], init: Initialiser) -> nn.Module:
    """A 3x3 convolution, or, with `stem` widths, 1x1 convolutions and SiLUs before it.

    The latter is the "implicit" variant of Patch Diffusion's released code: coordinates and values of a pixel are
    mixed before neighbours are.
    """
    layers: list[nn.Module] = []
    for channels in stem:
        layers += [Convolution(channels_in, channels, 1, init), nn.SiLU()]
        channels_in = channels
    last = Convolution(channels_in, width, 3, init)
    return nn.Sequential(*layers, last) if layers else last


class UNet(nn.Module, ABC):
    """The base of the networks: an encoder, and a decoder with a skip connection from every encoder layer."""

    resolution: int  # side of a full image; levels are named by it
    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_noise: NoiseEmbedding
    map_augment: nn.Linear | None
    map_size: nn.Linear | None

    @abstractmethod
    def embed(self, conditions: Tensor, labels: Tensor | None) -> Tensor:
        """(B, N) embedded noise (and size, and augmentation) and (B, K) labels -> (B, E) that every block reads."""

    @abstractmethod
    def finish(self, x: Tensor) -> Tensor:
        """The last normalisation and convolution: (B, C, H, W) features -> (B, channels_out, H, W)."""

    def _add_conditions(self, noise_width: int, augmentation: int, patch_size: bool, init: Initialiser) -> None:
        """Linear maps for the conditions that join the embedded noise level."""
        self.map_augment = linear(augmentation, noise_width, init, bias=False) if augmentation else None
        self.embed_size = NoiseEmbedding(noise_width)
        self.map_size = linear(noise_width, noise_width, init) if patch_size else None

    def _build(
        self,
        resolution: int,
        channels_in: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        stem: Sequence[int],
        heads_of: Callable[[int], int],
        block: Callable[..., Block],
        init: Initialiser,
        first_width: int,
        attention_only_last: bool,
        residual_input: bool,
        filter_taps: Sequence[int],
    ) -> int:
        """Build the encoder and decoder, with names as in EDM's snapshots. Returns the last width of the decoder."""
        self.resolution, self.halvings = resolution, len(widths) - 1
        self.check_size(resolution, resolution)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        kept, width, aux_width = [], first_width, channels_in
        for level, level_width in enumerate(widths):
            size = resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = first_layer(channels_in, first_width, stem, init)
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

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the network cannot halve these sides (in pixels) often enough."""
        multiple = 2**self.halvings
        if height % multiple or width % multiple or not height or not width:
            raise ValueError(
                f"{height} x {width} pixels cannot be halved {self.halvings} times: choose sides that are multiples "
                f"of {multiple}, or fewer width multipliers"
            )

    def forward(
        self,
        x: Tensor,
        noise_condition: Tensor,
        labels: Tensor | None = None,
        *,
        augmentation: Tensor | None = None,
        patch_fraction: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, channels_out, H, W).

        Args:
            x: (B, C, H, W), with the channels of coordinates and condition.
            noise_condition: (B,) c_noise.
            labels: one-hot (B, K), or None.
            augmentation: (B, A) labels of `augment`; None for unchanged images.
            patch_fraction: (B,) side of the patch over that of the image, for networks with `patch_size`.

        Raises:
            ValueError: the sides cannot be halved often enough.
        """
        self.check_size(x.shape[2], x.shape[3])
        conditions = self.map_noise(noise_condition)
        if self.map_augment is not None and augmentation is not None:
            conditions = conditions + self.map_augment(augmentation.to(conditions.dtype))
        if self.map_size is not None and patch_fraction is not None:
            conditions = conditions + self.map_size(self.embed_size(patch_fraction.log2()))
        embedding = self.embed(conditions, labels)
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

    Args:
        resolution: side of the full image.
        channels_in: channels of the input, with coordinates and condition.
        channels_out: channels of the output.
        classes: number of classes; 0 for none.
        width: base width (EDM, Table 7).
        width_multipliers: width of each level, over `width`.
        blocks: residual blocks per level.
        attention: resolutions with attention, at full image size.
        dropout: dropout rate.
        embedding: embedding of the noise level: "positional" or "fourier".
        residual_input: whether the downsampled input is added at each level (NCSN++).
        filter_taps: taps of the resampling filter.
        noise_width_multiplier: width of the noise embedding, over `width`.
        stem: widths of 1x1 convolutions before the first 3x3 convolution.
        augmentation: number of augmentation labels.
        patch_size: whether the patch size is a condition.

    Raises:
        ValueError: the resolution cannot be halved once per level, or a width does not divide into groups.
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
        stem: Sequence[int] = (),
        augmentation: int = 0,
        patch_size: bool = False,
    ) -> None:
        super().__init__()
        embedding_width, noise_width = 4 * width, width * noise_width_multiplier
        init = Initialiser("average")
        self.map_noise = NoiseEmbedding(noise_width, embedding, endpoint=True, sines_first=True)
        self._add_conditions(noise_width, augmentation, patch_size, init)
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
            resolution, channels_in, [width * m for m in width_multipliers], blocks, attention, stem,
            heads_of=lambda _: 1, block=block, init=init, first_width=width, attention_only_last=True,
            residual_input=residual_input, filter_taps=filter_taps,
        )  # fmt: skip
        self.last_level = f"{resolution}x{resolution}"
        self.dec[f"{self.last_level}_aux_norm"] = group_norm(last, 1e-6)
        self.dec[f"{self.last_level}_aux_conv"] = Convolution(last, channels_out, 3, init.scaled(1e-5))

    def embed(self, conditions: Tensor, labels: Tensor | None) -> Tensor:
        """Noise, then labels scaled to unit variance, through two layers with SiLU (EDM, F.2.1)."""
        if self.map_label is not None and labels is not None:
            conditions = conditions + self.map_label(labels * self.map_label.in_features**0.5)
        out: Tensor = F.silu(self.map_layer1(F.silu(self.map_layer0(conditions))))
        return out

    def finish(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels_out, H, W): the last layers of the decoder."""
        x = silu_in_place(self.dec[f"{self.last_level}_aux_norm"](x))
        out: Tensor = self.dec[f"{self.last_level}_aux_conv"](x)
        return out


class DhariwalUNet(UNet):
    """ADM: more heads, scale-and-shift conditioning, attention in every block of its levels (EDM, F.2.2).

    The arguments are those of `SongUNet`, and:

    Args:
        head_width: channels per attention head; narrower levels have no attention.
    """

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
        stem: Sequence[int] = (),
        augmentation: int = 0,
        patch_size: bool = False,
    ) -> None:
        super().__init__()
        embedding_width = 4 * width
        init = Initialiser("in", gain=(1 / 3) ** 0.5, bias_gain=(1 / 3) ** 0.5)
        self.map_noise = NoiseEmbedding(width)
        self._add_conditions(width, augmentation, patch_size, init.scaled(0.0))
        self.map_layer0 = linear(width, embedding_width, init)
        self.map_layer1 = linear(embedding_width, embedding_width, init)
        self.map_label = None
        if classes:
            self.map_label = linear(classes, embedding_width, init, bias=False)
            if not self.map_label.weight.is_meta:
                nn.init.normal_(self.map_label.weight)  # Kaiming's 1/sqrt(K) times EDM's sqrt(K)

        def block(block_in: int, block_out: int, **options: Any) -> Block:
            return Block(
                block_in, block_out, embedding_width, init, dropout=dropout,
                attention_gain=(1 / 3) ** 0.5, **options,
            )  # fmt: skip

        last = self._build(
            resolution, channels_in, [width * m for m in width_multipliers], blocks, attention, stem,
            heads_of=lambda channels: channels // head_width, block=block, init=init,
            first_width=width * width_multipliers[0], attention_only_last=False, residual_input=False,
            filter_taps=(1, 1),
        )  # fmt: skip
        self.out_norm = group_norm(last, 1e-5)
        self.out_conv = Convolution(last, channels_out, 3, init.scaled(0.0))

    def embed(self, conditions: Tensor, labels: Tensor | None) -> Tensor:
        """Noise through two layers; labels join before the last SiLU (EDM, F.2.2)."""
        embedding = self.map_layer1(F.silu(self.map_layer0(conditions)))
        if self.map_label is not None and labels is not None:
            embedding = embedding + self.map_label(labels)
        return F.silu(embedding)

    def finish(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels_out, H, W): the last normalisation, SiLU and convolution."""
        out: Tensor = self.out_conv(silu_in_place(self.out_norm(x)))
        return out


UNETS: dict[str, type[nn.Module]] = {"song": SongUNet, "dhariwal": DhariwalUNet}
