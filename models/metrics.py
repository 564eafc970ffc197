"""Metrics: distances between two sets of images, from their features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_LAYOUT = "colour-layout-48"
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # Binkowski et al. 2018
INCEPTION_SPLITS = 10  # Salimans et al. 2016
INCEPTION_ROWS = 10  # fewest in a part
EXTRAPOLATION_ROWS = 4  # fewest per feature that a distance is extrapolated from
INTERVAL_ROWS = 2  # fewest per feature for the interval of a distance
BLOCK_ROWS = 1 << 16  # of features that are computed together; more are read block by block


class FeatureRows(Protocol):
    """(n, d) features that need not be in memory: what a tensor does, as far as metrics use it."""

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, rows: Any) -> Tensor:
        """The rows of a slice, or at (m,) integer positions."""


@dataclass
class Moments:
    """Count, mean and scatter of (n, d) features, in float64. Moments of parts add up in any order.

    The update of Chan et al. 1979 keeps the precision for large means and many batches.

    Args:
        count: number of rows n.
        mean: (d,).
        scatter: (d, d), the sum of the outer products of the centred rows.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Any) -> Moments:
        """The moments of (n, d) features, numpy or torch."""
        rows = torch.as_tensor(features).double()
        mean = rows.mean(0)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (n - 1), (d, d)."""
        return self.scatter / (self.count - 1)


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """The Fréchet distance of two Gaussians fitted to features (Dowson & Landau 1982; FID, Heusel et al. 2017).

    Computed in float64 with unbiased covariances (n - 1).

    Args:
        features_a: (n, d) features, numpy or torch, n of 2 or more.
        features_b: (m, d) features.

    Raises:
        ValueError: fewer than 2 rows, different widths, or values that are not finite.

    Example:
        import numpy as np

        features = np.random.default_rng(0).normal(size=(100, 8))
        distance = patchloom.frechet_distance(features, features + 1)
        assert abs(distance - 8) < 1e-6
    """
    sides = []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        values = torch.as_tensor(np.asarray(features, dtype=np.float64))
        if values.ndim != 2 or len(values) < 2:
            raise ValueError(f"{name}: shape {tuple(values.shape)} is not (n, d) with 2 rows or more")
        _check_finite(name, values)
        sides.append(Moments.of(values))
    a, b = sides
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features: the widths {len(a.mean)} and {len(b.mean)} differ; use the same network for both")
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def row_blocks(rows: FeatureRows) -> Iterator[Tensor]:
    """(n, d) features in blocks of `BLOCK_ROWS` rows."""
    for first in range(0, len(rows), BLOCK_ROWS):
        yield rows[first : first + BLOCK_ROWS]


def _check_finite(name: str, rows: FeatureRows) -> None:
    """Raise ValueError, with the number of the first such row, if (n, d) rows contain NaN or infinity."""
    count, first = 0, 0
    for number, block in enumerate(row_blocks(rows)):
        bad = (~block.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            first = first if count else number * BLOCK_ROWS + int(bad[0])
            count += len(bad)
    if count:
        raise ValueError(f"{name}: {count} rows contain values that are not finite, the first is row {first}")


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(AB)) of means (d,) and covariances (d, d), as Heusel et al. 2017."""
    # tr sqrt(AB) is the sum of the singular values of rootA^T rootB: stable where sqrtm(AB) is not
    root = torch.linalg.svdvals(symmetric_root(cov_a).T @ symmetric_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return float(distance.clamp(min=0))


def symmetric_root(matrix: Tensor) -> Tensor:
    """(d, rank) R with R R^T = matrix, for a symmetric one of (d, d) without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix.double())
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


class DistanceOfRows:
    """The Fréchet distance of subsets of (n, d) features to a fixed Gaussian, fast for many subsets.

    Args:
        features: (n, d), numpy or torch.
        mean: (d,) of the Gaussian.
        covariance: (d, d) of the Gaussian.
    """

    def __init__(self, features: Any, mean: Tensor, covariance: Tensor) -> None:
        rows = torch.as_tensor(features).double()
        self.mean, self.trace = mean, float(covariance.trace())
        self.rows, self.turned = rows, rows @ symmetric_root(covariance)
        self.norms = rows.square().sum(1)

    def standard_error(self) -> float:
        """The standard deviation of the distance of all rows over repeated draws, from a second-order expansion.

        The first-order term is the infinitesimal jackknife (Efron 1982): the variance of the derivative of the distance
        in the weight of each row. Its expectation contains the variance of the second-order term twice (Efron & Stein
        1981), so this variance is subtracted once, as it is for normal features.
        """
        n, difference = len(self.rows), self.rows.mean(0) - self.mean
        centred, turned = self.rows - self.rows.mean(0), self.turned - self.turned.mean(0)
        values, vectors = torch.linalg.eigh(turned.T @ turned / (n - 1))
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1:]  # none of a constant reference
        roots, turned = values[kept].sqrt(), turned @ vectors[:, kept]
        # the derivative in the covariance is 1 - T, with T the optimal transport to the reference
        slopes = 2 * centred @ difference + centred.square().sum(1) - (turned.square() / roots).sum(1)
        # tr sqrt(M + E) = tr sqrt(M) + ... - sum_ij E_ij^2 / (4 r_i r_j (r_i + r_j)), r the roots of M's eigenvalues,
        # and E_ij of n normal rows has variance (1 + delta_ij) r_i^2 r_j^2 / n
        curved = 2 * (torch.outer(roots, roots) / (roots[:, None] + roots)).square()
        of_mean = 2 * (centred.T @ centred / (n - 1)).square().sum()
        second = float((curved.sum() + curved.trace()) / 2 + of_mean) / n**2
        return float(max(float(slopes.var()) / n - second, second) ** 0.5)

    def __call__(self, chosen: np.ndarray) -> float:
        """The distance of the rows with these numbers, (m,) integers; they may repeat."""
        at = torch.as_tensor(chosen)
        n, mean = len(at), self.rows[at].mean(0)
        trace = float(self.norms[at].sum() - n * mean.square().sum()) / (n - 1)
        turned = self.turned[at] - self.turned[at].mean(0)
        gram = turned @ turned.T if n < turned.shape[1] else turned.T @ turned
        root = torch.linalg.eigvalsh(gram / (n - 1)).clamp(min=0).sqrt().sum()
        return float((mean - self.mean).square().sum()) + trace + self.trace - 2 * float(root)


def extrapolated_distance(distance: DistanceOfRows, points: int = 15, seed: int = 0) -> float | None:
    """The distance for infinitely many samples, from a line in 1 / n (FID-infinity, Chong & Forsyth 2020).

    The line starts at 2.5 rows per feature: with fewer, the distance is no longer straight in 1 / n. What is left of
    the bias is then 5 to 8 % of it with 4 to 10 rows per feature, and less with more (simulated, d = 32).

    Returns:
        None with fewer than `EXTRAPOLATION_ROWS` rows per feature, and where the line ends below 0: the distance
        is then smaller than the error of the line.
    """
    n, width = distance.rows.shape
    if n < EXTRAPOLATION_ROWS * width:
        return None
    generator = np.random.default_rng(seed)
    counts = np.unique(np.linspace(max(2.5 * width, n / 4, 2), n, points).astype(int))
    found = [distance(generator.permutation(n)[:count]) for count in counts]
    limit = float(np.polyfit(1 / counts, found, 1)[1]) if len(counts) > 1 else -1.0
    return limit if limit >= 0 else None


def mean_interval(distance: DistanceOfRows) -> tuple[float, float] | None:
    """The 95 % interval for the mean distance of n samples, over all draws of n samples from the same model.

    It is `distance +- 1.96 standard errors`, see `DistanceOfRows.standard_error`. A second draw of n samples deviates
    from the mean as much as the first one did, so it is in the interval in about 83 % of cases only.

    How often it contains the mean depends on the features. Simulated with 2 to 10 rows per feature and 24 to 48 normal
    features: 94 to 97 % where their variances are equal or decay as 1 / i and their distribution differs from the
    reference; 90 to 93 % where variances decay as 1 / i^2; 95 to 100 % for samples of the reference itself. With
    heavier tails, 96 to 98.5 %. With 8 features and 2 rows per feature, 91 %.

    Returns:
        None with fewer than `INTERVAL_ROWS` rows per feature.
    """
    n, width = distance.rows.shape
    if n < INTERVAL_ROWS * width:
        return None
    centre, error = distance(np.arange(n)), 1.96 * distance.standard_error()
    return max(0.0, centre - error), centre + error


@dataclass(frozen=True)
class KernelDistance:
    """KID: the mean over subsets, their standard deviation, and the standard error of the mean."""

    mean: float
    std: float
    standard_error: float


def kernel_distance(
    features_a: FeatureRows,
    features_b: FeatureRows,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """KID: the unbiased squared MMD with the kernel (x.y / d + 1)^3, over random subsets (Binkowski et al. 2018).

    The standard error has two parts: that of the features, by the delete-d jackknife (Shao & Wu 1989), an upper bound
    if both sides have the same distribution, and that of the random choice of subsets. It needs subsets of at most half
    of the smaller side, and is NaN with one subset.

    Args:
        features_a: (n, d) features, n of 4 or more. Only the rows of one subset are in memory, if they are in a file.
        features_b: (m, d) features.
        subsets: number of subsets.
        subset_size: rows of each side per subset, at most half of the smaller side.
        generator: source of the subsets; seed 0 by default.

    Returns:
        The mean, the standard deviation over subsets, and the standard error of the mean.

    Raises:
        ValueError: fewer than 4 rows, or values that are not finite.

    Example:
        import torch

        features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        kid = patchloom.kernel_distance(features, features + 1, subsets=10)
        print(kid.mean, kid.standard_error)
    """
    n = min(len(features_a), len(features_b))
    if n < 4:
        raise ValueError(f"features: {n} rows are fewer than the 4 of a kernel distance; use more images")
    for name, rows in (("features_a", features_a), ("features_b", features_b)):
        _check_finite(name, rows)
    generator = generator or torch.Generator().manual_seed(0)
    size = min(subset_size, n // 2)
    found = []
    for _ in range(subsets):
        a, b = (side[torch.randperm(len(side), generator=generator)[:size]] for side in (features_a, features_b))
        found.append(squared_mmd(a, b))
    values = np.array(found)
    variance = values.var(ddof=1) if subsets > 1 else np.nan
    # the subsets are drawn independently, so the variance of their mean adds to that of the features
    standard_error = np.sqrt(variance * (size / (n - size) + 1 / subsets))
    return KernelDistance(float(values.mean()), float(values.std()), float(standard_error))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD of two (m, d) sets with KID's kernel (Gretton et al. 2012; Binkowski et al. 2018)."""
    a, b = a.double(), b.double()
    m = len(a)
    kernels = [(x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = sum(float(kernel.sum() - kernel.diagonal().sum()) for kernel in kernels[:2]) / (m * (m - 1))
    return within - 2 * float(kernels[2].mean())


def inception_score(logits: FeatureRows, splits: int = INCEPTION_SPLITS, seed: int = 0) -> tuple[float, float | None]:
    """Inception Score: exp E[KL(p(y|x) || p(y))] (Salimans et al. 2016).

    Args:
        logits: (n, K) class logits. If they are computed when they are read, only a block of them is in memory.
        splits: most parts that the rows are split into. A part has 10 rows or more, because the score of fewer is
            too low: that of a single row is always 1.
        seed: seed of the shuffle before the split.

    Returns:
        Mean and standard deviation over the `inception_splits` parts. The deviation of one part is None.

    Raises:
        ValueError: there is no row, or values are not finite.

    Example:
        import torch

        logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
        mean, std = patchloom.inception_score(logits)
    """
    if not len(logits):
        raise ValueError("logits: there is no row; use more images")
    _check_finite("logits", logits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = [_part_score(logits, part) for part in order.tensor_split(inception_splits(len(order), splits))]
    return float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None


def _part_score(logits: FeatureRows, part: Tensor) -> float:
    """exp E[KL(p(y|x) || p(y))] of the rows at these positions; they are read twice, block by block."""
    log_p = [logits[part].double().log_softmax(1)] if len(part) <= BLOCK_ROWS else None
    blocks = part.split(BLOCK_ROWS)

    def rows() -> Iterator[Tensor]:
        return iter(log_p) if log_p else (logits[block].double().log_softmax(1) for block in blocks)

    sums = [block.logsumexp(0) for block in rows()]
    marginal = (sums[0] if len(sums) == 1 else torch.stack(sums).logsumexp(0)) - np.log(len(part))
    divergences = [(block.exp() * (block - marginal)).sum(1) for block in rows()]
    return float(torch.cat(divergences).mean().exp())


def inception_splits(rows: int, splits: int = INCEPTION_SPLITS) -> int:
    """The number of parts for an Inception Score of this many rows: at most `splits`, of 10 rows or more."""
    return max(1, min(splits, rows // INCEPTION_ROWS))


def colour_layout(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 images -> (N, 16 C) float64 features in [0, 1]: the mean colour of a 4 x 4 grid of tiles.

    They contain colours and their places, and no finer detail. They need no weights, and are not FID.
    """
    return F.adaptive_avg_pool2d(images.to(torch.float64) / 255, 4).flatten(1)
