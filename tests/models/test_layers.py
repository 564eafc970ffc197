"""Dropout masks belong to crops, and a compiled network has one graph per patch size and the same masks."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from scipy import stats

from patchloom.models.denoiser import Denoiser
from patchloom.models.layers import Dropout
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.random_draws import Draws
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step


@pytest.mark.parametrize("shape", [(6, 32, 16, 16), (6, 3, 5, 5)])  # the second fills no whole number of words
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_belong_to_crops_and_keep_the_mean(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    layer = Dropout(0.13).train()

    def dropped(x: torch.Tensor, blocks: range) -> torch.Tensor:
        layer.masks = Draws(0).masks(0, blocks, 2, torch.device("cpu"))
        return layer(x)

    x = torch.ones(shape).to(memory_format=layout)
    out = dropped(x, range(5, 8))
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(out, dropped(torch.ones(shape), range(5, 8)))  # in any layout
    assert torch.equal(out[2:4], dropped(x[2:4], range(6, 7)))  # whoever owns a block draws the same
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.87).item()}
    share = (out == 0).double().mean().item()
    assert abs(share - 0.13) < 5 * (0.13 * 0.87 / x.numel()) ** 0.5
    assert not torch.equal(out[:2] == 0, out[2:4] == 0)
    layer.number = 1
    assert not torch.equal(out == 0, dropped(x, range(5, 8)) == 0)


def test_neighbouring_masks_are_independent() -> None:
    layer = Dropout(0.5).train()
    layer.masks = Draws(0).masks(0, range(1), 1, torch.device("cpu"))
    kept = (layer(torch.ones(1, 1, 1, 80_000)) > 0).flatten().reshape(-1, 4)  # the four lanes of a word
    counts = (kept.long() * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_a_compiled_network_has_one_graph_per_patch_size(
    tiny_denoiser: Callable[..., Denoiser], dropout: float
) -> None:
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": dropout}
    method = StepSettings(
        seed=0, schedule=patch_schedule(16, 0.5), updates=30, batch_size=8, block_size=4, lr=1e-3, lr_rampup_images=0
    )  # fmt: skip
    gradients = []
    for compiled in (False, True):
        denoiser = tiny_denoiser(network_options=options).train()
        state = new_state(denoiser, [], method, (0.9, 0.999), 1e-3)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            denoiser.model.compile(dynamic=False, backend="aot_eager")
        generator = torch.Generator().manual_seed(0)
        for step in range(8):
            plan = plan_step(method, step, state.images_seen)
            images = torch.randint(0, 256, (plan.crops, 3, 16, 16), generator=generator, dtype=torch.uint8)
            rows = StoredRows(images, torch.full((plan.crops,), -1))
            training_step(state, method, plan, zip(plan.share(), [rows], strict=True), pixel_normalisation(), None)
        gradients.append(state.gradients.flat[: state.gradients.length].clone())
    sizes = {plan_step(method, step, 0).sizes[0].pixels for step in range(8)}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(sizes) == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))
