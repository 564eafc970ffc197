"""Patches: which crop size a step trains on, and the crops with their coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PERIODIC_OCTAVES = 6
COORDINATE_CHANNELS = {"none": 0, "linear": 2, "implicit": 2, "periodic": 4 * PERIODIC_OCTAVES}


@dataclass(frozen=True)
class PatchSize:
    """One size of crop: its side, its share of the updates, and how many more crops its batch holds."""

    pixels: int
    probability: float
    batch_multiplier: int


@dataclass(frozen=True)
class PatchSchedule:
    """When each patch size is trained (Patch Diffusion, section 3.2).

    `sizes` stand from the largest to the smallest; the first is the full image and has probability p.
    `stochastic` draws a size for every step; `progressive` goes from the smallest to the largest.
    """

    sizes: tuple[PatchSize, ...]
    kind: str = "stochastic"

    @property
    def mean_multiplier(self) -> float:
        """Crops in a mean step, in batches: 1.9 at p = 0.5 with multipliers 1, 2 and 4."""
        return sum(size.probability * size.batch_multiplier for size in self.sizes)

    def updates(self, images: int, batch_size: int) -> int:
        """How many steps a run of `images` counted crops has; at least one."""
        return max(1, round(images / (batch_size * self.mean_multiplier)))

    def size_at(self, step: int, updates: int, luck: float) -> PatchSize:
        """The size of step `step` (from 0) of `updates`.

        luck: a uniform in [0, 1) that settles a stochastic step (Eq. 5); a small one means the full image,
        so that runs that differ only in p see full images at the same steps, and more of them.
        """
        if self.kind == "progressive":
            return self._reached(self.sizes[::-1], (step + 0.5) / updates)
        return self._reached(self.sizes, luck)

    @staticmethod
    def _reached(sizes: Sequence[PatchSize], position: float) -> PatchSize:
        """The size in whose share of [0, 1) the position lies."""
        total = 0.0
        for size in sizes:
            total += size.probability
            if position < total:
                return size
        return next(size for size in reversed(sizes) if size.probability > 0)  # rounding left a sliver


def patch_schedule(
    resolution: int,
    p: float,
    kind: str = "stochastic",
    smaller: Sequence[tuple[float, float, int]] = ((0.5, 0.6, 2), (0.25, 0.4, 4)),
    shares_of: str = "updates",
) -> PatchSchedule:
    """The schedule of Eq. 5: the full image with probability p, smaller patches share the rest.

    smaller: (fraction of the side, weight among the smaller, batch multiplier), 3/5 at R/2 and 2/5 at
    R/4 by default. shares_of: "updates", as in the paper, or "images" (counted crops), as in its released
    code's progressive schedule: a share of images is fewer updates where batches are larger. Raises
    ValueError where a fraction does not give whole pixels.
    """
    total = sum(weight for _, weight, _ in smaller)
    sizes = [PatchSize(resolution, p, 1)]
    for fraction, weight, multiplier in sorted(smaller, reverse=True):
        pixels = fraction * resolution
        if pixels != int(pixels) or pixels < 1:
            raise ValueError(f"fraction {fraction} of {resolution} pixels is {pixels:g}, not a whole number of pixels")
        sizes.append(PatchSize(int(pixels), (1 - p) * weight / total, multiplier))
    if shares_of == "images":
        updates = [size.probability / size.batch_multiplier for size in sizes]
        sizes = [replace(size, probability=share / sum(updates)) for size, share in zip(sizes, updates, strict=True)]
    return PatchSchedule(tuple(sizes), kind)


def coordinate_grid(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The (2, H, W) float32 coordinates of a full image: x first, -1 at the first and +1 at the last pixel.

    Patch Diffusion, section 3.3.
    """
    x = torch.linspace(-1, 1, width, device=device).expand(height, width)
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    return torch.stack([x, y])


def extended_grid(height: int, width: int, resolution: int, device: torch.device | str | None = None) -> Tensor:
    """(2, H, W) float32 coordinates of a canvas whose middle is the full image and that goes on beyond it.

    The spacing stays that of training, 2 / (resolution - 1), so the margins lie outside [-1, 1].
    """
    step = 2 / max(resolution - 1, 1)
    x = (torch.arange(width, device=device) - (width - 1) / 2) * step
    y = (torch.arange(height, device=device) - (height - 1) / 2) * step
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).float()


def encode_coordinates(coordinates: Tensor, encoding: str) -> Tensor:
    """(B, 2, H, W) coordinates as the channels that a network reads: (B, channels, H, W).

    "linear" is x and y themselves (Patch Diffusion, section 3.3). "periodic" is the sine and cosine of
    2^k x and 2^k y for k = 0 ... 5, in radians and without a factor of pi, so that the two ends of the
    image stay apart. Raises ValueError for another encoding.
    """
    if encoding == "linear":
        return coordinates
    if encoding != "periodic":
        raise ValueError(f"coordinate encoding {encoding!r} is unknown: choose linear or periodic")
    angles = torch.cat([coordinates * 2**k for k in range(PERIODIC_OCTAVES)], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def offsets(luck: Tensor, resolution: int, size: int) -> Tensor:
    """Upper-left corners (B, 2), x first, from uniforms in [0, 1): every position alike, the last included."""
    positions = resolution - size + 1
    return (luck * positions).long().clamp(max=positions - 1)  # a float32 product may round up to the end


def crop(images: Tensor, corners: Tensor, size: int, grid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each image's own square crop and its coordinates (Patch Diffusion, Figure 1), in one gather each.

    images: (B, C, R, R); corners: (B, 2) integers, x first; grid: (B, 2, R, R) coordinates of the pixels,
    or None for the full grid. Returns (B, C, size, size) patches and their (B, 2, size, size) coordinates
    with respect to the full image.
    """
    batch, channels, height, width = images.shape
    span = torch.arange(size, device=images.device)
    columns = corners[:, 0, None] + span  # (B, size)
    rows = corners[:, 1, None] + span
    where = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]  # (B, 1, size * size)
    if grid is None:
        grid = coordinate_grid(height, width, images.device).expand(batch, -1, -1, -1)
    patches = images.flatten(2).gather(2, where.expand(-1, channels, -1))
    coordinates = grid.flatten(2).gather(2, where.expand(-1, 2, -1))
    return patches.unflatten(2, (size, size)), coordinates.unflatten(2, (size, size))
