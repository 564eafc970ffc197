"""One, two and four workers see the same luck in every step and train the same model, for every draw of sizes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_workers import Together
from torch import Tensor

from patchloom.models.codec import pixel_space
from patchloom.models.denoiser import Denoiser
from patchloom.models.luck import RowOrder, draw_block
from patchloom.models.patches import crop, offsets, patch_schedule
from patchloom.models.plan import Method, plan_step
from patchloom.models.step import Rows, new_state, training_step

STEPS, ROWS = 50, 40
DRAWS: dict[str, dict[str, Any]] = {
    "shared": {}, "stratified": {"draw": "stratified"}, "independent": {"draw": "independent", "emulated_ranks": 4},
}  # fmt: skip


def method_of(draw: str) -> Method:
    return Method(
        seed=3, schedule=patch_schedule(16, 0.5), updates=STEPS, batch_size=8, block_size=2, lr=1e-3,
        lr_rampup_images=100, mirror=True, **DRAWS[draw],
    )  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (ROWS, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("draw", DRAWS)
def test_any_number_of_workers_sees_the_same_rows_crops_sigmas_and_noise(draw: str, images: Tensor) -> None:
    method, order = method_of(draw), RowOrder(ROWS, seed=3)
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
                        luck = draw_block(3, step, block, 2, 3, 16, size, False, torch.device("cpu"))
                        rows = torch.tensor([order[k] for k in group.crops[2 * number : 2 * number + 2]])
                        patches, where = crop(images[rows], offsets(luck.corner, 16, size), size)
                        blocks[block] = [rows, patches, where, luck.sigma, luck.noise, luck.mirrored]
            seen.append(blocks)
        assert seen[0].keys() == seen[1].keys() == seen[2].keys()
        for block, tensors in seen[0].items():
            for others in seen[1:]:
                assert all(torch.equal(one, other) for one, other in zip(tensors, others[block], strict=True))
        consumed += plan.crops


@pytest.mark.parametrize("draw", DRAWS)
def test_losses_of_fifty_steps_agree(draw: str, images: Tensor, tiny_denoiser: Callable[..., Denoiser]) -> None:
    method, fresh = method_of(draw), tiny_denoiser()
    losses = []
    for workers in (1, 2, 4):

        def work(rank: int, reduce: Callable[[Tensor], None], workers: int = workers) -> list[float]:
            denoiser, order, seen = copy.deepcopy(fresh).train(), RowOrder(ROWS, seed=3), []
            state = new_state(denoiser, [], method, (0.9, 0.999), 1e-3)
            for step in range(STEPS):
                plan = plan_step(method, step, state.images_seen)
                groups = plan.share(rank, workers)
                numbers = [torch.tensor([order[k] for k in group.crops]) for group in groups]
                rows = [Rows(images[number], torch.full((len(number),), -1)) for number in numbers]
                training_step(state, method, plan, zip(groups, rows, strict=True), pixel_space(), reduce)
                total, crops = state.gradients.loss_and_crops.sum((0, 1)).tolist()
                assert crops == plan.crops
                seen.append(total / crops)
            return seen

        found = Together(workers).run(work)
        assert all(one == found[0] for one in found)
        losses.append(found[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
