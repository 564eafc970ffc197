"""Draws are pure functions of their names and numbers, and do not depend on the patch size before the noise."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats

from patchloom.models.random_draws import (
    CropBatch,
    Draws,
    RandomDraws,
    RowOrder,
    WindowedOrder,
    derive_seed,
    sampling_generator,
)
from patchloom.models.random_words import draw_words, key_of, normals, uniforms
from patchloom.models.samplers import SeededNoise

CPU = torch.device("cpu")
FIELDS = ("label_kept", "mirrored", "sigma", "corner", "posterior", "noise", "augmentation")


def drawn(
    blocks: range, size: int = 16, *, seed: int = 3, step: int = 8, latent: bool = False, block_size: int = 8,
    augmentation: float = 0.0,
) -> RandomDraws:  # fmt: skip
    return Draws(seed).crops(CropBatch(step, blocks, block_size, 4, 16, size, latent, CPU, augmentation))


def test_a_seed_is_the_same_on_every_machine() -> None:
    # printf '0/rows/3' | sha256sum starts with 9bfb75efa8eeee98
    assert derive_seed(0, "rows", 3) == 0x9BFB75EFA8EEEE98 >> 1
    assert derive_seed(7, 11, 13) == 0x89E9DA91F0454DA4 >> 1


def test_seeds_of_neighbouring_steps_and_blocks_differ() -> None:
    names = [(seed, step, block) for seed in range(3) for step in range(30) for block in range(30)]
    seeds = {derive_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Crops


@pytest.mark.parametrize("latent", [False, True])
def test_runs_that_differ_only_in_patch_size_share_all_draws_up_to_the_noise(latent: bool) -> None:
    large, small = (drawn(range(2, 3), size, latent=latent) for size in (16, 4))
    for name in ("label_kept", "mirrored", "sigma", "corner", "posterior"):
        assert torch.equal(getattr(large, name), getattr(small, name))
    assert large.noise.shape == (8, 4, 16, 16)
    assert small.noise.shape == (8, 4, 4, 4)
    assert small.posterior.shape == ((8, 4, 16, 16) if latent else (8, 0))


def test_the_numbers_of_a_crop_are_words_at_its_place() -> None:
    batch, key = drawn(range(2, 5), 5, latent=True), key_of(3, 8)
    for number in (0, 7, 23):
        crop = 16 + number
        words = draw_words(key, 10 * crop, 10, CPU)
        values = uniforms(words[:7])
        assert batch.label_kept[number] == values[0]
        assert batch.mirrored[number] == values[1]
        assert torch.equal(batch.corner[number], values[2:4])
        assert batch.sigma[number] == normals(words[7:])[0]
        posterior = normals(draw_words(key, (1 << 48) + 512 * crop, 512, CPU))
        assert torch.equal(batch.posterior[number].flatten(), posterior)
        noise = normals(draw_words(key, (2 << 48) + 50 * crop, 50, CPU))
        assert torch.equal(batch.noise[number].flatten(), noise)


@pytest.mark.parametrize("size", [16, 5])
def test_draws_do_not_depend_on_how_a_batch_is_split(size: int) -> None:
    options = {"latent": True, "augmentation": 0.5}
    whole = drawn(range(12), size, **options)
    for blocks in (range(1), range(3, 4), range(5, 12)):
        part = drawn(blocks, size, **options)
        for name in FIELDS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[8 * blocks.start : 8 * blocks.stop])
    for name in FIELDS:  # nor on the size of blocks
        assert torch.equal(getattr(drawn(range(48), size, block_size=2, **options), name), getattr(whole, name))


def test_crops_steps_and_seeds_have_other_numbers() -> None:
    batches = [drawn(range(20), 4), drawn(range(20), 4, step=9), drawn(range(20), 4, seed=4)]
    sigmas = torch.cat([batch.sigma for batch in batches])
    assert len(sigmas.unique()) == 480
    noise = torch.cat([batch.noise.flatten(1) for batch in batches]).numpy()
    assert np.abs(np.corrcoef(noise) - np.eye(480)).max() < 6 / 64**0.5


def test_scalars_are_uniform_and_normal_and_independent() -> None:
    batch = drawn(range(2500), 1)
    for values in (batch.label_kept, batch.mirrored, *batch.corner.unbind(1)):
        assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(batch.sigma.numpy(), "norm").pvalue > 1e-4
    table = torch.stack([batch.label_kept, batch.mirrored, *batch.corner.unbind(1), batch.sigma], 1).numpy()
    assert np.abs(np.corrcoef(table.T) - np.eye(5)).max() < 4.5 / len(table) ** 0.5


def test_draws_stay_on_their_device() -> None:
    meta = torch.device("meta")
    batch = Draws(0).crops(CropBatch(0, range(4), 8, 3, 16, 8, True, meta, 0.5))
    assert all(getattr(batch, name).is_meta for name in FIELDS)
    assert batch.noise.shape == (32, 3, 8, 8) and batch.posterior.shape == (32, 3, 16, 16)
    mask = Draws(0).masks(0, range(4), 8, meta).kept(torch.empty(32, 3, 5, 5, device=meta), 0.1, layer=2)
    assert mask.is_meta and mask.shape == (32, 3, 5, 5)


def test_the_global_generator_does_not_change() -> None:
    before = torch.get_rng_state()
    drawn(range(2), latent=True, augmentation=0.5)
    Draws(0).size_uniform(0)
    assert RowOrder(10, 0).at(range(3, 4))[0] in range(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_sizes_are_uniform_and_repeatable() -> None:
    uniform = np.array([Draws(0).size_uniform(step) for step in range(4000)])
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert uniform.min() >= 0 and uniform.max() < 1
    assert Draws(0).size_uniform(17) == uniform[17]
    assert Draws(1).size_uniform(17) != uniform[17]


# Rows


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9, 16, 17, 50, 99, 1000, 10_007, 65_536])
def test_every_epoch_visits_every_row_once(rows: int) -> None:
    order = RowOrder(rows, seed=4)
    epochs = [order.at(range(rows * epoch, rows * (epoch + 1))) for epoch in range(3)]
    assert all(np.array_equal(np.sort(epoch), np.arange(rows)) for epoch in epochs)
    assert rows < 7 or len({tuple(epoch) for epoch in epochs}) == 3


def test_a_row_does_not_depend_on_which_rows_are_asked_with_it() -> None:
    whole = RowOrder(20, seed=1).at(range(100))
    for crops in (range(99, 100), range(13, 62), range(5, 95, 7), range(40, 40)):
        assert np.array_equal(RowOrder(20, seed=1).at(crops), whole[crops.start : crops.stop : crops.step])
    assert not np.array_equal(RowOrder(20, seed=2).at(range(100)), whole)


def test_orders_of_four_rows_are_equally_frequent() -> None:
    epochs = RowOrder(4, seed=0).at(range(4 * 24_000)).reshape(-1, 4)
    counts = Counter(map(tuple, epochs.tolist()))
    assert counts.keys() == set(permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize("rows", [10, 37, 100])
def test_every_row_is_as_likely_at_every_place_and_after_every_row(rows: int) -> None:
    count = 200 * rows
    epochs = RowOrder(rows, seed=5).at(range(rows * count)).reshape(count, rows)
    places = [np.bincount(epochs[:, place], minlength=rows) for place in range(0, rows, 7)]
    assert min(stats.chisquare(counts).pvalue for counts in places) > 1e-5
    distances = (epochs[:, 1:] - epochs[:, :-1]) % rows  # 1 ... rows - 1, each as likely for a random permutation
    assert stats.chisquare(np.bincount(distances.flatten(), minlength=rows)[1:]).pvalue > 1e-4
    moved = (epochs == np.arange(rows)).sum(1)  # fixed points: mean 1 and variance 1
    assert moved.mean() == pytest.approx(1, abs=5 / count**0.5)
    assert moved.var() == pytest.approx(1, abs=5 * 2 / count**0.5)


def test_neighbouring_epochs_are_not_correlated() -> None:
    epochs = RowOrder(10_000, seed=0).at(range(200_000)).reshape(20, 10_000)
    places = np.argsort(epochs, axis=1)
    correlations = np.corrcoef(places)[np.triu_indices(20, 1)]
    assert np.abs(correlations).max() < 4.5 / 10_000**0.5


@pytest.mark.parametrize("rows", [100_000_000, 3_000_000_019])
def test_orders_of_many_rows_need_no_memory(rows: int) -> None:
    order, crops = RowOrder(rows, seed=0), range(7 * rows - 2000, 7 * rows + 2000)
    found = order.at(crops)
    assert found.min() >= 0 and found.max() < rows
    assert len(set(found[:2000].tolist())) == len(set(found[2000:].tolist())) == 2000
    assert stats.kstest(found / rows, "uniform").pvalue > 1e-4
    kept = sum(getattr(value, "nbytes", 0) for value in vars(order).values())
    assert math.isclose(kept, 0, abs_tol=64)


# Windows

UNEVEN = [5, 0, 3, 20, 7, 1, 9]  # rows of shards, one of them without any and one larger than a window


@pytest.mark.parametrize(("shards", "window"), [(UNEVEN, 8), (UNEVEN, 1000), ([1], 1), ([64] * 40, 200), ([3] * 50, 1)])
def test_every_epoch_of_windows_visits_every_row_once(shards: list[int], window: int) -> None:
    order, rows = WindowedOrder(shards, window, seed=4), sum(shards)
    epochs = [order.at(range(rows * epoch, rows * (epoch + 1))) for epoch in range(3)]
    assert all(np.array_equal(np.sort(epoch), np.arange(rows)) for epoch in epochs)
    assert rows < 7 or len({tuple(epoch) for epoch in epochs}) == 3


def test_a_row_of_a_window_does_not_depend_on_what_was_asked_before() -> None:
    whole = WindowedOrder(UNEVEN, 8, seed=1).at(range(200))
    asked_before = WindowedOrder(UNEVEN, 8, seed=1)
    for crops in (range(199, 200), range(13, 162), range(5, 195, 7), range(40, 40), range(60)):
        wanted = whole[crops.start : crops.stop : crops.step]
        assert np.array_equal(WindowedOrder(UNEVEN, 8, seed=1).at(crops), wanted)
        assert np.array_equal(asked_before.at(crops), wanted)
    assert not np.array_equal(WindowedOrder(UNEVEN, 8, seed=2).at(range(200)), whole)


def test_windows_follow_each_other_and_read_their_shards_whole() -> None:
    shards = np.random.default_rng(0).integers(0, 40, 60)
    order, starts = WindowedOrder(shards, 300, seed=2), np.cumsum(shards) - shards
    crop, seen, numbers = 0, [], []
    while crop < 2 * order.rows:
        window = order.window_at(crop)
        assert window.crops.start == crop and window.crops == order.window_at(window.crops[-1]).crops
        assert abs(len(window.crops) - order.rows / order.windows) < 40  # the rows of a shard
        rows = [range(starts[shard], starts[shard] + shards[shard]) for shard in window.shards]
        assert sorted(order.at(window.crops)) == sorted(row for shard in rows for row in shard)
        crop, seen, numbers = window.crops.stop, [*seen, *window.shards], [*numbers, window.number]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 2 * order.windows - 1
    assert sorted(seen) == sorted([*np.flatnonzero(shards)] * 2)
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]


def test_rows_of_a_window_are_as_likely_at_every_place_and_shards_in_every_window() -> None:
    order, epochs = WindowedOrder([8] * 12, 32, seed=3), 600  # 3 windows of 4 shards
    found = order.at(range(96 * epochs)).reshape(epochs, 96)
    for place in (0, 17, 31, 32, 95):
        assert stats.chisquare(np.bincount(found[:, place], minlength=96)).pvalue > 1e-4
    first = np.zeros((epochs, 12))  # whether a shard is in the first window
    np.put_along_axis(first, found[:, :32] // 8, 1, axis=1)
    together = first.T @ first / epochs
    wanted = np.where(np.eye(12), 4 / 12, 4 * 3 / (12 * 11))
    assert np.abs(together - wanted).max() < 5 * (wanted.max() / epochs) ** 0.5
    same_shard = (found[:, :31] // 8 == found[:, 1:32] // 8).mean()  # of neighbours in a window: 7 of 31 others
    assert same_shard == pytest.approx(7 / 31, abs=0.02)


def test_windows_of_many_rows_need_memory_only_for_their_shards() -> None:
    shards = np.full(200_000, 500)
    order = WindowedOrder(shards, 262_144, seed=0)
    found = order.at(range(7 * order.rows - 2000, 7 * order.rows + 2000))
    assert len(set(found[:2000].tolist())) == len(set(found[2000:].tolist())) == 2000
    assert len(np.unique(found[2000:] // 500)) <= len(order.window_at(7 * order.rows).shards) == 524
    layouts = [array.nbytes for layout in order._layouts.values() for array in vars(layout).values()]
    assert sum(layouts) < 2 * 20 * len(shards)


# Sampling


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
