"""Luck is a pure function of its names and numbers, and does not depend on patch size before the noise."""

import numpy as np
import pytest
import torch

from patchloom.models.random_draws import (
    RowOrder,
    concatenate_draws,
    derive_seed,
    draws_of_block,
    sampling_generator,
    size_uniform,
)
from patchloom.models.samplers import SeededNoise

CPU = torch.device("cpu")


def test_a_seed_is_the_same_on_every_machine() -> None:
    # printf '0/rows/3' | sha256sum starts with 9bfb75efa8eeee98
    assert derive_seed(0, "rows", 3) == 0x9BFB75EFA8EEEE98 >> 1
    assert derive_seed(7, 11, 13) == 0x89E9DA91F0454DA4 >> 1


def test_seeds_of_neighbouring_steps_and_blocks_differ() -> None:
    names = [(seed, step, block) for seed in range(3) for step in range(30) for block in range(30)]
    seeds = {derive_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_epoch_is_a_permutation_and_each_is_another() -> None:
    order = RowOrder(50, seed=4)
    epochs = [[order[50 * epoch + entry] for entry in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_row_does_not_depend_on_which_rows_were_asked_before() -> None:
    one, other = RowOrder(20, seed=1), RowOrder(20, seed=1)
    forwards = [one[k] for k in range(100)]
    jumping = {k: other[k] for k in (99, 0, 41, 39, 40, 80, 20, 99, 5)}
    assert all(forwards[k] == row for k, row in jumping.items())
    assert [RowOrder(20, seed=2)[k] for k in range(100)] != forwards


@pytest.mark.parametrize("latent", [False, True])
def test_runs_that_differ_only_in_patch_size_share_all_draws_up_to_the_noise(latent: bool) -> None:
    large, small = (draws_of_block(3, 8, 2, 8, 4, 16, size, latent, CPU) for size in (16, 4))
    for name in ("label_kept", "mirrored", "sigma", "corner", "posterior"):
        assert torch.equal(getattr(large, name), getattr(small, name))
    assert large.noise.shape == (8, 4, 16, 16)
    assert small.noise.shape == (8, 4, 4, 4)
    assert small.posterior.shape == ((8, 4, 16, 16) if latent else (8, 0))


def test_a_block_is_drawn_in_the_stated_order_from_its_own_generator() -> None:
    block = draws_of_block(3, 8, 2, count=5, channels=4, resolution=8, size=4, latent=True, device=CPU)
    generator = torch.Generator().manual_seed(derive_seed(3, 8, 2))
    assert torch.equal(block.label_kept, torch.rand(5, generator=generator))
    assert torch.equal(block.mirrored, torch.rand(5, generator=generator))
    assert torch.equal(block.sigma, torch.randn(5, generator=generator))
    assert torch.equal(block.corner, torch.rand(5, 2, generator=generator))
    assert torch.equal(block.posterior, torch.randn(5, 4, 8, 8, generator=generator))
    assert torch.equal(block.noise, torch.randn(5, 4, 4, 4, generator=generator))


def test_blocks_differ_and_are_joined_in_order() -> None:
    first, second = (draws_of_block(0, 0, block, 8, 3, 8, 8, False, CPU) for block in (0, 1))
    assert not torch.equal(first.noise, second.noise)
    assert torch.equal(concatenate_draws([first, second]).corner, torch.cat([first.corner, second.corner]))


def test_the_global_generator_does_not_change() -> None:
    before = torch.get_rng_state()
    draws_of_block(0, 0, 0, 8, 3, 8, 8, True, CPU)
    size_uniform(0, 0)
    assert RowOrder(10, 0)[3] in range(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_sizes_are_uniform_and_repeatable() -> None:
    uniforms = torch.tensor([size_uniform(0, step) for step in range(4000)])
    assert uniforms.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert size_uniform(0, 17) == uniforms[17]
    assert size_uniform(1, 17) != uniforms[17]


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_sampling_seeds_below_32_bits_are_torchs_own(seed: int) -> None:
    wanted = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.randn(100, generator=sampling_generator(seed)), wanted)


@pytest.mark.parametrize("seed", [2**32, 5 + 2**32, 2**63 + 7, 2**64 - 1])
def test_larger_sampling_seeds_use_both_halves(seed: int) -> None:
    words = np.random.RandomState([seed % 2**32, seed // 2**32]).randint(0, 2**32, 2000, dtype=np.uint32)
    uniforms = (words % 2**24).astype(np.float32) / 2**24  # torch keeps 24 bits of a word
    assert torch.equal(torch.rand(2000, generator=sampling_generator(seed)), torch.from_numpy(uniforms))


def test_sampling_seeds_that_share_32_bits_give_independent_noise() -> None:
    seeds = [5, 5 + 2**32, 5 + 2**33, 2**32 + 6, 2**63 + 5]
    noise = SeededNoise(seeds, (1, 100, 100))().flatten(1)
    apart = noise @ noise.T / 10_000 - torch.eye(5)
    assert apart.abs().max() < 0.07  # 5 standard errors of a variance
