"""Neighbours: clouds whose precision and recall are known, and a plain computation of the same."""

import subprocess
import sys

import pytest
import torch

from patchloom.models.neighbours import neighbourhood


def cloud(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_blocks_of_any_size_agree_with_whole_matrices(block: int) -> None:
    real, samples = cloud(150), cloud(90, seed=1) * 0.8 + 0.3
    found = neighbourhood(real, samples, k=3, block=block)
    between, within = torch.cdist(samples, real), torch.cdist(real, real).sort(1).values
    radii, sample_radii = within[:, 3], torch.cdist(samples, samples).sort(1).values[:, 3]
    assert found.precision == (between <= radii).any(1).double().mean()
    assert found.recall == (between <= sample_radii[:, None]).any(0).double().mean()
    assert torch.equal(found.nearest, between.argmin(1))
    assert torch.allclose(found.density.double(), (between <= radii).sum(1).double() / 3)
    assert torch.allclose(found.nearest_distance.double(), between.min(1).values, atol=1e-5)
    assert torch.equal(found.authentic, between.min(1).values > within[between.argmin(1), 1])


def test_a_cloud_far_away_has_neither_precision_nor_recall() -> None:
    found = neighbourhood(cloud(200), cloud(200, seed=1) + 1000)
    assert (found.precision, found.recall) == (0, 0) and found.authenticity == 1


def test_a_shrunk_cloud_keeps_its_precision_and_loses_its_recall() -> None:
    real = cloud(1000)
    same, shrunk = neighbourhood(real, cloud(1000, seed=1)), neighbourhood(real, cloud(1000, seed=1) * 0.3)
    wide = neighbourhood(real, cloud(1000, seed=1) * 3)
    assert shrunk.precision > same.precision > wide.precision
    assert shrunk.recall < 0.5 < same.recall and shrunk.precision > 0.99
    assert wide.recall > 0.9 > 0.5 > wide.precision  # Kynkäänniemi et al. 2019, figure 3: the two are traded


def test_copies_are_not_authentic() -> None:
    real = cloud(300)
    copies = neighbourhood(real, real[:100] + 1e-4)
    assert copies.authenticity == 0 and torch.equal(copies.nearest, torch.arange(100))
    assert 0.4 < neighbourhood(real, cloud(300, seed=1)).authenticity < 0.8


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples"):
        neighbourhood(cloud(10), cloud(3))


MEASURE = """
import resource, time, torch
from patchloom.models.neighbours import neighbourhood
generator = torch.Generator().manual_seed(0)
real, samples = (torch.randn(50_000, 2048, generator=generator) for _ in range(2))
began = time.monotonic()
found = neighbourhood(real, samples)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(found.precision, found.recall, peak, time.monotonic() - began)
"""


@pytest.mark.slow
def test_fifty_thousand_a_side_take_less_than_four_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    precision, recall, gibibytes, seconds = map(float, done.stdout.split())
    print(f"precision {precision}, recall {recall}, peak {gibibytes:.2f} GiB, {seconds:.0f} s")
    assert 0 <= precision <= 1 and 0 <= recall <= 1
    assert gibibytes < 4
