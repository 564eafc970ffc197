"""The plain loop computes the same mathematics: outputs, gradients and averages equal those of Patchloom."""

import copy

import pytest
import torch

from patchloom.benchmarks.plain import PlainDenoiser, PlainTraining, PlainUNet, full_grid
from patchloom.benchmarks.setups import song_config
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.loss import denoising_loss
from patchloom.models.patches import coordinate_grid

SIDE = 32


@pytest.fixture
def both() -> tuple[Denoiser, PlainDenoiser]:
    config = song_config(SIDE, 16, 1, dropout=0.0)
    torch.manual_seed(0)
    ours = build_denoiser(config).train()
    for parameter in ours.parameters():  # otherwise the zeros of the last layers hide most of the network
        torch.nn.init.normal_(parameter, std=0.1)
    plain = PlainDenoiser(PlainUNet(SIDE, 5, 3, **config.network_options)).train()
    plain.load_state_dict({name: each for name, each in ours.state_dict().items() if "resample_filter" not in name})
    return ours, plain


def test_outputs_and_gradients_equal_those_of_patchloom(both: tuple[Denoiser, PlainDenoiser]) -> None:
    ours, plain = both
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(3, 3, SIDE, SIDE, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.05, 0.5, 10.0])
    grid = full_grid(SIDE)
    torch.testing.assert_close(grid, coordinate_grid(SIDE, SIDE))
    coordinates = grid.expand(3, -1, -1, -1)
    noisy = clean + sigma[:, None, None, None] * noise
    torch.testing.assert_close(plain(noisy, sigma, coordinates), ours(noisy, sigma, coordinates), rtol=1e-4, atol=1e-4)
    denoising_loss(ours, clean, noise, sigma, coordinates).mean().backward()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    (weight[:, None, None, None] * (plain(noisy, sigma, coordinates) - clean) ** 2).mean().backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        scale = float(one.grad.abs().max())
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_the_average_equals_that_of_patchloom(both: tuple[Denoiser, PlainDenoiser]) -> None:
    _, plain = both
    before = copy.deepcopy(plain)
    training = PlainTraining(plain, SIDE, halflife_images=100)
    training.step(torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8), SIDE // 2)
    expected = HalfLifeEMA(before, 100, rampup_ratio=1e9)  # without the ramp
    expected.update(plain, 4, 4)
    for average, other in zip(training.average.parameters(), expected.module.parameters(), strict=True):
        torch.testing.assert_close(average, other)
    pairs = zip(plain.parameters(), before.parameters(), strict=True)
    moved = max(float((after - first).detach().abs().max()) for after, first in pairs)
    assert moved == pytest.approx(1e-4, rel=0.01)  # the first step of Adam equals the learning rate for every gradient
