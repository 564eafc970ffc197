"""Draws of patch sizes: shared, stratified and independent ones train every size in its share, with equal weight."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.loss import SIGMA_BINS, losses_by_sigma
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import PatchSchedule, patch_schedule
from patchloom.models.random_draws import CropBatch, Draws
from patchloom.models.step import StoredRows, crop_losses, new_state, training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step

SHARES = {64: 0.5, 32: 0.3, 16: 0.2}  # Eq. 5 at p = 0.5
MULTIPLIERS = {64: 1, 32: 2, 16: 4}


def step_settings(draw: str, schedule: PatchSchedule | None = None, **changes: Any) -> StepSettings:
    values = {"seed": 5, "schedule": schedule or patch_schedule(64, 0.5), "updates": 10_000, "batch_size": 256,
              "block_size": 8, "lr": 1e-3, "lr_rampup_images": 0, "draw": draw}  # fmt: skip
    return StepSettings(**{**values, **changes})


def plans_of(method: StepSettings, steps: int) -> list[StepPlan]:
    """The plans of a run's first steps, each where the one before ended."""
    plans: list[StepPlan] = []
    crops = 0
    for step in range(steps):
        plans.append(plan_step(method, step, crops))
        crops += plans[-1].crops
    return plans


def blocks_by_size(plans: list[StepPlan]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for plan in plans:
        for size, blocks in zip(plan.sizes, plan.blocks, strict=True):
            counts[size.pixels] += blocks
    return counts


# Shared


def test_a_shared_draw_is_one_size_in_a_batch_that_is_its_multiple() -> None:
    for plan in plans_of(step_settings("shared"), 50):
        (size,) = plan.sizes
        assert plan.crops == 256 * MULTIPLIERS[size.pixels]
        assert not plan.whole_groups


def test_shared_draws_follow_equation_5() -> None:
    drawn = Counter(plan.sizes[0].pixels for plan in plans_of(step_settings("shared"), 5000))
    counts = [drawn[pixels] for pixels in SHARES]
    assert stats.chisquare(counts, [5000 * share for share in SHARES.values()]).pvalue > 1e-4


def test_one_independent_rank_draws_the_shared_size() -> None:
    shared, alone = plans_of(step_settings("shared"), 100), plans_of(step_settings("independent"), 100)
    assert [(plan.sizes, plan.blocks) for plan in shared] == [(plan.sizes, plan.blocks) for plan in alone]


# Stratified


@pytest.mark.parametrize("batch", [64, 88, 256, 1000])
def test_after_any_number_of_steps_every_size_has_its_share_to_within_a_block(batch: int) -> None:
    method, done = step_settings("stratified", batch_size=batch), Counter[int]()
    for steps, plan in enumerate(plans_of(method, 300), start=1):
        done += blocks_by_size([plan])
        for pixels, share in SHARES.items():
            assert abs(done[pixels] - steps * share * MULTIPLIERS[pixels] * batch / 8) <= 1
    assert abs(8 * done.total() - 300 * batch * 1.9) <= 3 * 8


def test_every_stratified_step_holds_every_size_and_hardly_more_crops_than_another() -> None:
    plans = plans_of(step_settings("stratified"), 300)
    assert all(plan.sizes == patch_schedule(64, 0.5).sizes and min(plan.blocks) >= 1 for plan in plans)
    sizes = [plan.crops for plan in plans]
    assert max(sizes) - min(sizes) <= 3 * 8
    for counts in zip(*(plan.blocks for plan in plans), strict=True):
        assert max(counts) - min(counts) <= 1


def test_a_stratified_step_does_not_depend_on_the_seed() -> None:
    one, other = (plans_of(step_settings("stratified", seed=seed), 20) for seed in (1, 2))
    assert one == other


@pytest.mark.parametrize(("p", "wanted"), [(1.0, {64}), (0.0, {32, 16})])
def test_stratified_steps_at_p_of_0_and_1_hold_no_crop_of_the_others(p: float, wanted: set[int]) -> None:
    for plan in plans_of(step_settings("stratified", patch_schedule(64, p)), 20):
        assert {group.size.pixels for group in plan.share(0, 1)} == wanted


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_stratified_workers_have_the_same_mix_to_within_a_block_a_size(workers: int) -> None:
    for plan in plans_of(step_settings("stratified"), 20):
        mixes: list[Counter[int]] = []
        for worker in range(workers):
            groups = plan.share(worker, workers)
            mixes.append(Counter({group.size.pixels: len(group.blocks) for group in groups}))
        for pixels, blocks in blocks_by_size([plan]).items():
            counts = [mix[pixels] for mix in mixes]
            assert sum(counts) == blocks
            assert max(counts) - min(counts) <= 1


# Independent


@pytest.fixture(scope="module")
def independent() -> np.ndarray:
    """(3000, 4) patch sizes of four emulated ranks over 3000 steps."""
    method = step_settings("independent", emulated_ranks=4)
    return np.array([[size.pixels for size in plan_step(method, step, 0).sizes] for step in range(3000)])


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_follows_equation_5(independent: np.ndarray, rank: int) -> None:
    counts = [(independent[:, rank] == pixels).sum() for pixels in SHARES]
    assert stats.chisquare(counts, [3000 * share for share in SHARES.values()]).pvalue > 1e-4


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(4), 2)))
def test_ranks_do_not_depend_on_each_other(independent: np.ndarray, one: int, other: int) -> None:
    table = [[((independent[:, one] == a) & (independent[:, other] == b)).sum() for b in SHARES] for a in SHARES]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_ranks_sizes_do_not_depend_on_those_of_the_step_before(independent: np.ndarray) -> None:
    now, next_ = independent[:-1, 0], independent[1:, 0]
    table = [[((now == a) & (next_ == b)).sum() for b in SHARES] for a in SHARES]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_rank_has_its_part_of_the_batch_times_its_own_multiplier() -> None:
    for plan in plans_of(step_settings("independent", emulated_ranks=4), 100):
        assert len(plan.sizes) == 4
        for size, blocks in zip(plan.sizes, plan.blocks, strict=True):
            assert blocks * 8 == 256 // 4 * MULTIPLIERS[size.pixels]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
def test_a_rank_belongs_to_one_worker_whole(workers: int) -> None:
    for plan in plans_of(step_settings("independent", emulated_ranks=4), 20):
        shares = [plan.share(worker, workers) for worker in range(workers)]
        owned = [(group.size.pixels, len(group.blocks)) for share in shares for group in share]
        wanted = [(size.pixels, blocks) for size, blocks in zip(plan.sizes, plan.blocks, strict=True)]
        assert owned == wanted  # in the ranks' order, none split and none left out
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_have_different_draws_and_the_first_is_that_of_a_shared_step() -> None:
    uniforms = [Draws(3).size_uniform(7, rank) for rank in range(50)]
    assert len(set(uniforms)) == 50
    assert uniforms[0] == Draws(3).size_uniform(7)


# What they minimise


@pytest.mark.parametrize(("draw", "ranks"), [("shared", 1), ("stratified", 1), ("independent", 4)])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_crops_of_a_size_weigh_its_probability_in_the_mean_step(draw: str, ranks: int, p: float) -> None:
    schedule, steps = patch_schedule(64, p), 1500
    method = step_settings(draw, schedule, emulated_ranks=ranks)
    weights = np.zeros((steps, 3))
    for step, plan in enumerate(plans_of(method, steps)):
        for size, blocks in zip(plan.sizes, plan.blocks, strict=True):
            weights[step, schedule.sizes.index(size)] += blocks * 8 / (256 * MULTIPLIERS[size.pixels])
    for number, size in enumerate(schedule.sizes):
        error = (size.probability * (1 - size.probability) / (steps * ranks)) ** 0.5
        within = 1e-3 if draw == "stratified" else 4.5 * error + 1e-12
        assert weights[:, number].mean() == pytest.approx(size.probability, abs=within)
    if draw != "stratified":  # a stratified step is rounded to blocks
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    assert weights.sum(1).mean() == pytest.approx(1, abs=1e-3)


TINY = patch_schedule(16, 0.5, smaller=((0.5, 0.6, 2), (0.25, 0.4, 4)))


def rows_of(crops: range) -> StoredRows:
    """StoredRows that are a function of a crop's number in the run."""
    images = [torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(crop)) for crop in crops]
    return StoredRows(torch.stack(images).to(torch.uint8), torch.full((len(crops),), -1))


def flat_of(denoiser: Denoiser, method: StepSettings, plan: StepPlan, worker: int = 0, workers: int = 1) -> Tensor:
    """Gradients and record that one worker adds to the step."""
    mine = copy.deepcopy(denoiser).train()
    state = new_state(mine, [HalfLifeEMA(mine, 100)], method, (0.9, 0.999), 1e-3)
    kept: list[Tensor] = []
    rows = [rows_of(group.crops) for group in plan.share(worker, workers)]
    work = zip(plan.share(worker, workers), rows, strict=True)
    training_step(state, method, plan, work, pixel_normalisation(), lambda flat: kept.append(flat.clone()))
    assert state.images_seen == plan.crops  # of all workers
    return kept[0]


def tiny_method(draw: str, **changes: Any) -> StepSettings:
    return step_settings(draw, TINY, batch_size=16, block_size=4, **changes)


@pytest.mark.parametrize(("draw", "ranks"), [("stratified", 1), ("independent", 2)])
def test_the_gradient_of_a_mixed_step_is_the_weighted_sum_of_its_sizes(
    tiny_denoiser: Callable[..., Denoiser], draw: str, ranks: int
) -> None:
    method, denoiser = tiny_method(draw, emulated_ranks=ranks), tiny_denoiser()
    step = next(s for s in range(100) if len(set(plan_step(method, s, 0).sizes)) > 1)
    plan = plan_step(method, step, 40)
    parameters = list(denoiser.parameters())
    wanted, first = torch.zeros(sum(p.numel() for p in parameters)), 0
    for size, count in zip(plan.sizes, plan.blocks, strict=True):
        blocks = range(first, first + count)
        draws = Draws(5).crops(CropBatch(step, blocks, 4, 3, 16, size.pixels, False, torch.device("cpu")))
        rows = rows_of(range(40 + 4 * blocks.start, 40 + 4 * blocks.stop))
        losses, _ = crop_losses(denoiser, rows, draws, size.pixels, method, pixel_normalisation())
        gradients = torch.autograd.grad(losses.mean(), parameters)
        share = 4 * count / (16 * MULTIPLIERS[4 * size.pixels])
        wanted += share * torch.cat([gradient.flatten() for gradient in gradients])
        first += count
    found = flat_of(denoiser, method, plan)[: len(wanted)]
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize(("draw", "ranks"), [("stratified", 1), ("independent", 2), ("shared", 1)])
def test_two_workers_add_up_to_one_for_every_draw(
    tiny_denoiser: Callable[..., Denoiser], draw: str, ranks: int
) -> None:
    method, denoiser = tiny_method(draw, emulated_ranks=ranks), tiny_denoiser()
    plan = plan_step(method, 1, 40)
    alone = flat_of(denoiser, method, plan)
    together = flat_of(denoiser, method, plan, 0, 2) + flat_of(denoiser, method, plan, 1, 2)
    assert float((together - alone).abs().max() / alone.abs().max()) < 1e-5
    counts = alone[-3 * len(SIGMA_BINS) * 2 :].view(3, len(SIGMA_BINS), 2)[..., 1].sum(1)
    seen = blocks_by_size([plan])
    assert counts.tolist() == [4 * seen[pixels] for pixels in (16, 8, 4)]


# Shares of images


def test_the_released_progressive_schedule_shares_out_images() -> None:
    schedule = patch_schedule(64, 0.5, "progressive", shares_of="images")
    assert [size.probability for size in schedule.sizes] == pytest.approx([0.5 / 0.7, 0.15 / 0.7, 0.05 / 0.7])
    assert schedule.sizes[0].probability == pytest.approx(0.714, abs=5e-4)
    assert schedule.mean_multiplier == pytest.approx(1 / 0.7)
    sizes = [schedule.size_at(step, 1400, uniform=0.0) for step in range(1400)]
    assert [size.pixels for size in sizes] == [16] * 100 + [32] * 300 + [64] * 1000
    crops = Counter[int]()
    for size in sizes:
        crops[size.pixels] += 10 * size.batch_multiplier
    assert {pixels: count / crops.total() for pixels, count in crops.items()} == pytest.approx(SHARES)


@pytest.mark.parametrize(("images", "batch", "updates"), [(2000, 1, 1400), (200_000_000, 512, 273_438)])
def test_a_run_by_images_has_more_updates(images: int, batch: int, updates: int) -> None:
    assert patch_schedule(64, 0.5, "progressive", shares_of="images").updates(images, batch) == updates


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_shares_of_images_at_p_of_0_and_1_add_up(p: float) -> None:
    schedule = patch_schedule(64, p, "progressive", shares_of="images")
    assert sum(size.probability for size in schedule.sizes) == pytest.approx(1)
    assert schedule.sizes[0].probability == p


# Losses by noise level


@pytest.mark.parametrize(
    ("sigma", "wanted"),
    [(1e-6, "0-0.1"), (0.05, "0-0.1"), (0.11, "0.1-0.3"), (0.29, "0.1-0.3"), (0.31, "0.3-1"), (0.99, "0.3-1"),
     (1.01, "1-3"), (2.9, "1-3"), (3.1, "3-inf"), (80.0, "3-inf"), (1e9, "3-inf")],
)  # fmt: skip
def test_a_loss_is_counted_at_its_noise_level(sigma: float, wanted: str) -> None:
    record = losses_by_sigma(torch.tensor([7.0]), torch.tensor([sigma]))
    assert {name: entry for name, entry in zip(SIGMA_BINS, record.tolist(), strict=True) if any(entry)} == {
        wanted: [7.0, 1.0]
    }


@pytest.mark.parametrize("edge", [0.1, 0.3, 1.0, 3.0])
def test_a_loss_at_an_edge_is_in_one_bin_of_the_two_beside_it(edge: float) -> None:
    counts = losses_by_sigma(torch.ones(1), torch.tensor([edge]))[:, 1].tolist()
    beside = [edge in (float(x) for x in name.split("-") if x != "inf") for name in SIGMA_BINS]
    assert sum(counts) == 1
    assert beside[counts.index(1)]


def test_no_loss_is_lost_between_the_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma, losses = (1.5 * torch.randn(5000, generator=generator) - 1).exp(), torch.rand(5000, generator=generator)
    record = losses_by_sigma(losses, sigma)
    edges = [0, 0.1, 0.3, 1, 3, np.inf]
    counts, _ = np.histogram(sigma.numpy(), edges)
    sums, _ = np.histogram(sigma.numpy(), edges, weights=losses.numpy().astype(float))
    assert record[:, 1].tolist() == counts.tolist()
    np.testing.assert_allclose(record[:, 0], sums, rtol=1e-4)


def test_a_bad_loss_is_left_out_of_sum_and_count_and_no_gradient_is_kept() -> None:
    losses = torch.tensor([float("nan"), 2.0, float("inf"), 3.0], requires_grad=True)
    record = losses_by_sigma(losses, torch.tensor([0.01, 0.5, 0.5, 0.02]))
    assert record.tolist() == [[3.0, 1.0], [0.0, 0.0], [2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert not record.requires_grad
