"""Codec: from stored rows to the numbers a network sees, and from what it makes back to pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from patchloom.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class Normalisation:
    """The affine map from stored values to the network's: x = (stored - mean) * scale, per channel.

    Pixels 0..255 become -1..1; latents are whitened to the denoiser's sigma_data, or only scaled.
    """

    kind: str  # "pixels" or "latents"
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, stored: Tensor) -> Tensor:
        """(B, C, H, W) stored values (uint8 or float) -> (B, C, H, W) float32."""
        mean, scale = self._columns(stored.device)
        return (stored.float() - mean) * scale

    def restore(self, x: Tensor) -> Tensor:
        """The way back: (B, C, H, W) network values -> stored units, float32."""
        mean, scale = self._columns(x.device)
        return x.float() / scale + mean

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        import torch  # here, so that cards are read without torch

        mean = torch.tensor(self.mean, dtype=torch.float32, device=device)[:, None, None]
        return mean, torch.tensor(self.scale, dtype=torch.float32, device=device)[:, None, None]

    @classmethod
    def from_json(cls, content: object) -> Normalisation:
        """Read it from `model.json`.

        Raises:
            ValueError: a key is missing.
        """
        if not isinstance(content, Mapping) or not {"kind", "mean", "scale"} <= content.keys():
            raise ValueError("a normalisation has the keys kind, mean and scale")
        return cls(content["kind"], tuple(content["mean"]), tuple(content["scale"]))

    def to_json(self) -> dict[str, Any]:
        """As it is written to `model.json`."""
        return {"kind": self.kind, "mean": list(self.mean), "scale": list(self.scale)}


def pixel_normalisation(channels: int = 3) -> Normalisation:
    """uint8 / 127.5 - 1, as EDM does."""
    return Normalisation("pixels", (127.5,) * channels, (1 / 127.5,) * channels)


def identity_normalisation(channels: int) -> Normalisation:
    """Values as they are."""
    return Normalisation("latents", (0.0,) * channels, (1.0,) * channels)


def to_pixels(x: Tensor, space: Normalisation, autoencoder: Autoencoder | None) -> Tensor:
    """(B, C, H, W) of the network's values -> uint8 images, (B, 3, H', W') where they are decoded from latents.

    Pixels are x * 127.5 + 128, clipped to 0..255 and truncated (EDM). Raises ValueError for a space of
    latents without its autoencoder.
    """
    if space.kind == "latents":
        if autoencoder is None:
            raise ValueError("latents need the autoencoder that they were encoded with")
        return autoencoder.decode(space.restore(x))
    return (x.float() * 127.5 + 128).clamp(0, 255).byte()


def from_pixels(images: Tensor, space: Normalisation, autoencoder: Autoencoder | None) -> Tensor:
    """(B, C, H, W) uint8 images -> (B, C', H', W') float32 of the network's values; latents are posterior means.

    Raises ValueError for a space of latents without its autoencoder.
    """
    if space.kind == "pixels":
        return space.normalise(images)
    if autoencoder is None:
        raise ValueError("latents need the autoencoder that they were encoded with")
    return space.normalise(autoencoder.encode(images)[0])
