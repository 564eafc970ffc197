"""Metrics: distances of Gaussians that are known in closed form, and scipy's on the same features."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from patchloom.models.metrics import colour_layout, frechet_distance


def gaussian_features(mean: np.ndarray, cov: np.ndarray, n: int = 64) -> np.ndarray:
    """Features whose sample mean and (n - 1) covariance are exactly these."""
    noise = np.random.default_rng(0).standard_normal((n, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    features: np.ndarray = white @ np.linalg.cholesky(cov).T + mean
    return features


def test_a_shift_costs_its_square() -> None:
    cov = np.array([[2.0, 0.3], [0.3, 1.0]])
    a, b = gaussian_features(np.zeros(2), cov), gaussian_features(np.array([3.0, 4.0]), cov)
    assert frechet_distance(a, b) == pytest.approx(25, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_commuting_covariances_cost_the_squares_of_their_deviations() -> None:
    a = gaussian_features(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = gaussian_features(np.zeros(3), np.diag([16.0, 4.0, 1.0]), n=40)
    assert frechet_distance(a, b) == pytest.approx((1 - 4) ** 2 + 0 + (3 - 1) ** 2, abs=1e-9)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(13, abs=1e-9)


def test_it_is_scipys_even_with_fewer_rows_than_columns() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((10, 24)), rng.standard_normal((30, 24)) * 2 + 0.5
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b)).trace()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "n of 2 or more"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 and 4 wide"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite"),
        (np.zeros(5), np.zeros((5, 3)), "shape"),
    ],
)
def test_what_has_no_distance_is_refused(a: np.ndarray, b: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet_distance(a, b)


def test_the_colour_layout_is_the_mean_of_every_tile() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = colour_layout(images)
    assert features.shape == (2, 48) and features.dtype == torch.float64
    third_row_second_column_of_green = images[1, 1, 8:12, 4:8].double().mean() / 255
    assert float(features[1, 16 + 2 * 4 + 1]) == pytest.approx(float(third_row_second_column_of_green))
