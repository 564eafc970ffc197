"""Windows cover a canvas without seams, and blend what they estimate by known weights."""

import itertools
import math

import pytest
import torch
from gaussian_worlds import GaussianField
from torch import Tensor

from patchloom.models.generate import Sampling
from patchloom.models.inpainting import Reconstruction
from patchloom.models.samplers import SeededNoise
from patchloom.models.windows import WindowedNetwork, window_starts

SIDE, WIDTH, DRAWS = 16, 40, 256


@pytest.mark.parametrize("side", [4, 8, 16, 64])
def test_windows_cover_every_canvas_and_overlap_by_half(side: int) -> None:
    for size in range(side, 5 * side):
        starts = list(window_starts(size, side))
        assert starts[0] == 0 and starts[-1] == size - side
        steps = [later - earlier for earlier, later in itertools.pairwise(starts)]
        assert all(0 < step <= math.ceil(side / 2) for step in steps)


def test_one_window_is_the_network_itself() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(WindowedNetwork(lambda x, *_: torch.sin(x), 8)(x, torch.tensor(1.0)), torch.sin(x), rtol=1e-6)


def test_estimates_of_single_pixels_are_not_changed() -> None:
    x = torch.randn(2, 3, 11, 29)
    made = WindowedNetwork(lambda x, sigma, *_: x / (1 + sigma), 8)(x, torch.tensor(3.0))
    torch.testing.assert_close(made, x / 4, rtol=1e-5, atol=1e-6)


def test_windows_are_weighted_by_the_distance_from_their_border() -> None:
    """Windows at the columns 0 and 2 of 6 say 10 and 20; a window of 4 has the weights 1, 3, 3, 1 (of 8) per column."""
    said = iter([10.0, 20.0])
    made = WindowedNetwork(lambda x, *_: torch.full_like(x, next(said)), 4)(torch.zeros(1, 1, 4, 6), torch.tensor(1.0))
    wanted = torch.tensor([10, 10, (3 * 10 + 1 * 20) / 4, (1 * 10 + 3 * 20) / 4, 20, 20])
    torch.testing.assert_close(made[0, 0], wanted.expand(4, 6))


def test_labels_and_conditions_belong_to_their_window() -> None:
    x, condition, labels = torch.zeros(2, 1, 8, 20), torch.randn(2, 3, 8, 20), torch.eye(2)

    def network(x: Tensor, sigma: Tensor, coordinates: Tensor | None, labels: Tensor, shown: Tensor) -> Tensor:
        assert coordinates is None
        return shown.sum(1, keepdim=True) + labels[:, 1][:, None, None, None]

    made = WindowedNetwork(network, 8)(x, torch.tensor(1.0), None, labels, condition)
    wanted = condition.sum(1, keepdim=True) + torch.tensor([0.0, 1.0])[:, None, None, None]
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


LENGTH = 3.0
PLACES = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
WINDOW = GaussianField(torch.zeros(SIDE**2).double(), 0.25 * torch.exp(-torch.cdist(PLACES, PLACES) / LENGTH))
TRUE_STEP = math.sqrt(2 * 0.25 * (1 - math.exp(-1 / LENGTH)))  # rms difference of two neighbors


def ideal_window(x: Tensor, sigma: Tensor, *_: object) -> Tensor:
    """The exact denoiser of windows of a field with covariance .25 exp(-distance / 3 pixels)."""
    return WINDOW.denoise(x.flatten(1).double(), sigma.expand(len(x))).view_as(x)


def steps_of(images: Tensor) -> Tensor:
    """The rms difference of neighboring columns, over that of the field."""
    return (images[..., 1:] - images[..., :-1]).square().mean((0, 1, 2)).sqrt() / TRUE_STEP


def test_a_wide_canvas_has_no_seams_and_does_not_repeat_itself() -> None:
    """Steps between columns are those of the field everywhere, and distant columns are not correlated."""
    images = Sampling()(WindowedNetwork(ideal_window, SIDE), SeededNoise(list(range(DRAWS)), (1, SIDE, WIDTH)))
    steps = steps_of(images)
    assert steps.shape == (WIDTH - 1,)
    assert float(steps.mean()) == pytest.approx(1.06, abs=0.04)  # one window gives 1.06 too: 18 steps are not exact
    assert float((steps / steps.mean() - 1).abs().max()) < 0.08
    middle, far = images[:, 0, SIDE // 2, 4], images[:, 0, SIDE // 2, 4 + SIDE + 8]
    assert abs(float(torch.corrcoef(torch.stack([middle, far]))[0, 1])) < 4 / math.sqrt(DRAWS)


def test_windows_can_be_reconstructed_through() -> None:
    """Out-painting on a canvas of windows has gradients, and keeps the known values."""
    known, mask = torch.zeros(1, 1, SIDE, WIDTH).double(), torch.zeros(1, 1, SIDE, WIDTH, dtype=torch.bool)
    known[..., 12:28], mask[..., 12:28] = WINDOW.draw(1, seed=5).double(), True
    denoise = Reconstruction(WindowedNetwork(ideal_window, SIDE), known, mask)
    images = Sampling()(denoise, SeededNoise(list(range(64)), (1, SIDE, WIDTH)))
    assert (images[..., 12:28] - known[..., 12:28]).abs().max() < 1e-12
    assert float(steps_of(images)[[11, 27]].max()) < 1.3
