"""The average of the weights moves half way in one half-life, and faster in a young run."""

import numpy as np
import pytest
import torch
from torch import nn

from patchloom.models.ema import HalfLifeEMA


def constant(value: float) -> nn.Linear:
    layer = nn.Linear(3, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def values(ema: HalfLifeEMA) -> list[float]:
    return [float(x) for parameter in ema.module.parameters() for x in parameter.flatten()]


def test_the_average_is_halfway_to_a_constant_target_after_one_half_life() -> None:
    ema = HalfLifeEMA(constant(1.0), halflife_images=1000)
    for step in range(40):
        ema.update(constant(3.0), images_seen=10**9 + 25 * step, images_in_step=25)
    assert values(ema) == pytest.approx([2.0] * 8, rel=1e-5)


@pytest.mark.parametrize(("images", "wanted"), [(500, 0.5**0.5), (1000, 0.5), (2000, 0.25)])
def test_the_decay_is_one_half_to_the_images_over_the_half_life(images: int, wanted: float) -> None:
    assert HalfLifeEMA(constant(0), 1000).decay(10**9, images) == pytest.approx(wanted)


def test_the_half_life_is_held_to_a_share_of_the_images_seen() -> None:
    ema = HalfLifeEMA(constant(0.0), halflife_images=500, rampup_ratio=0.05)
    left = 1.0
    for step in range(1, 201):
        ema.update(constant(1.0), images_seen=64 * step, images_in_step=64)
        left *= 0.5 ** (64 / min(500, 0.05 * 64 * step))
        if step % 50 == 0:
            assert values(ema) == pytest.approx([1 - left] * 8, rel=1e-5)
    assert ema.decay(10_000, 64) == pytest.approx(0.5 ** (64 / 500))
    assert ema.decay(9_000, 64) == pytest.approx(0.5 ** (64 / 450))


def test_a_ramp_of_0_follows_the_weights_and_does_not_freeze_the_average() -> None:
    ema = HalfLifeEMA(constant(0.0), halflife_images=500, rampup_ratio=0.0)
    ema.update(constant(7.0), images_seen=64, images_in_step=64)
    assert values(ema) == [7.0] * 8


def test_the_average_is_a_copy_that_takes_no_gradient() -> None:
    layer = constant(1.0)
    ema = HalfLifeEMA(layer, halflife_images=500)
    nn.init.constant_(layer.weight, 9.0)
    assert values(ema) == [1.0] * 8
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert not ema.module.training


def test_several_steps_of_a_moving_target_match_the_recursion() -> None:
    targets = np.random.default_rng(0).normal(size=20)
    ema, wanted = HalfLifeEMA(constant(0.5), halflife_images=100, rampup_ratio=1.0), 0.5
    for step, target in enumerate(targets, start=1):
        ema.update(constant(float(target)), images_seen=30 * step, images_in_step=30)
        beta = 0.5 ** (30 / min(100, 30 * step))
        wanted = beta * wanted + (1 - beta) * target
    assert torch.tensor(values(ema)).tolist() == pytest.approx([wanted] * 8, rel=1e-4)


def test_buffers_are_copied_with_each_update_whatever_their_type_and_shape() -> None:
    module, other = nn.BatchNorm1d(2), torch.zeros(1, dtype=torch.int64)
    module.register_buffer("seen", other, persistent=False)
    ema = HalfLifeEMA(module, halflife_images=1e9)
    for batch in range(1, 4):
        module(torch.tensor([[0.0, 2.0], [2.0, 6.0]]))  # means 1 and 4, variances 2 and 8
        module.seen = torch.full((batch,), batch)
        ema.update(module, images_seen=2 * batch, images_in_step=2)
    kept = dict(ema.module.named_buffers())
    left = 0.9**3
    assert kept["running_mean"].tolist() == pytest.approx([1 - left, 4 * (1 - left)])
    assert kept["running_var"].tolist() == pytest.approx([left + 2 * (1 - left), left + 8 * (1 - left)])
    assert kept["num_batches_tracked"] == 3 and kept["seen"].tolist() == [3, 3, 3]
    module.running_mean += 1
    assert kept["running_mean"].tolist() == pytest.approx([1 - left, 4 * (1 - left)])
