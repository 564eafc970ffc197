"""Metrics of values that are not finite, and Inception Scores of few images."""

import numpy as np
import pytest
import torch

from patchloom.models.metrics import frechet_distance, inception_score, inception_splits, kernel_distance


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_with_their_number(value: float) -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    broken = features.clone()
    broken[7, 2] = value
    for work in (
        lambda: frechet_distance(broken, features),
        lambda: kernel_distance(features, broken),
        lambda: inception_score(broken),
    ):
        with pytest.raises(ValueError, match="7"):
            work()


@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (8, 1), (19, 1), (20, 2), (99, 9), (100, 10), (50_000, 10)])
def test_parts_of_the_score_have_ten_rows_or_more(rows: int, splits: int) -> None:
    assert inception_splits(rows) == splits


def test_score_of_few_rows_is_that_of_one_part_without_a_deviation() -> None:
    logits = torch.full((8, 2), -100.0)
    logits[torch.arange(8), torch.arange(8) % 2] = 100  # certain, and even over two classes: exactly 2
    mean, std = inception_score(logits)
    assert mean == pytest.approx(2) and std is None
    mean, std = inception_score(logits.repeat(25, 1))
    assert 1.5 < mean <= 2 and std is not None
