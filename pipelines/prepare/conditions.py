"""Condition images: computed from an image, or read from another source and cropped and resized like the image."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.conditions import space_to_depth
from patchloom.pipelines.prepare.images import FILTERS, Transform, decode, is_grey
from patchloom.platform.files.arrays import MAGIC, read_array
from patchloom.platform.files.bounds import MOST_IMAGE_BYTES
from patchloom.platform.records.prepare import ConditionPlan

EDGE_SIGMA = 1.0  # of the Gaussian filter before Canny's detector, in pixels
LOW_RES = re.compile(r"low-res:([0-9]{1,4})")
ENLARGE = Image.Resampling.BICUBIC
FLOAT_TYPES = ("float16", "float32")
MOST_CONDITION_CHANNELS = 1024


def computed_condition(option: str, channels: int, side: int) -> ConditionPlan | None:
    """The condition that `--condition` asks to compute from each image; None if the option is a source.

    Args:
        option: `edges`, `low-res:F`, or the address of a source.
        channels: channels of the images.
        side: side of the images in pixels.

    Raises:
        UserError: the factor of low-res is missing or does not divide the side.
    """
    if option == "edges":
        return ConditionPlan(kind="edges", channels=1, dtype="uint8")
    if option == "low-res" or (option.startswith("low-res:") and not LOW_RES.fullmatch(option)):
        raise UserError(f"--condition {option[:80]} has no factor: write low-res:4 for a fourth of the resolution")
    if not (match := LOW_RES.fullmatch(option)):
        return None
    factor = int(match[1])
    if factor < 2 or side % factor:
        raise UserError(
            f"--condition {option}: {side} pixels are not a multiple of a factor above 1: choose another factor"
        )
    return ConditionPlan(kind="low-res", factor=factor, channels=channels, dtype="uint8")


def described_condition(content: bytes | np.ndarray) -> ConditionPlan:
    """The channels and type of a condition from a source; raises an exception if it cannot be read."""
    values = _array_of(content)
    if values is not None:
        dtype = values.dtype.name if values.dtype.name in ("uint8", *FLOAT_TYPES) else "float32"
        return ConditionPlan(kind="images", channels=values.shape[2], dtype="uint8" if values.dtype == bool else dtype)
    grey = content.shape[2:] in ((), (1,)) if isinstance(content, np.ndarray) else is_grey(content)
    decode(content)
    return ConditionPlan(kind="images", channels=1 if grey else 3, dtype="uint8")


@dataclass(frozen=True)
class ConditionMaker:
    """Makes the conditions of images of one dataset, in the layout of its column.

    Args:
        plan: what the conditions are.
        transform: how images are cropped and resized.
    """

    plan: ConditionPlan
    transform: Transform

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """The computed condition of a prepared image: (R, R, C) uint8 -> (R, R, K)."""
        return edges(pixels) if self.plan.kind == "edges" else enlarged_low_res(pixels, self.plan.factor or 1)

    def of_file(self, content: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The condition of an image, cropped and resized like it.

        Args:
            content: an encoded image or `.npy` array, or the pixels of an image.
            size: (width, height) of the image before it is cropped and resized.

        Returns:
            (R, R, K) of the type of the plan.

        Raises:
            ValueError: it cannot be read, or has another shape, type or aspect ratio than it must have.
        """
        planes = condition_planes(content, self.plan)
        _check_geometry(planes[0].size, size)
        # a smaller condition is allowed
        return joined(planes, replace(self.transform, min_side=0).apply, self.plan.dtype)

    def photograph(self, content: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The condition of a photograph that is divided into windows, resized like it: (H, W, K)."""
        planes, resized = condition_planes(content, self.plan), self.transform.resized_size(size)
        _check_geometry(planes[0].size, size)
        method = FILTERS[self.transform.resize]
        return joined(planes, lambda plane: np.asarray(plane.resize(resized, method)), self.plan.dtype)

    def stored(self, conditions: np.ndarray) -> np.ndarray:
        """(n, K, R, R) -> (n, K * f^2, R / f, R / f), the layout of the column."""
        return space_to_depth(conditions, self.plan.downscale)


def edges(pixels: np.ndarray) -> np.ndarray:
    """Canny's edges of an image: (H, W, C) uint8 -> (H, W, 1) uint8, 255 at edges and 0 elsewhere (Canny 1986)."""
    from skimage.feature import canny

    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("L")
    found: np.ndarray = canny(np.asarray(image, np.float64) / 255, EDGE_SIGMA)
    return (found[:, :, None] * 255).astype(np.uint8)


def enlarged_low_res(pixels: np.ndarray, factor: int) -> np.ndarray:
    """An image reduced by a factor with antialiasing, and enlarged again: (H, W, C) uint8, sides as before."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    small = image.resize((image.width // factor, image.height // factor), Image.Resampling.LANCZOS)
    return _pixels_of(small.resize(image.size, ENLARGE))


def condition_planes(content: bytes | np.ndarray, plan: ConditionPlan) -> list[Image.Image]:
    """The channels of a condition from a source, as images of one channel each; of a colour image, one image of three.

    Raises:
        ValueError: it cannot be read, or has other channels or another type than the plan.
    """
    values = _array_of(content)
    if values is None:
        if plan.dtype != "uint8" or plan.channels not in (1, 3):
            raise ValueError(
                f"its condition is an image, and others are arrays of {plan.channels} channels of {plan.dtype}"
            )
        if plan.channels == 1 and isinstance(content, bytes) and not is_grey(content):
            raise ValueError("its condition has colours, and others are grey: convert it to grey, or all to RGB")
        return [decode(content, plan.channels)]
    if values.shape[2] != plan.channels:
        raise ValueError(f"its condition has {values.shape[2]} channels, and others have {plan.channels}")
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if (values.dtype == np.uint8) != (plan.dtype == "uint8"):
        raise ValueError(f"its condition has values of type {values.dtype}, and others are {plan.dtype}")
    values = values if plan.dtype == "uint8" else values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("its condition has values that are not finite")
    return [Image.fromarray(np.ascontiguousarray(values[:, :, channel])) for channel in range(plan.channels)]


def joined(planes: list[Image.Image], change: Callable[[Image.Image], np.ndarray], dtype: str) -> np.ndarray:
    """The changed channels of a condition as one array, (H, W, K); raises ValueError if a value does not fit."""
    changed = [_with_channels(change(plane)) for plane in planes]
    with np.errstate(over="ignore"):
        values = np.concatenate(changed, axis=2).astype(dtype)
    if dtype in FLOAT_TYPES and not np.isfinite(values).all():
        raise ValueError(f"its condition has values that are not finite in {dtype}")
    return values


def _array_of(content: bytes | np.ndarray) -> np.ndarray | None:
    """The (H, W, K) values of a `.npy` array; None for an image."""
    if isinstance(content, np.ndarray) or not content.startswith(MAGIC):
        return None
    values = read_array(content, MOST_IMAGE_BYTES)
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.dtype.kind not in "buif" or not 0 < values.shape[2] <= MOST_CONDITION_CHANNELS:
        raise ValueError(f"its condition is an array of {values.dtype} of shape {values.shape}, not numbers (H, W, K)")
    return values


def _check_geometry(found: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise ValueError unless both have the same aspect ratio, to a pixel, so that both are cropped alike."""
    if abs(found[0] * image[1] / image[0] - found[1]) >= 1:
        raise ValueError(
            f"its condition is {found[0]}x{found[1]}, and the image {image[0]}x{image[1]}: they must show the same area"
        )


def _pixels_of(image: Image.Image) -> np.ndarray:
    return _with_channels(np.asarray(image))


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
