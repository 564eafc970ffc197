"""Metrics: how far two sets of images are apart, as numbers with known worlds to check them in."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_LAYOUT = "colour-layout-48"


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """The Fréchet distance of two Gaussians fitted to (n, d) features (Dowson & Landau 1982; FID, Heusel 2017).

    numpy or torch; float64 inside; unbiased covariance (n - 1). Raises ValueError for fewer than 2 rows,
    other widths on both sides, or values that are not finite.
    """
    a, b = (np.asarray(features, dtype=np.float64) for features in (features_a, features_b))
    for name, features in (("features_a", a), ("features_b", b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} has shape {features.shape}: a distance takes (n, d) with n of 2 or more")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} has values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {a.shape[1]} and {b.shape[1]} wide: both sides need the same features")
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    # tr sqrt(AB) is the sum of the singular values of sqrt(A) sqrt(B): stable where sqrtm(AB) is not.
    root = np.linalg.svd(_symmetric_root(cov_a) @ _symmetric_root(cov_b), compute_uv=False).sum()
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    return float(max(distance, 0.0))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def colour_layout(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 images -> (N, 48) float64 features in [0, 1]: the mean colour of a 4 x 4 grid of tiles.

    They see colours and where they lie, nothing finer: an honest, weightless measure, not FID.
    """
    return F.adaptive_avg_pool2d(images.to(torch.float64) / 255, 4).flatten(1)
