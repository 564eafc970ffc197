"""Networks with their channels last train to the same weights, also across a checkpoint of the other layout."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import load_checkpoint, save_checkpoint
from patchloom.models.denoiser import Denoiser, build_denoiser, to_channels_last
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.layers import Convolution
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StoredRows, TrainingState, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SETTINGS = StepSettings(
    seed=5, schedule=patch_schedule(16, 0.5), updates=10, batch_size=8, block_size=4, lr=1e-2, lr_rampup_images=1
)


@pytest.fixture
def make_state(tiny_config: Callable[..., DenoiserConfig]) -> Callable[..., TrainingState]:
    def make(layout: torch.memory_format = torch.channels_last, network: str = "song") -> TrainingState:
        options = {"width": 32, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.1}
        torch.manual_seed(0)
        denoiser = build_denoiser(tiny_config(network=network, network_options=options)).train()
        if layout == torch.channels_last:
            to_channels_last(denoiser)
        # Adam's eps is large, so that gradients that are zero but for rounding stay small
        return new_state(denoiser, [HalfLifeEMA(denoiser, 50.0)], SETTINGS, (0.9, 0.999), 1e-3)

    return make


def rows(count: int, generator: torch.Generator) -> StoredRows:
    return StoredRows(torch.randint(0, 256, (count, 3, 16, 16), generator=generator), -torch.ones(count))


def train(state: TrainingState, steps: int) -> TrainingState:
    for _ in range(steps):
        plan = plan_step(SETTINGS, state.step, state.images_seen)
        generator = torch.Generator().manual_seed(state.step)
        work = [(group, rows(len(group.crops), generator)) for group in plan.share()]
        training_step(state, SETTINGS, plan, work, pixel_normalisation(), lambda _: None)
    return state


def tensors(state: TrainingState) -> Iterator[Tensor]:
    yield from (parameter.detach() for parameter in state.denoiser.parameters())
    yield from state.emas[0].module.parameters()


@pytest.mark.parametrize("network", ["song", "dhariwal"])
def test_weights_agree_to_rounding_and_gradients_stay_views(
    network: str, make_state: Callable[..., TrainingState]
) -> None:
    before, states = make_state(network=network), [make_state(layout, network) for layout in LAYOUTS]
    layouts: list[bool] = []
    for module in states[1].denoiser.modules():
        if isinstance(module, Convolution) and module.kernel == 3:
            module.register_forward_hook(
                lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    for state in states:
        train(state, 5)
    assert layouts and all(layouts)
    assert max(float((a - b).abs().max()) for a, b in zip(tensors(before), tensors(states[1]), strict=True)) > 1e-3
    for one, other in zip(*map(tensors, states), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    flat = states[1].gradients.flat
    for parameter in states[1].denoiser.parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
        assert parameter.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    weights = [parameter for parameter in states[1].denoiser.parameters() if parameter.ndim == 4]
    assert any(not weight.is_contiguous() for weight in weights)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("later", LAYOUTS, ids=str)
def test_a_checkpoint_continues_in_either_layout(
    later: torch.memory_format, make_state: Callable[..., TrainingState], tmp_path: Path
) -> None:
    whole = train(make_state(), 2)
    save_checkpoint(tmp_path, whole)
    train(whole, 3)
    resumed = make_state(later)
    load_checkpoint(tmp_path, resumed)
    train(resumed, 3)
    for one, other in zip(tensors(whole), tensors(resumed), strict=True):
        if later == torch.channels_last:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_a_network_of_another_package_keeps_its_layout() -> None:
    network = torch.nn.Conv2d(5, 3, 3)
    to_channels_last(Denoiser(network, channels=3, resolution=16))
    assert network.weight.is_contiguous()
