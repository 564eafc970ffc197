"""Condition images: they move with the image, the network uses them, and models without them are as before."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from patchloom.models.cards import ConditionCard, DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.conditions import depth_to_space, network_condition, space_to_depth
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.generate import Sampling, check_fit, generate, generate_padded
from patchloom.models.guidance import guided
from patchloom.models.loss import held_out_loss
from patchloom.models.memory import sampling_bytes, training_bytes
from patchloom.models.normalisation import identity_normalisation, pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.random_draws import CropBatch, Draws
from patchloom.models.replay import ReplayedNetwork
from patchloom.models.step import StoredRows, crop_losses, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.models.transfer import transfer

Build = Callable[..., Denoiser]
R = 16
CPU = torch.device("cpu")
CARD = ConditionCard(kind="images", channels=2, dtype="uint8", downscale=1, mean=(127.5,) * 2, scale=(1 / 127.5,) * 2)


def settings(**changes: Any) -> StepSettings:
    values = {"seed": 5, "schedule": patch_schedule(R, 0.5), "updates": 100, "batch_size": 16, "block_size": 8,
              "lr": 1e-2, "lr_rampup_images": 64}  # fmt: skip
    return StepSettings(**{**values, **changes})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws_of(step: int, size: int, channels: int, augmentation: float = 0.0) -> Any:
    return Draws(5).crops(CropBatch(step, range(2), 8, channels, R, size, False, CPU, augmentation))


class Told(nn.Module):
    """Takes the condition as its estimate, and keeps what it was given."""

    coordinates, classes, sigma_data = "linear", 3, 0.5

    def forward(
        self, noisy: Tensor, sigma: Tensor, where: Tensor, labels: Tensor, condition: Tensor, *, augmentation: Any
    ) -> Tensor:
        self.labels, self.condition = labels, condition
        return condition[:, :3]


@pytest.mark.parametrize("size", [16, 8, 4])
@pytest.mark.parametrize(("mirror", "augmentation"), [(False, 0.0), (True, 0.0), (True, 0.8)])
def test_the_crop_of_the_condition_is_that_of_the_image(size: int, mirror: bool, augmentation: float) -> None:
    chosen, told = settings(mirror=mirror, augmentation=augmentation), Told()
    for step in range(5):
        images = torch.randint(0, 256, (16, 3, R, R), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
        values = pixel_normalisation().normalise(images)
        further = noise(16, 1, R, R)
        rows = StoredRows(images, torch.zeros(16), condition=torch.cat([values, further], dim=1))
        draws = draws_of(step, size, 3, augmentation)
        losses, _ = crop_losses(told, rows, draws, size, chosen, pixel_normalisation())  # type: ignore[arg-type]
        assert told.condition.shape == (16, 4, size, size) and told.condition.abs().min(dim=3).values.max() > 0
        limit = 1e-8 if augmentation else 0.0  # rounding, where interpolation and normalisation change places
        assert losses.max() <= limit


def test_labels_and_conditions_are_dropped_together_at_equal_rates() -> None:
    told, images = Told(), torch.ones(16, 3, R, R)
    counts = {"both": 0, "label": 0, "condition": 0, "none": 0}
    for label_dropout, condition_dropout in ((0.3, 0.3), (0.3, 0.1), (0.0, 0.3)):
        chosen = settings(label_dropout=label_dropout, condition_dropout=condition_dropout)
        for step in range(40):
            rows, draws = StoredRows(images, torch.zeros(16), condition=images), draws_of(step, 8, 3)
            crop_losses(told, rows, draws, 8, chosen, identity_normalisation(3))  # type: ignore[arg-type]
            no_label, no_condition = told.labels.sum(1) == 0, told.condition.flatten(1).abs().sum(1) == 0
            assert torch.equal(no_label, draws.label_kept < label_dropout)
            assert torch.equal(no_condition, draws.label_kept < condition_dropout)
            if label_dropout == condition_dropout:
                counts["both"] += int((no_label & no_condition).sum())
                counts["none"] += int((~no_label & ~no_condition).sum())
    assert counts["both"] + counts["none"] == 40 * 16
    assert 0.25 < counts["both"] / (40 * 16) < 0.35


def test_a_network_learns_to_copy_its_condition(tiny_config: Callable[..., DenoiserConfig]) -> None:
    """Independent Gaussian pixels of the variance of the preconditioning: without help, no loss is below 1."""
    losses = {}
    for channels in (0, 3):
        torch.manual_seed(0)
        denoiser = build_denoiser(tiny_config(condition_channels=channels or None))
        chosen = settings(schedule=patch_schedule(R, 0.5))
        state = new_state(denoiser, [], chosen, (0.9, 0.99), 1e-8)
        for step in range(80):
            plan, work = plan_step(chosen, step, state.images_seen), []
            for group in plan.share():
                images = 0.5 * noise(len(group.crops), 3, R, R, seed=group.crops.start)
                condition = images / 0.5 if channels else None
                work.append((group, StoredRows(images, torch.zeros(len(images)), condition=condition)))
            training_step(state, chosen, plan, work, identity_normalisation(3), None)
        images = 0.5 * noise(32, 3, R, R, seed=-1)
        shown = images / 0.5 if channels else None
        losses[channels] = held_out_loss(denoiser.eval(), images, None, condition=shown)
    assert min(losses[0].values()) > 0.95
    assert max(losses[3][sigma] for sigma in (0.3, 1.0, 3.0)) < 0.5


@torch.no_grad()
def test_no_condition_is_zeros_and_others_change_the_estimate(tiny_denoiser: Build) -> None:
    denoiser, x = tiny_denoiser(condition_channels=2), noise(2, 3, R, R)
    zeros, shown = torch.zeros(2, 2, R, R), noise(2, 2, R, R, seed=1)
    assert torch.equal(denoiser(x, 0.5), denoiser(x, 0.5, condition=zeros))
    assert (denoiser(x, 0.5, condition=shown) - denoiser(x, 0.5)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2, 3, 16, 16"):
        denoiser(x, 0.5, condition=x)
    with pytest.raises(ValueError, match="no channels"):
        tiny_denoiser()(x, 0.5, condition=shown)


def test_condition_channels_only_widen_the_first_convolution(tiny_config: Callable[..., DenoiserConfig]) -> None:
    plain, wider = tiny_config(), tiny_config(condition_channels=2)
    more = parameter_count(build_denoiser(wider)) - parameter_count(build_denoiser(plain))
    assert more == 2 * 8 * 9
    assert training_flops(wider, R) - training_flops(plain, R) == 3 * 2 * (2 * 8 * 9) * R * R
    assert "condition_channels" not in plain.to_json() and DenoiserConfig.from_json(wider.to_json()) == wider


def test_memory_estimates_include_the_condition(tiny_config: Callable[..., DenoiserConfig]) -> None:
    plain, wider = tiny_config(), tiny_config(condition_channels=2)
    (group,) = plan_step(settings(schedule=patch_schedule(R, 1.0)), 0, 0).share()
    peaks = [training_bytes(config, settings(), group, "cpu", False) for config in (plain, wider)]
    assert peaks[1] - peaks[0] >= 16 * 2 * R * R * 4
    models = []
    for config in (plain, wider):
        with torch.device("meta"):
            denoiser = build_denoiser(config)
        card = ModelCard(denoiser=config, normalisation=pixel_normalisation())
        models.append(SamplingModel(denoiser, pixel_normalisation(), None, card))
    sampled = [sampling_bytes(model, Sampling(steps=2), 4, "cpu") for model in models]
    assert sampled[1] - sampled[0] >= 4 * 2 * R * R * 4


@torch.no_grad()
@pytest.mark.parametrize("in_one_batch", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_guidance_acts_against_the_estimate_without_label_and_condition(
    tiny_denoiser: Build, classes: int, in_one_batch: bool
) -> None:
    denoiser, x, shown = tiny_denoiser(condition_channels=2, classes=classes), noise(2, 3, R, R), noise(2, 2, R, R)
    labels, sigma = torch.eye(3)[:2] if classes else None, torch.tensor(0.7, dtype=torch.float64)
    full, nothing = denoiser(x, sigma, None, labels, shown), denoiser(x, sigma)
    for scale, wanted in ((1.0, full), (0.0, nothing), (1.5, nothing + 1.5 * (full - nothing))):
        found = guided(denoiser, labels, scale, condition=shown, in_one_batch=in_one_batch)(x, sigma)
        torch.testing.assert_close(found, wanted)


def conditioned_model(denoiser: Denoiser, card: ConditionCard | None = CARD, **changes: Any) -> SamplingModel:
    config = DenoiserConfig(
        network="song", network_options={}, resolution=R, channels=3, classes=denoiser.classes, coordinates="linear",
        condition_channels=denoiser.condition_channels, sigma_data=0.5,
    )  # fmt: skip
    model_card = ModelCard(denoiser=config, normalisation=pixel_normalisation(), condition=card, **changes)
    return SamplingModel(denoiser, pixel_normalisation(), None, model_card)


def test_a_sample_depends_on_its_own_condition_only(tiny_denoiser: Build) -> None:
    model = conditioned_model(tiny_denoiser(condition_channels=2))
    shown = torch.randint(0, 256, (5, 2, R, R), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sampling, seeds = Sampling(steps=2), [4, 4, 7, 8, 9]
    images = generate_padded(model, seeds, [-1] * 5, 4, sampling, condition=shown)
    assert not torch.equal(images[0], images[1])
    again = generate_padded(model, [9, 4], [-1] * 2, 4, sampling, condition=shown[[4, 1]])
    assert torch.equal(again, images[[4, 1]])
    recorded = replace(model, replayed=ReplayedNetwork(model.denoiser.requires_grad_(False), lambda work: work))
    assert torch.equal(generate_padded(recorded, seeds, [-1] * 5, 4, sampling, condition=shown), images)


def test_a_missing_or_wrong_condition_is_refused(tiny_denoiser: Build) -> None:
    model, plain = conditioned_model(tiny_denoiser(condition_channels=2)), conditioned_model(tiny_denoiser(), None)
    sampling, shown = Sampling(steps=2), torch.zeros(1, 2, R, R)
    with pytest.raises(ValueError, match="16x16"):
        generate(model, [0], [-1], sampling)
    with pytest.raises(ValueError, match=r"3 x 16 x 16.*2 x 16 x 16"):
        generate(model, [0], [-1], sampling, condition=torch.zeros(1, 3, R, R))
    with pytest.raises(ValueError, match="without conditions"):
        generate(plain, [0], [-1], sampling, condition=shown)


@pytest.mark.parametrize(
    ("names", "label_dropout", "condition_dropout", "fits"),
    [((), 0.0, 0.0, False), ((), 0.0, 0.1, True), (("a",), 0.1, 0.0, False), (("a",), 0.0, 0.1, False),
     (("a",), 0.1, 0.1, True)],
)  # fmt: skip
def test_guidance_needs_all_that_a_model_is_given_to_be_dropped_in_training(
    tiny_denoiser: Build, names: tuple[str, ...], label_dropout: float, condition_dropout: float, fits: bool
) -> None:
    denoiser = tiny_denoiser(condition_channels=2, classes=len(names))
    card = replace(CARD, dropout=condition_dropout)
    model = conditioned_model(denoiser, card, class_names=names, label_dropout=label_dropout)
    if fits:
        check_fit(Sampling(guidance=2.0), model.card)
    else:
        with pytest.raises(ValueError, match="guidance"):
            check_fit(Sampling(guidance=2.0), model.card)


@torch.no_grad()
@pytest.mark.parametrize("before", ["linear", "none"])
@pytest.mark.parametrize("network", ["song", "dhariwal"])
def test_weights_without_a_condition_start_a_network_that_does_not_use_it_yet(
    tiny_denoiser: Build, network: str, before: str
) -> None:
    source = tiny_denoiser(1, network=network, coordinates=before)
    target = tiny_denoiser(2, network=network, condition_channels=2)
    (left,) = transfer(target, source)
    assert "condition" in left
    x, shown = noise(2, 3, R, R), noise(2, 2, R, R)
    torch.testing.assert_close(target(x, 0.5, condition=shown), source(x, 0.5))
    with pytest.raises(ValueError, match="use the network of the source"):
        transfer(source, target)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_space_to_depth_is_that_of_torch_and_keeps_everything(factor: int) -> None:
    images = noise(3, 2, 8, 16)
    moved = space_to_depth(images, factor)
    assert torch.equal(moved, pixel_unshuffle(images, factor))
    assert torch.equal(depth_to_space(moved, factor), images)
    array = images.numpy().astype(np.float16)
    assert np.array_equal(space_to_depth(array, factor), pixel_unshuffle(torch.from_numpy(array), factor).numpy())
    assert np.array_equal(depth_to_space(space_to_depth(array, factor), factor), array)


def test_conditions_are_normalised_by_channel_before_and_after_they_are_unshuffled() -> None:
    card = ConditionCard(kind="images", channels=2, dtype="float32", downscale=2, mean=(1.0, -2.0), scale=(2.0, 0.5))
    images = noise(3, 2, 8, 8)
    wanted = (images - torch.tensor([1.0, -2.0])[:, None, None]) * torch.tensor([2.0, 0.5])[:, None, None]
    torch.testing.assert_close(network_condition(card, images), pixel_unshuffle(wanted, 2))
    assert ConditionCard.from_json(card.to_json()) == card
