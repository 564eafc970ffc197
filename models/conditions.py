"""Conditions: images that a network gets next to the noisy image, from stored values to those of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from patchloom.models.cards import ConditionCard

if TYPE_CHECKING:  # datasets are prepared without torch
    import numpy as np
    from torch import Tensor

    Images = TypeVar("Images", np.ndarray, Tensor)


def space_to_depth(images: Images, factor: int) -> Images:
    """Make each block of pixels one pixel with more channels, so that nothing is lost at the resolution of latents.

    Channel k * f^2 + y * f + x of the result has the pixels (x, y) of the blocks of channel k, as of torch's
    `pixel_unshuffle`.

    Args:
        images: (B, K, H, W), whose sides are multiples of the factor.
        factor: side f of the blocks.

    Returns:
        (B, K * f^2, H / f, W / f) of the same type.
    """
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // factor, factor, width // factor, factor)
    moved = blocks.swapaxes(2, 3).swapaxes(3, 5).swapaxes(4, 5)
    return moved.reshape(batch, channels * factor**2, height // factor, width // factor)


def depth_to_space(images: Images, factor: int) -> Images:
    """The inverse of `space_to_depth`: (B, K * f^2, h, w) -> (B, K, h * f, w * f)."""
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels // factor**2, factor, factor, height, width)
    moved = blocks.swapaxes(4, 5).swapaxes(3, 5).swapaxes(2, 3)
    return moved.reshape(batch, channels // factor**2, height * factor, width * factor)


def check_condition(card: ConditionCard | None, shape: tuple[int, ...] | None, size: tuple[int, int]) -> None:
    """Check that a model and the conditions of its samples fit together.

    Args:
        card: the condition of the model; None if it has none.
        shape: (B, K, H, W) of condition images; None if there are none.
        size: height and width of the images, in pixels.

    Raises:
        ValueError: the model needs a condition and none is given, or the other way round, or the shape differs.
    """
    if card is None:
        if shape is not None:
            raise ValueError("conditions: this model was trained without conditions; leave them out")
        return
    if shape is None:
        raise ValueError(
            f"conditions: this model needs a condition ({card.kind}) for each image; give images of "
            f"{size[0]}x{size[1]} pixels with channels: {card.channels}"
        )
    wanted = (card.channels, *size)
    if shape[1:] != wanted:
        found = " x ".join(map(str, shape[1:]))
        raise ValueError(
            f"conditions: channels x height x width is {found}, and must be {' x '.join(map(str, wanted))}"
        )


def network_condition(card: ConditionCard, images: Tensor) -> Tensor:
    """Convert condition images to values of the network.

    Args:
        card: the condition of the model.
        images: (B, K, H, W), values as `prepare` stores them.

    Returns:
        (B, K * f^2, H / f, W / f) float32, for an f of `card.downscale`.
    """
    return card.normalisation().normalise(space_to_depth(images, card.downscale))
