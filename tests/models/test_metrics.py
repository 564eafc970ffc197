"""Metrics: distances of Gaussians that are known in closed form, and scipy's on the same features."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from patchloom.models.metrics import (
    DistanceOfRows,
    Moments,
    colour_layout,
    extrapolated_distance,
    frechet_distance,
    gaussian_distance,
    inception_score,
    kernel_distance,
    mean_interval,
    squared_mmd,
)


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
        (np.zeros((1, 3)), np.zeros((5, 3)), r"\(1, 3\)"),
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\b3\b.*\b4\b"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "features_a"),
        (np.zeros(5), np.zeros((5, 3)), r"\(5,\)"),
    ],
)
def test_features_without_a_distance_are_refused(a: np.ndarray, b: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet_distance(a, b)


def test_the_colour_layout_is_the_mean_of_every_tile() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = colour_layout(images)
    assert features.shape == (2, 48) and features.dtype == torch.float64
    third_row_second_column_of_green = images[1, 1, 8:12, 4:8].double().mean() / 255
    assert float(features[1, 16 + 2 * 4 + 1]) == pytest.approx(float(third_row_second_column_of_green))


def test_moments_of_parts_add_up() -> None:
    rows = np.random.default_rng(2).standard_normal((301, 5)) * 3 + 1e4  # a large mean must not cost digits
    pieces = [Moments.of(rows[start:stop]) for start, stop in ((0, 1), (1, 130), (130, 301))]
    for whole in (pieces[0] + pieces[1] + pieces[2], pieces[2] + (pieces[0] + pieces[1])):
        assert whole.count == 301
        assert np.allclose(whole.mean, rows.mean(0), rtol=1e-12)
        assert np.allclose(whole.covariance, np.cov(rows.T), rtol=1e-9)


def test_the_distance_of_chosen_rows_is_the_distance_of_these_rows() -> None:
    rng = np.random.default_rng(3)
    rows, other = rng.standard_normal((60, 8)), Moments.of(rng.standard_normal((90, 8)) * 1.5 + 0.2)
    distance = DistanceOfRows(rows, other.mean, other.covariance)
    for chosen in (np.arange(60), np.arange(5), rng.integers(0, 60, 60)):
        some = Moments.of(rows[chosen])
        wanted = gaussian_distance(some.mean, some.covariance, other.mean, other.covariance)
        assert distance(chosen) == pytest.approx(wanted, rel=1e-6)


def decaying(d: int) -> np.ndarray:
    """Variances of (d,) features that decay like those of images."""
    variances: np.ndarray = 1 / np.arange(1, d + 1)
    return variances


def distance_to_truth(rows: np.ndarray, variances: np.ndarray) -> DistanceOfRows:
    """The distance of rows to the Gaussian of mean 0 with these variances."""
    return DistanceOfRows(rows, torch.zeros(len(variances), dtype=torch.float64), torch.from_numpy(np.diag(variances)))


@pytest.mark.parametrize("rows_per_feature", [4, 10])
def test_the_extrapolation_is_the_distance_of_unlimited_samples(rows_per_feature: int) -> None:
    n, wanted = rows_per_feature * 32, 32 * 0.3**2
    biases, errors = [], []
    for seed in range(60):
        rows = np.random.default_rng(seed).standard_normal((n, 32)) + 0.3
        distance = distance_to_truth(rows, np.ones(32))
        found = extrapolated_distance(distance, seed=seed)
        assert found is not None
        biases.append(distance(np.arange(n)) - wanted)
        errors.append(found - wanted)
    # the error is 6 % of the bias, measured to 3 %; a line from n / 4 on misses by 27 % with 4 rows per feature
    assert abs(np.mean(errors)) < 0.15 * np.mean(biases)


def test_the_extrapolation_of_samples_of_the_reference_is_never_negative() -> None:
    variances, found = decaying(16), []
    for seed in range(40):  # the distance is 0, and everything measured is bias
        rows = np.random.default_rng(seed).standard_normal((160, 16)) * variances**0.5
        found.append(extrapolated_distance(distance_to_truth(rows, variances), seed=seed))
    kept = [limit for limit in found if limit is not None]
    assert 5 <= len(kept) <= 35 and min(kept) >= 0  # about half of the lines end below 0


def test_few_rows_are_not_extrapolated() -> None:
    rows = np.random.default_rng(0).standard_normal((63, 16)) + 1
    assert extrapolated_distance(distance_to_truth(rows, np.ones(16))) is None


@pytest.mark.parametrize("rows_per_feature", [2, 5, 10, 50])
def test_95_percent_of_intervals_contain_the_mean_distance(rows_per_feature: int) -> None:
    n, repetitions, rng = rows_per_feature * 24, 2000, np.random.default_rng(rows_per_feature)
    intervals, found = np.empty((repetitions, 2)), np.empty(repetitions)
    for number in range(repetitions):
        distance = distance_to_truth(rng.standard_normal((n, 24)) * 1.2 + 0.4, np.ones(24))
        interval = mean_interval(distance)
        assert interval is not None
        intervals[number], found[number] = interval, distance(np.arange(n))
    assert 0.93 < np.mean((intervals[:, 0] < found.mean()) & (found.mean() < intervals[:, 1])) < 0.97
    # an interval for the mean: another draw is in it with probability P(|N(0, 2)| < 1.96) = .834
    assert np.mean((intervals[1:, 0] < found[:-1]) & (found[:-1] < intervals[1:, 1])) == pytest.approx(0.834, abs=0.04)


def test_the_standard_error_of_samples_of_the_reference_is_their_deviation() -> None:
    found, variances = [], []
    for seed in range(400):  # the distance is 0: there is no first-order term, and its estimate is all second order
        distance = distance_to_truth(np.random.default_rng(seed).standard_normal((480, 48)), np.ones(48))
        found.append(distance(np.arange(480)))
        variances.append(distance.standard_error() ** 2)
    assert np.mean(variances) ** 0.5 == pytest.approx(np.std(found), rel=0.15)


def test_the_interval_of_a_constant_reference_is_that_of_a_mean_of_squares() -> None:
    rows = np.random.default_rng(0).standard_normal((500, 2))
    distance = DistanceOfRows(rows + 2, torch.zeros(2).double(), torch.zeros(2, 2).double())
    deviation = ((rows + 2) ** 2).sum(1).std() / 500**0.5  # the distance is the mean of |row|^2
    assert distance.standard_error() == pytest.approx(deviation, rel=0.01)


def test_few_rows_have_no_interval() -> None:
    rows = np.random.default_rng(0).standard_normal((31, 16))
    assert mean_interval(distance_to_truth(rows, np.ones(16))) is None


def test_kid_is_torchmetrics_on_the_same_subsets() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 16, generator=generator), torch.randn(50, 16, generator=generator) + 0.3
    assert squared_mmd(a, b) == pytest.approx(float(poly_mmd(a.double(), b.double())), rel=1e-12)
    theirs = KernelInceptionDistance(feature=_Rows(), subsets=20, subset_size=25)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean, std = theirs.compute()
    ours = kernel_distance(a, b, subsets=20, subset_size=25, generator=torch.Generator().manual_seed(5))
    assert (ours.mean, ours.std) == (pytest.approx(float(mean), rel=1e-4), pytest.approx(float(std), rel=1e-3))


class _Rows(torch.nn.Module):
    """Features that are there already, as torchmetrics takes a network."""

    num_features = 16

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def test_kid_of_one_distribution_covers_nothing() -> None:
    covered = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(120, 12, generator=generator) for _ in range(2))
        found = kernel_distance(a, b, subsets=30)
        covered += abs(found.mean) <= 1.96 * found.standard_error
    assert covered >= 37  # 95 % of 40 are 38


@pytest.mark.parametrize("n", [500, 2000])
def test_the_standard_error_of_kid_is_its_deviation_over_repetitions(n: int) -> None:
    # with 2,000 rows, the choice of 30 subsets of 20 rows is three quarters of the variance
    found, variances = [], []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(n, 3, generator=generator) for _ in range(2))
        kid = kernel_distance(a, b + 0.7, subsets=30, subset_size=20, generator=generator)
        found.append(kid.mean)
        variances.append(kid.standard_error**2)
    assert np.mean(variances) ** 0.5 == pytest.approx(np.std(found), rel=0.12)  # three deviations of the simulation


def test_the_score_of_certain_and_even_classes_is_their_number() -> None:
    logits = torch.eye(7).repeat(20, 1) * 1000
    mean, std = inception_score(logits, splits=1)
    assert (mean, std) == (pytest.approx(7, rel=1e-6), None)
    assert inception_score(torch.zeros(50, 7))[0] == pytest.approx(1, abs=1e-9)
