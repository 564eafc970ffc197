"""Codec: images to the values of a network, and back."""

import torch
from torch import Tensor

from patchloom.models.autoencoder import Autoencoder
from patchloom.models.normalisation import Normalisation


def to_pixels(x: Tensor, normalisation: Normalisation, autoencoder: Autoencoder | None) -> Tensor:
    """Convert the values of a network to images; latents are decoded.

    Pixels are x * 127.5 + 128, clipped to 0..255 and truncated (EDM).

    Args:
        x: (B, C, H, W) float.
        normalisation: the model's.
        autoencoder: the decoder; required for latents, ignored for pixels.

    Returns:
        (B, C, H, W) uint8; (B, 3, H * downscale, W * downscale) for latents.

    Raises:
        ValueError: latents without an autoencoder.
    """
    if normalisation.kind == "latents":
        if autoencoder is None:
            raise ValueError("latents need an autoencoder: pass the one that encoded them")
        return autoencoder.decode(normalisation.restore(x))
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_pixels(images: Tensor, normalisation: Normalisation, autoencoder: Autoencoder | None) -> Tensor:
    """Convert images to the values of a network; latents are the means of the posterior.

    Args:
        images: (B, C, H, W) uint8.
        normalisation: the model's.
        autoencoder: the encoder; required for latents, ignored for pixels.

    Returns:
        (B, C, H, W) float32; (B, latent channels, H / downscale, W / downscale) for latents.

    Raises:
        ValueError: latents without an autoencoder.
    """
    if normalisation.kind == "pixels":
        return normalisation.normalise(images)
    if autoencoder is None:
        raise ValueError("latents need an autoencoder: pass the one that encoded them")
    return normalisation.normalise(autoencoder.encode(images)[0])
