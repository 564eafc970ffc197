"""Replayed evaluations: which inputs share a recording, and what happens if nothing can be recorded.

CUDA graphs need a GPU, so a recording is here the evaluation itself, which reads the same tensors again.
"""

from collections.abc import Callable

import pytest
import torch
from sampling_models import pixel_model
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.generate import Sampling, generate
from patchloom.models.replay import KEPT_GRAPHS, NetworkCall, ReplayedNetwork

SIGMA = torch.tensor(0.5, dtype=torch.float64)


class Recorder:
    """Counts the recordings and their repetitions."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, evaluation: NetworkCall) -> NetworkCall:
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> Tensor:
            self.replays[number] += 1
            return evaluation()

        return replay


def noise(count: int, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def test_each_shape_and_precision_is_recorded_once_while_it_is_used(tiny_denoiser: Callable[..., Denoiser]) -> None:
    denoiser, recorder = tiny_denoiser().eval().requires_grad_(False), Recorder()
    network = ReplayedNetwork(denoiser, recorder)
    for x in (noise(2), noise(2) + 1, noise(3), noise(2), noise(3)):
        assert torch.equal(network(x, SIGMA), denoiser(x, SIGMA))
    assert recorder.replays == [3, 2] and KEPT_GRAPHS == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(noise(2), SIGMA), denoiser(noise(2), SIGMA))  # takes the place of the oldest
    network(noise(3), SIGMA)
    network(noise(2), SIGMA)
    assert recorder.replays == [3, 3, 1, 1]


def test_a_network_that_cannot_be_recorded_is_evaluated_with_one_warning(
    tiny_denoiser: Callable[..., Denoiser],
) -> None:
    denoiser, tried = tiny_denoiser().eval().requires_grad_(False), list[int]()

    def refuse(_: NetworkCall) -> NetworkCall:
        tried.append(1)
        raise torch.OutOfMemoryError("no memory")

    network = ReplayedNetwork(denoiser, refuse)
    with pytest.warns(UserWarning, match="no memory"):
        assert torch.equal(network(noise(2), SIGMA), denoiser(noise(2), SIGMA))
    assert torch.equal(network(noise(3), SIGMA), denoiser(noise(3), SIGMA)) and tried == [1]


def test_all_evaluations_of_a_sampler_are_replayed(tiny_denoiser: Callable[..., Denoiser]) -> None:
    denoiser, recorder = tiny_denoiser().eval().requires_grad_(False), Recorder()
    model = pixel_model(denoiser)
    replayed = type(model)(model.denoiser, model.normalisation, None, model.card, ReplayedNetwork(denoiser, recorder))
    sampling = Sampling("heun", 6, size=(16, 32), canvas="extrapolate")
    assert torch.equal(generate(replayed, [0, 1], [-1, -1], sampling), generate(model, [0, 1], [-1, -1], sampling))
    assert recorder.replays == [2 * 6 - 1]
