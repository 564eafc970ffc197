"""Normalisation: the affine map between stored values and the values of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONSTANT = 1e-6  # a standard deviation of this share of the mean is the rounding error of a constant


@dataclass(frozen=True)
class Normalisation:
    """The affine map from stored values to those of a network: x = (stored - mean) * scale, per channel.

    Pixels 0..255 become -1..1. Latents are whitened to the denoiser's sigma_data, or only scaled.

    Args:
        kind: "pixels" or "latents".
        mean: one per channel.
        scale: one per channel.
    """

    kind: str
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, stored: Tensor) -> Tensor:
        """(B, C, H, W) stored values (uint8 or float) -> (B, C, H, W) float32."""
        mean, scale = self._columns(stored.device)
        return (stored.float() - mean) * scale

    def restore(self, x: Tensor) -> Tensor:
        """The inverse: (B, C, H, W) values of the network -> (B, C, H, W) stored units, float32."""
        mean, scale = self._columns(x.device)
        return x.float() / scale + mean

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        import torch  # not at the top: cards are read without torch

        columns = torch.tensor([self.mean, self.scale], dtype=torch.float32)[:, :, None, None]
        mean, scale = columns.to(device, non_blocking=True)
        return mean, scale

    @classmethod
    def from_json(cls, content: object) -> Normalisation:
        """Read the entry `space` of `model.json`.

        Raises:
            ValueError: a key is missing, or a number is not finite or a scale is 0.
        """
        if not isinstance(content, Mapping) or not {"kind", "mean", "scale"} <= content.keys():
            raise ValueError("a normalisation has the keys kind, mean and scale")
        mean, scale = (_numbers(content[key], key) for key in ("mean", "scale"))
        if content["kind"] not in ("pixels", "latents") or len(mean) != len(scale) or not all(scale):
            raise ValueError("a normalisation is of pixels or latents, with one mean and one scale (not 0) per channel")
        return cls(content["kind"], mean, scale)

    def to_json(self) -> dict[str, Any]:
        """The entry `space` of `model.json`."""
        return {"kind": self.kind, "mean": list(self.mean), "scale": list(self.scale)}


def _numbers(values: object, key: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    ):
        raise ValueError(f"{key} of the normalisation is {str(values)[:80]}, and must be a list of finite numbers")
    return tuple(values)


def spread_of(mean: float, std: float) -> float:
    """The number to divide a channel by: its standard deviation, or 1 for a constant channel."""
    return std if std > CONSTANT * abs(mean) else 1.0


def pixel_normalisation(channels: int = 3) -> Normalisation:
    """uint8 / 127.5 - 1 (EDM)."""
    return Normalisation("pixels", (127.5,) * channels, (1 / 127.5,) * channels)


def identity_normalisation(channels: int) -> Normalisation:
    """Unchanged values, for measurements on noise."""
    return Normalisation("latents", (0.0,) * channels, (1.0,) * channels)
