"""The agreement of edges, for drawings whose agreement is known."""

import numpy as np
import pytest

from patchloom.benchmarks.edges import edge_agreement


def line(column: int, height: int = 8) -> np.ndarray:
    drawn = np.zeros((1, 8, 16), bool)
    drawn[0, :height, column] = True
    return drawn


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        (line(3), line(3), 1.0),
        (line(3), line(4), 1.0),  # one pixel beside it
        (line(3), line(5), 0.0),
        (line(3) | line(10), line(3), 2 / 3),  # half of the edges are right, and all wanted ones are met
        (line(3, 4), line(3), 2 * 5 / 8 / (1 + 5 / 8)),  # the line of 4 pixels is within one pixel of 5
        (np.zeros((1, 8, 16), bool), line(3), 0.0),
    ],
)
def test_agreement_is_that_of_the_lines(found: np.ndarray, wanted: np.ndarray, score: float) -> None:
    assert edge_agreement(found, wanted) == pytest.approx(score)
