"""Neighbours: nearest neighbours among the features of real images and samples, computed in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """The share of authentic samples: about .5 for real images, near 0 for copies (Alaa et al. 2022)."""
        return float(self.authentic.double().mean())


def neighbourhood(real: Tensor, samples: Tensor, k: int = 3, block: int = BLOCK) -> Neighbourhood:
    """The neighbourhood of samples among real images, by Euclidean distance.

    Args:
        real: (n, d) features.
        samples: (m, d) features.
        k: the ball of an image reaches to its k-th nearest other image.
        block: rows and columns of a block of distances; a few blocks are in memory.

    Raises:
        ValueError: there are k images or fewer on one side.
    """
    for side, features in (("real images", real), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"{len(features)} {side} are too few for {k} nearest neighbours: use {k + 1} or more")
    centre = real.float().mean(0)  # distances are differences of squares, so centred values lose fewer digits
    real, samples = real.float() - centre, samples.float() - centre
    real_near, sample_near = (nearest_others(side, k, block) for side in (real, samples))
    inside = torch.zeros(len(samples), device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    distance = torch.full((len(samples),), torch.inf, device=real.device)
    nearest = torch.zeros(len(samples), dtype=torch.long, device=real.device)
    for rows, columns in _blocks(len(samples), len(real), block):
        squares = _squares(samples[rows], real[columns])
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


def nearest_others(features: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """(n, d) -> (n, k) squared Euclidean distances of each row to its nearest other rows, ascending."""
    near = torch.full((len(features), k), torch.inf, device=features.device)
    for rows, columns in _blocks(len(features), len(features), block):
        if columns.start < rows.start:  # a block of distances serves its rows and its columns
            continue
        squares = _squares(features[rows], features[columns])
        if rows.start == columns.start:
            squares.fill_diagonal_(torch.inf)
            near[rows] = _least(near[rows], squares)
        else:
            near[rows] = _least(near[rows], squares)
            near[columns] = _least(near[columns], squares.T)
    return near


def _blocks(rows: int, columns: int, block: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            yield slice(top, min(top + block, rows)), slice(left, min(left + block, columns))


def _squares(a: Tensor, b: Tensor) -> Tensor:
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return squares.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def _least(near: Tensor, squares: Tensor) -> Tensor:
    k = near.shape[1]
    found = squares.topk(min(k, squares.shape[1]), largest=False, sorted=False).values
    return torch.cat([near, found], 1).topk(k, largest=False).values
