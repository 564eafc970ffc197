"""One, two and four workers have the same random draws in every step, and train the same model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_workers import Together
from torch import Tensor

from patchloom.models.checkpoints import load_checkpoint, save_checkpoint
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import crop, offsets, patch_schedule
from patchloom.models.random_draws import CropBatch, Draws, RowOrder
from patchloom.models.step import StoredRows, TrainingState, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

STEPS, ROWS = 50, 40
DRAWS: dict[str, dict[str, Any]] = {
    "shared": {}, "stratified": {"draw": "stratified"}, "independent": {"draw": "independent", "emulated_ranks": 4},
}  # fmt: skip


def step_settings(draw: str) -> StepSettings:
    return StepSettings(
        seed=3, schedule=patch_schedule(16, 0.5), updates=STEPS, batch_size=8, block_size=2, lr=1e-3,
        lr_rampup_images=100, mirror=True, **DRAWS[draw],
    )  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (ROWS, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("draw", DRAWS)
def test_any_number_of_workers_sees_the_same_rows_crops_sigmas_and_noise(draw: str, images: Tensor) -> None:
    method, order = step_settings(draw), RowOrder(ROWS, seed=3)
    consumed = 0
    for step in range(STEPS):
        plan = plan_step(method, step, consumed)
        seen: list[dict[int, list[Tensor]]] = []
        for workers in (1, 2, 4):
            blocks: dict[int, list[Tensor]] = {}
            for worker in range(workers):
                for group in plan.share(worker, workers):
                    for number, block in enumerate(group.blocks):
                        size = group.size.pixels
                        batch = CropBatch(step, range(block, block + 1), 2, 3, 16, size, False, torch.device("cpu"))
                        draws = Draws(3).crops(batch)
                        rows = torch.from_numpy(order.at(group.crops[2 * number : 2 * number + 2]))
                        patches, where = crop(images[rows], offsets(draws.corner, 16, size), size)
                        blocks[block] = [rows, patches, where, draws.sigma, draws.noise, draws.mirrored]
            seen.append(blocks)
        assert seen[0].keys() == seen[1].keys() == seen[2].keys()
        for block, tensors in seen[0].items():
            for others in seen[1:]:
                assert all(torch.equal(one, other) for one, other in zip(tensors, others[block], strict=True))
        consumed += plan.crops


def new_run(fresh: Denoiser, method: StepSettings) -> TrainingState:
    denoiser = copy.deepcopy(fresh).train()
    return new_state(denoiser, [HalfLifeEMA(denoiser, 100)], method, (0.9, 0.999), 1e-3)


def train_on(states: list[TrainingState], method: StepSettings, images: Tensor, until: int = STEPS) -> list[float]:
    """As many workers as states take the steps that are left up to `until`; their losses, which all must see."""

    def work(rank: int, reduce: Callable[[Tensor], None]) -> list[float]:
        state, order, seen = states[rank], RowOrder(ROWS, seed=3), []
        while state.step < until:
            plan = plan_step(method, state.step, state.images_seen)
            groups = plan.share(rank, len(states))
            numbers = [torch.from_numpy(order.at(group.crops)) for group in groups]
            rows = [StoredRows(images[number], torch.full((len(number),), -1)) for number in numbers]
            training_step(state, method, plan, zip(groups, rows, strict=True), pixel_normalisation(), reduce)
            total, crops = state.gradients.loss_and_crops.sum((0, 1)).tolist()
            assert crops == plan.crops
            seen.append(total / crops)
        return seen

    found = Together(len(states)).run(work)
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("draw", DRAWS)
def test_losses_of_fifty_steps_agree(draw: str, images: Tensor, tiny_denoiser: Callable[..., Denoiser]) -> None:
    method, fresh = step_settings(draw), tiny_denoiser()
    one, two, four = (
        train_on([new_run(fresh, method) for _ in range(workers)], method, images) for workers in (1, 2, 4)
    )
    assert two == pytest.approx(one, rel=1e-5)
    assert four == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_run_of_two_workers_then_one_then_two_is_that_of_two(
    draw: str, images: Tensor, tiny_denoiser: Callable[..., Denoiser], tmp_path: Path
) -> None:
    method, fresh = step_settings(draw), tiny_denoiser()
    straight = [new_run(fresh, method) for _ in range(2)]
    wanted = train_on(straight, method, images, 18)
    found: list[float] = []
    for workers, until in ((2, 6), (1, 12), (2, 18)):  # each goes on from what the one before has left on disk
        states = [new_run(fresh, method) for _ in range(workers)]
        for state in states:
            if found:
                load_checkpoint(tmp_path, state)
        assert states[0].step == len(found)
        found += train_on(states, method, images, until)
        save_checkpoint(tmp_path, states[0])
    assert found == pytest.approx(wanted, rel=1e-5)
    assert states[0].crops_by_size == straight[0].crops_by_size
    for one, other in (
        (states[0].denoiser, straight[0].denoiser),
        (states[0].emas[0].module, straight[0].emas[0].module),
    ):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
