"""The step: plain EDM at p = 1, sums over workers, and random draws that settings share."""

import copy
from typing import Any

import pytest
import torch

from patchloom.models.cards import DenoiserConfig
from patchloom.models.codec import to_pixels
from patchloom.models.denoiser import build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.gradients import Gradients
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.models.patches import coordinate_grid, patch_schedule
from patchloom.models.random_draws import CropBatch, Draws
from patchloom.models.step import StoredRows, TrainingState, learning_rate, new_state, one_hot, training_step
from patchloom.models.step_plan import StepPlan, StepSettings, plan_step

R = 8
SPACE = Normalisation("latents", (0.1, -0.2), (2.0, 0.5))


def make_state(method: StepSettings) -> TrainingState:
    torch.manual_seed(1)
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.0}
    config = DenoiserConfig(network="song", network_options=options, resolution=R, channels=2, classes=3,
                            coordinates="linear", sigma_data=0.5)  # fmt: skip
    denoiser = build_denoiser(config)
    # Adam's eps is large, so that gradients that are zero but for rounding stay small
    return new_state(denoiser, [HalfLifeEMA(denoiser, 50.0, 0.5)], method, (0.9, 0.999), 1e-3)


def make_method(p: float, **changes: Any) -> StepSettings:
    values = {"seed": 5, "schedule": patch_schedule(R, p), "updates": 10, "batch_size": 8, "block_size": 4,
              "lr": 1e-2, "lr_rampup_images": 32, "label_dropout": 0.3}  # fmt: skip
    return StepSettings(**{**values, **changes})


def make_rows(count: int) -> StoredRows:
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(count, 2, R, R, generator=generator)
    return StoredRows(mean, torch.arange(count) % 3, mean.abs() * 0.1)


def rows_of(rows: StoredRows, crops: range, first: int) -> StoredRows:
    here = slice(crops.start - first, crops.stop - first)
    return StoredRows(rows.image[here], rows.label[here], None if rows.std is None else rows.std[here])


def test_at_p_of_1_a_step_equals_edm() -> None:
    method = make_method(1.0, reduction="sum")
    state = make_state(method)
    plain = copy.deepcopy(state.denoiser)
    average = copy.deepcopy(state.denoiser)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    grid = coordinate_grid(R, R)[None].expand(8, -1, -1, -1)
    for step in range(3):
        rows = make_rows(8)
        plan = plan_step(method, step, step * 8)
        training_step(state, method, plan, zip(plan.share(), [rows], strict=True), SPACE, None)

        draws = Draws(5).crops(CropBatch(step, range(2), 4, 2, R, R, True, torch.device("cpu")))
        images = rows.image + rows.std * draws.posterior
        images = (images - torch.tensor([0.1, -0.2])[:, None, None]) * torch.tensor([2.0, 0.5])[:, None, None]
        sigma = (1.2 * draws.sigma - 1.2).exp()[:, None, None, None]
        labels = torch.eye(3)[rows.label] * (draws.label_kept >= 0.3)[:, None]
        denoised = plain(images + sigma * draws.noise, sigma.flatten(), grid, labels)
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        optimizer.zero_grad()
        (weight * (denoised - images) ** 2).sum().div(8).backward()
        seen = (step + 1) * 8
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, seen / 32)
        optimizer.step()
        beta = 0.5 ** (8 / min(50, 0.5 * seen))
        with torch.no_grad():
            for ours, new in zip(average.parameters(), plain.parameters(), strict=True):
                ours.copy_(beta * ours + (1 - beta) * new)
    for ours, theirs in zip(state.denoiser.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(state.emas[0].module.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert state.images_seen == 24 and state.step == 3


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_the_gradients_of_workers_add_up_to_those_of_one(workers: int) -> None:
    method = make_method(0.0)
    plan = plan_step(method, 4, 96)
    assert plan.sizes[0].pixels in (4, 2)
    rows = make_rows(plan.crops)
    flats = []
    for count in (1, workers):
        total = torch.zeros(())
        for worker in range(count):
            state = make_state(method)
            kept: list[torch.Tensor] = []
            work = [(group, rows_of(rows, group.crops, 96)) for group in plan.share(worker, count)]
            training_step(state, method, plan, work, SPACE, lambda flat, k=kept: k.append(flat.clone()))
            total = total + kept[0]
        flats.append(total)
    torch.testing.assert_close(flats[1], flats[0], atol=1e-5, rtol=1e-4)
    assert flats[1][state.gradients.length :].view(-1, 2)[:, 1].sum() == plan.crops


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("whole_groups", [False, True])
def test_every_block_belongs_to_one_worker(workers: int, whole_groups: bool) -> None:
    sizes = patch_schedule(64, 0.5).sizes
    plan = StepPlan(0, 1000, 8, (*sizes, sizes[0], sizes[1]), (3, 24, 12, 2, 7), whole_groups)
    groups = [group for worker in range(workers) for group in plan.share(worker, workers)]
    assert sorted(crop for group in groups for crop in group.crops) == list(range(1000, 1000 + 8 * 48))
    assert sorted(block for group in groups for block in group.blocks) == list(range(48))
    if whole_groups:
        assert [len(group.blocks) for group in groups] == [3, 24, 12, 2, 7]


def test_minus_one_is_no_class() -> None:
    assert one_hot(torch.tensor([2, -1, 0]), 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_bad_gradients_are_cleaned_and_good_ones_kept() -> None:
    layer = torch.nn.Linear(3, 1, bias=False)
    gradients = Gradients(layer, (1,))
    assert layer.weight.grad is not None
    layer.weight.grad.copy_(torch.tensor([[float("nan"), float("inf"), -float("inf")]]))
    gradients.loss_and_crops[0] = torch.tensor([float("nan"), 8.0])
    gradients.clean()
    assert layer.weight.grad.tolist() == [[0.0, 1e5, -1e5]]
    assert gradients.loss_and_crops[0].isnan().tolist() == [True, False]  # a diverged loss is not hidden


def test_the_learning_rate_ramps_up_over_images() -> None:
    method = make_method(0.5)
    assert [learning_rate(method, seen) for seen in (0, 16, 32, 99)] == [0, 0.005, 0.01, 0.01]


def test_an_average_moves_half_way_in_a_half_life() -> None:
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(layer.weight)
    ema = HalfLifeEMA(layer, halflife_images=1000, rampup_ratio=0.05)
    torch.nn.init.ones_(layer.weight)
    for step in range(10):
        ema.update(layer, images_seen=10**9 + step * 100, images_in_step=100)
    assert float(ema.module.weight) == pytest.approx(0.5, abs=1e-6)
    assert ema.decay(images_seen=2000, images_in_step=100) == pytest.approx(0.5)  # ramp: 5% of 2000 is 100
    assert ema.decay(images_seen=0, images_in_step=100) == 0


def test_pixels_go_there_and_back_unchanged() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    x = pixel_normalisation().normalise(values)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.equal(to_pixels(x, pixel_normalisation(), None), values)


def test_a_space_is_affine_and_undone() -> None:
    stored = torch.randn(4, 2, 3, 3)
    x = SPACE.normalise(stored)
    torch.testing.assert_close(x[:, 1], (stored[:, 1] + 0.2) * 0.5)
    torch.testing.assert_close(SPACE.restore(x), stored)
