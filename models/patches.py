"""Patches: the crop sizes of a run, and crops with their coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PERIODIC_OCTAVES = 6
SIDE_TOLERANCE = 1e-6  # pixels
COORDINATE_CHANNELS = {"none": 0, "linear": 2, "implicit": 2, "periodic": 4 * PERIODIC_OCTAVES}


@dataclass(frozen=True)
class PatchSize:
    """One crop size.

    Args:
        pixels: side of the crop.
        probability: share of the updates.
        batch_multiplier: crops in its batch, over the batch size.
    """

    pixels: int
    probability: float
    batch_multiplier: int


@dataclass(frozen=True)
class PatchSchedule:
    """When each patch size is trained (Patch Diffusion, section 3.2).

    Args:
        sizes: from the largest to the smallest; the first one is the full image and has the probability p.
        kind: "stochastic" draws a size for every step; "progressive" trains from the smallest to the largest size.
    """

    sizes: tuple[PatchSize, ...]
    kind: str = "stochastic"

    @property
    def mean_multiplier(self) -> float:
        """Mean number of crops per step, over the batch size: 1.9 at p = 0.5 with the multipliers 1, 2 and 4."""
        return sum(size.probability * size.batch_multiplier for size in self.sizes)

    def updates(self, images: int, batch_size: int) -> int:
        """Number of steps of a run of `images` counted images (crops); at least 1."""
        return max(1, round(images / (batch_size * self.mean_multiplier)))

    def size_at(self, step: int, updates: int, uniform: float) -> PatchSize:
        """The patch size of a step (Patch Diffusion, Eq. 5).

        Args:
            step: number of the step, from 0.
            updates: steps of the run.
            uniform: a uniform in [0, 1) that decides a stochastic step. Small values give the full image, so a run
                with a larger p has full images at the same steps and at more.
        """
        if self.kind == "progressive":
            return self._reached(self.sizes[::-1], (step + 0.5) / updates)
        return self._reached(self.sizes, uniform)

    @staticmethod
    def _reached(sizes: Sequence[PatchSize], position: float) -> PatchSize:
        """The size whose interval of [0, 1) contains the position."""
        total = 0.0
        for size in sizes:
            total += size.probability
            if position < total:
                return size
        return next(size for size in reversed(sizes) if size.probability > 0)  # rounding: the total is just below 1


def patch_side(fraction: float, resolution: int) -> int | None:
    """The side of a patch in pixels (Patch Diffusion, section 3.2).

    None unless it is a whole number, up to rounding: 0.28 of 100 pixels is 28.
    """
    side = fraction * resolution
    return round(side) if round(side) > 0 and abs(side - round(side)) < SIDE_TOLERANCE else None


def patch_schedule(
    resolution: int,
    p: float,
    kind: str = "stochastic",
    smaller: Sequence[tuple[float, float, int]] = ((0.5, 0.6, 2), (0.25, 0.4, 4)),
    shares_of: str = "updates",
) -> PatchSchedule:
    """The schedule of Eq. 5: the full image with probability p, smaller patches with the rest.

    Args:
        resolution: side of the full image in pixels.
        p: probability of the full image.
        kind: "stochastic" or "progressive".
        smaller: (fraction of the side, weight among the smaller sizes, batch multiplier) of each smaller size.
            Default: R/2 with 3/5 and R/4 with 2/5 of the rest.
        shares_of: what p and the weights are shares of: "updates" (the paper) or "images" (the progressive schedule of
            the released code). A share of images is fewer updates where batches are larger.

    Raises:
        ValueError: a fraction does not give a whole number of pixels.
    """
    total = sum(weight for _, weight, _ in smaller)
    sizes = [PatchSize(resolution, p, 1)]
    for fraction, weight, multiplier in sorted(smaller, reverse=True):
        pixels = patch_side(fraction, resolution)
        if pixels is None:
            side = fraction * resolution
            raise ValueError(f"fraction {fraction} of {resolution} pixels is {side:g}, not a whole number")
        sizes.append(PatchSize(pixels, (1 - p) * weight / total, multiplier))
    if shares_of == "images":
        updates = [size.probability / size.batch_multiplier for size in sizes]
        sizes = [replace(size, probability=share / sum(updates)) for size, share in zip(sizes, updates, strict=True)]
    return PatchSchedule(tuple(sizes), kind)


def coordinate_grid(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Coordinates of a full image (Patch Diffusion, section 3.3).

    Args:
        height: height in pixels.
        width: width in pixels.
        device: device of the result.

    Returns:
        (2, H, W) float32, x first: -1 at the first pixel and +1 at the last.
    """
    x = torch.linspace(-1, 1, width, device=device).expand(height, width)
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    return torch.stack([x, y])


def extended_grid(height: int, width: int, resolution: int, device: torch.device | str | None = None) -> Tensor:
    """Coordinates of a canvas with the full image in its middle.

    The spacing is that of training, 2 / (resolution - 1), so the margins lie outside [-1, 1].

    Args:
        height: height of the canvas in pixels.
        width: width of the canvas in pixels.
        resolution: side of the full image.
        device: device of the result.

    Returns:
        (2, H, W) float32, x first.
    """
    step = 2 / max(resolution - 1, 1)
    x = (torch.arange(width, device=device) - (width - 1) / 2) * step
    y = (torch.arange(height, device=device) - (height - 1) / 2) * step
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).float()


def encode_coordinates(coordinates: Tensor, encoding: str) -> Tensor:
    """Encode coordinates as input channels of a network (Patch Diffusion, section 3.3).

    Args:
        coordinates: (B, 2, H, W).
        encoding: "linear" returns x and y. "periodic" returns the sine and cosine of 2^k x and 2^k y for
            k = 0 ... 5, in radians and without a factor of pi, so that both ends of the image differ.

    Returns:
        (B, channels, H, W).

    Raises:
        ValueError: the encoding is unknown.
    """
    if encoding == "linear":
        return coordinates
    if encoding != "periodic":
        raise ValueError(f"coordinate encoding {encoding!r} is unknown: choose linear or periodic")
    angles = torch.cat([coordinates * 2**k for k in range(PERIODIC_OCTAVES)], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def offsets(uniforms: Tensor, resolution: int, size: int) -> Tensor:
    """Upper-left corners (B, 2), x first, from uniforms (B, 2) in [0, 1): all positions are equally likely."""
    positions = resolution - size + 1
    return (uniforms * positions).long().clamp(max=positions - 1)  # a float32 product may round up to `positions`


def crop(images: Tensor, corners: Tensor, size: int, grid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Crop a square from each image, with its coordinates (Patch Diffusion, Figure 1).

    Args:
        images: (B, C, R, R).
        corners: (B, 2) integers, the upper-left corners, x first.
        size: side of the crops in pixels.
        grid: (B, 2, R, R) coordinates of the pixels. Default: the full grid.

    Returns:
        The patches (B, C, size, size) and their coordinates in the full image (B, 2, size, size).
    """
    batch, channels, height, width = images.shape
    span = torch.arange(size, device=images.device)
    columns = corners[:, 0, None] + span  # (B, size)
    rows = corners[:, 1, None] + span
    positions = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]  # (B, 1, size * size)
    if grid is None:
        grid = coordinate_grid(height, width, images.device).expand(batch, -1, -1, -1)
    patches = images.flatten(2).gather(2, positions.expand(-1, channels, -1))
    coordinates = grid.flatten(2).gather(2, positions.expand(-1, 2, -1))
    return patches.unflatten(2, (size, size)), coordinates.unflatten(2, (size, size))
