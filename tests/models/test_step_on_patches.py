"""A step on patches trains on the crops it says it does, and any number of workers takes the same one."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchloom.models.checkpoints import load_checkpoint, save_checkpoint
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.random_draws import CropBatch, Draws
from patchloom.models.step import StoredRows, TrainingState, new_state, training_step
from patchloom.models.step_plan import CropGroup, StepPlan, StepSettings

METHOD = StepSettings(
    seed=7, schedule=patch_schedule(16, 0.0, smaller=[(0.5, 1.0, 2)]), updates=5, batch_size=8, block_size=4,
    lr=1e-3, lr_rampup_images=0, mirror=True,
)  # fmt: skip
PLAN = StepPlan(step=3, first_crop=100, block_size=4, sizes=(METHOD.schedule.sizes[1],), blocks=(4,))


def state_of(denoiser: Denoiser, method: StepSettings = METHOD) -> TrainingState:
    """A fresh state; Adam's eps is large so that gradients that are zero but for rounding stay small."""
    mine = copy.deepcopy(denoiser).train()
    return new_state(mine, [HalfLifeEMA(mine, 100)], method, (0.9, 0.999), 1e-3)


@pytest.fixture
def rows() -> StoredRows:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (16, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return StoredRows(image, torch.randint(-1, 2, (16,), generator=generator))


def parts_of(
    rows: StoredRows, worker: int, workers: int, microbatch: int | None = None
) -> list[tuple[CropGroup, StoredRows]]:
    groups = PLAN.share(worker, workers, microbatch)
    parts = [slice(group.crops.start - 100, group.crops.stop - 100) for group in groups]
    return [(group, StoredRows(rows.image[part], rows.label[part])) for group, part in zip(groups, parts, strict=True)]


def step_of(denoiser: Denoiser, rows: StoredRows, workers: int, method: StepSettings = METHOD) -> list[TrainingState]:
    """What each of `workers` holds after the step; the all-reduce adds flats that were made one by one."""
    flats: list[Tensor] = []
    for worker in range(workers):
        training_step(
            state_of(denoiser, method), method, PLAN, parts_of(rows, worker, workers), pixel_normalisation(),
            lambda flat: flats.append(flat.clone()),
        )  # fmt: skip

    def add_flats(flat: Tensor) -> None:
        flat.copy_(torch.stack(flats).sum(0))

    states = [state_of(denoiser, method) for _ in range(workers)]
    for worker, state in enumerate(states):
        training_step(state, method, PLAN, parts_of(rows, worker, workers), pixel_normalisation(), add_flats)
    return states


def flat_weights(state: TrainingState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.denoiser.parameters()])


def test_a_step_on_patches_is_the_loss_of_python_slices(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows
) -> None:
    denoiser = tiny_denoiser()
    state = state_of(denoiser)
    training_step(state, METHOD, PLAN, parts_of(rows, 0, 1), pixel_normalisation(), None)

    plain = copy.deepcopy(denoiser).train()
    axis, total = torch.linspace(-1, 1, 16), torch.zeros(())
    for block in range(4):
        draws = Draws(7).crops(CropBatch(3, range(block, block + 1), 4, 3, 16, 8, False, torch.device("cpu")))
        mirrored, sigmas, noise = draws.mirrored, draws.sigma, draws.noise
        corners = (draws.corner * 9).long()  # 9 positions of an 8-pixel patch in 16
        for number in range(4):
            image = rows.image[4 * block + number].float() / 127.5 - 1
            image = image if mirrored[number] < 0.5 else image.flip(-1)
            left, top = corners[number].tolist()
            patch = image[:, top : top + 8, left : left + 8]
            x, y = axis[left : left + 8].expand(8, 8), axis[top : top + 8, None].expand(8, 8)
            sigma = (1.2 * sigmas[number] - 1.2).exp()
            noisy = patch + sigma * noise[number]
            denoised = plain(noisy[None], sigma, torch.stack([x, y])[None])[0]
            total = total + (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (denoised - patch).square().mean()
    (total / 16).backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in plain.parameters() if parameter.grad is not None])
    found = state.gradients.flat[: state.gradients.length]
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    loss, crops = state.gradients.loss_and_crops[1].sum(0).tolist()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert crops == 16
    assert (state.step, state.images_seen, state.crops_by_size) == (1, 16, [0, 16])


@pytest.mark.parametrize("workers", [2, 3, 4, 5])
def test_any_number_of_workers_takes_the_step_of_one(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows, workers: int
) -> None:
    denoiser = tiny_denoiser(classes=2)
    method = replace(METHOD, label_dropout=0.3)
    (alone,) = step_of(denoiser, rows, 1, method)
    together = step_of(denoiser, rows, workers, method)
    for state in together:
        torch.testing.assert_close(flat_weights(state), flat_weights(alone), rtol=0, atol=1e-6)
        assert torch.equal(flat_weights(state), flat_weights(together[0]))
        assert state.gradients.loss_and_crops[1].sum(0)[1] == 16


@pytest.mark.parametrize("microbatch", [1, 4, 9, 100])
def test_microbatches_add_up_to_the_batch(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows, microbatch: int
) -> None:
    denoiser, flats = tiny_denoiser(), []
    for most in (None, microbatch):
        state = state_of(denoiser)
        training_step(state, METHOD, PLAN, parts_of(rows, 0, 1, most), pixel_normalisation(), None)
        flats.append(state.gradients.flat)
    torch.testing.assert_close(flats[1], flats[0], rtol=1e-4, atol=1e-5 * float(flats[0].abs().max()))
    blocks = [len(group.blocks) for group in PLAN.share(0, 1, microbatch)]
    assert sum(blocks) == 4 and max(blocks) == max(1, min(4, microbatch // 4))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_comes_near_the_gradients_of_single(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows, precision: str, tolerance: float
) -> None:
    denoiser, flats = tiny_denoiser(), []
    for method in (METHOD, replace(METHOD, precision=precision)):
        state = state_of(denoiser, method)
        training_step(state, method, PLAN, parts_of(rows, 0, 1), pixel_normalisation(), None)
        flats.append(state.gradients.flat[: state.gradients.length])
        assert next(state.denoiser.parameters()).dtype == torch.float32
    assert 0 < float((flats[1] - flats[0]).norm() / flats[0].norm()) < tolerance


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows, tmp_path: Path
) -> None:
    method = replace(METHOD, precision="fp16")
    state = state_of(tiny_denoiser(), method)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = flat_weights(state).clone()
    training_step(state, method, PLAN, parts_of(rows, 0, 1), pixel_normalisation(), None)
    assert torch.equal(flat_weights(state), before)
    assert state.scaler.get_scale() == 2.0**39
    assert state.images_seen == 16  # the crops were seen all the same
    save_checkpoint(tmp_path, state)
    resumed = state_of(tiny_denoiser(), method)
    load_checkpoint(tmp_path, resumed)
    assert resumed.scaler.state_dict() == state.scaler.state_dict()


def test_dropout_is_the_same_for_any_number_of_workers(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows
) -> None:
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.5}
    denoiser = tiny_denoiser(network_options=options)
    method = METHOD
    one, two = (step_of(denoiser, rows, workers, method)[0].gradients for workers in (1, 2))
    gradient = one.flat[: one.length]
    assert float((gradient - two.flat[: two.length]).abs().max() / gradient.abs().max()) < 1e-5


def test_dropout_is_repeatable_for_any_state_of_the_global_generator(
    tiny_denoiser: Callable[..., Denoiser], rows: StoredRows
) -> None:
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.5}
    denoiser, flats = tiny_denoiser(network_options=options), []
    for method in (METHOD, METHOD, replace(METHOD, seed=8)):
        torch.rand(len(flats) + 1)
        flats.append(step_of(denoiser, rows, 1, method)[0].gradients.flat)
    assert torch.equal(flats[0], flats[1])
    assert not torch.allclose(flats[0], flats[2])


def test_one_bad_crop_does_not_end_a_run(tiny_denoiser: Callable[..., Denoiser], rows: StoredRows) -> None:
    state = state_of(tiny_denoiser())
    broken = StoredRows(rows.image.float(), rows.label)
    broken.image[5] = float("nan")
    training_step(state, METHOD, PLAN, parts_of(broken, 0, 1), pixel_normalisation(), None)
    assert flat_weights(state).isfinite().all()
    loss, crops = state.gradients.loss_and_crops[1].sum(0).tolist()
    assert crops == 15 and loss > 0  # and the record says so
