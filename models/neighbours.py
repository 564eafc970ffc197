"""Neighbours: nearest neighbours among the features of real images and samples, computed in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patchloom.models.metrics import BLOCK_ROWS, FeatureRows, row_blocks

BLOCK = 4096  # rows and columns of a block of distances: 64 MiB


@dataclass(frozen=True)
class Neighbourhood:
    """Where samples lie among real images. The ball of an image reaches to its k-th nearest other image.

    Args:
        precision: share of the samples inside the ball of any real image (Kynkäänniemi et al. 2019).
        recall: share of the real images inside the ball of any sample (Kynkäänniemi et al. 2019).
        density: (samples,) number of real balls around each sample, over k (Naeem et al. 2020).
        nearest: (samples,) number of the nearest real image.
        nearest_distance: (samples,) its distance.
        authentic: (samples,) whether the nearest real image has another real image nearer than the sample
            (Alaa et al. 2022).
    """

    precision: float
    recall: float
    density: Tensor
    nearest: Tensor
    nearest_distance: Tensor
    authentic: Tensor

    @property
    def authenticity(self) -> float:
        """The share of authentic samples: half or more for new real images, near 0 for copies (Alaa et al. 2022)."""
        return float(self.authentic.double().mean())


def neighbourhood(
    real: FeatureRows,
    samples: FeatureRows,
    k: int = 3,
    block: int = BLOCK,
    device: torch.device | str | None = None,
) -> Neighbourhood:
    """The neighbourhood of samples among real images, by Euclidean distance.

    The time grows with (n + m)^2. The memory is that of a few blocks and of k + 5 numbers per row, if the features are
    read from a file.

    Args:
        real: (n, d) features.
        samples: (m, d) features.
        k: the ball of an image reaches to its k-th nearest other image.
        block: rows and columns of a block of distances; a few blocks are in memory.
        device: where blocks are computed; by default where the features are.

    Raises:
        ValueError: there are k images or fewer on one side.
    """
    for side, features in (("real images", real), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"{len(features)} {side} are too few for {k} nearest neighbours: use {k + 1} or more")
    centre = _mean(real, device)  # distances are differences of squares, so centred values lose fewer digits
    centred_real, centred_samples = (_Centred(side, centre) for side in (real, samples))
    real_near, sample_near = (_nearest_others(side, k, block) for side in (centred_real, centred_samples))
    inside = torch.zeros(len(samples), device=centre.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=centre.device)
    distance = torch.full((len(samples),), torch.inf, device=centre.device)
    nearest = torch.zeros(len(samples), dtype=torch.long, device=centre.device)
    for rows, columns, squares in _squares_of(centred_samples, centred_real, block):
        inside[rows] += (squares <= real_near[columns, -1]).sum(1)
        recalled[columns] |= (squares <= sample_near[rows, -1:]).any(0)
        least, where = squares.min(1)
        closer = least < distance[rows]
        distance[rows] = torch.where(closer, least, distance[rows])
        nearest[rows] = torch.where(closer, where + columns.start, nearest[rows])
    return Neighbourhood(
        precision=float((inside > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=inside / k,
        nearest=nearest,
        nearest_distance=distance.sqrt(),
        authentic=distance > real_near[nearest, 0],
    )


def _nearest_others(features: _Centred, k: int, block: int) -> Tensor:
    """(n, d) -> (n, k) squared Euclidean distances of each row to its nearest other rows, ascending."""
    near = torch.full((len(features), k), torch.inf, device=features[:1].device)
    for rows, columns, squares in _squares_of(features, features, block, is_symmetric=True):
        if rows.start == columns.start:
            squares.fill_diagonal_(torch.inf)
            near[rows] = _least(near[rows], squares)
        else:
            near[rows] = _least(near[rows], squares)
            near[columns] = _least(near[columns], squares.T)
    return near


class _Centred:
    """Features minus their mean, on the device of the mean, computed for the rows that are read."""

    def __init__(self, features: FeatureRows, centre: Tensor | None) -> None:
        self.features, self.centre = features, centre

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Tensor:
        if self.centre is None:
            return self.features[rows]
        return self.features[rows].to(self.centre.device).float() - self.centre


def _mean(features: FeatureRows, device: torch.device | str | None) -> Tensor:
    """(d,) float32; of more than `BLOCK_ROWS` rows the mean of the sums of blocks in float64."""
    if len(features) <= BLOCK_ROWS:
        return features[:].to(device).float().mean(0)
    total = sum(block.double().sum(0) for block in row_blocks(features))
    return (torch.as_tensor(total) / len(features)).float().to(device)


def _squares_of(
    a: _Centred, b: _Centred, block: int, is_symmetric: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The squared distances of the rows of two sides, block by block, with the rows of `a` and of `b` of each block.

    If both sides are the same, a block of distances serves its rows and its columns, so only one half is computed.
    """
    for top in range(0, len(a), block):
        rows = slice(top, min(top + block, len(a)))
        above = a[rows]
        for left in range(top if is_symmetric else 0, len(b), block):
            columns = slice(left, min(left + block, len(b)))
            yield rows, columns, _squares(above, b[columns])


def _squares(a: Tensor, b: Tensor) -> Tensor:
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return squares.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def _least(near: Tensor, squares: Tensor) -> Tensor:
    k = near.shape[1]
    found = squares.topk(min(k, squares.shape[1]), largest=False, sorted=False).values
    return torch.cat([near, found], 1).topk(k, largest=False).values
