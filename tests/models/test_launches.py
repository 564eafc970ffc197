"""A training step and sampling dispatch the same operations for any batch, and read no number from the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchloom.models import random_words
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.denoiser import build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.generate import SAMPLERS, Sampling, generate
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

EARLIER = 2277  # operations at batch 8 when each block had generators of its own, and 3,858 at batch 256
SCALAR_READ = "aten._local_scalar_dense.default"
OF_SEEDS = "aten.randn.generator"  # on the CPU, one per image and draw of noise


class CountedOperations(TorchDispatchMode):
    """Counts the operations that are dispatched inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def operations(tiny_config: Callable[..., Any], batch: int, classes: int = 0, **changes: Any) -> Counter[str]:
    """The operations of one step: DDPM++ of width 16 with dropout, on blocks of 8."""
    options = {"width": 16, "width_multipliers": [1, 2], "blocks": 2, "attention": [16], "dropout": 0.1}
    denoiser = build_denoiser(tiny_config(network_options=options, classes=classes)).train()
    settings = StepSettings(
        seed=0, schedule=patch_schedule(16, 1.0), updates=10, batch_size=batch, block_size=8, lr=1e-3,
        lr_rampup_images=0, **changes,
    )  # fmt: skip
    state = new_state(denoiser, [HalfLifeEMA(denoiser, 1000)], settings, (0.9, 0.999), 1e-8)
    rows = StoredRows(torch.zeros(batch, 3, 16, 16, dtype=torch.uint8), torch.full((batch,), -1))
    plan = plan_step(settings, 0, 0)
    with CountedOperations() as counted:
        training_step(state, settings, plan, zip(plan.share(), [rows], strict=True), pixel_normalisation(), None)
    return counted.counts


@pytest.mark.parametrize("by_numpy", [True, False])  # the second as on a GPU, where every operation is a launch
def test_the_number_of_operations_does_not_depend_on_the_batch(
    tiny_config: Callable[..., Any], by_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_numpy:
        monkeypatch.setattr(random_words, "NUMPY_DEVICES", ())
    small, medium, large = (operations(tiny_config, batch) for batch in (8, 64, 512))
    assert small == medium == large
    assert small.total() <= 1.3 * EARLIER
    assert small[SCALAR_READ] == 0


@pytest.mark.parametrize("classes", [0, 5])
def test_labels_augmentation_and_mirroring_read_no_numbers_either(
    tiny_config: Callable[..., Any], classes: int
) -> None:
    options = {"augmentation": 0.12, "mirror": True, "label_dropout": 0.1}
    small, large = (operations(tiny_config, batch, classes=classes, **options) for batch in (8, 64))
    assert small == large
    assert small[SCALAR_READ] == 0


def sampling_operations(config: DenoiserConfig, batch: int, sampling: Sampling) -> Counter[str]:
    """The operations of one batch of samples."""
    normalisation = pixel_normalisation()
    card = ModelCard(denoiser=config, normalisation=normalisation)
    model = SamplingModel(build_denoiser(config).eval(), normalisation, None, card)
    with CountedOperations() as counted:
        generate(model, list(range(batch)), [number % 3 for number in range(batch)], sampling)
    return counted.counts


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_sampling_dispatches_the_same_operations_for_any_batch(tiny_config: Callable[..., Any], sampler: str) -> None:
    sampling = Sampling(sampler, 3, guidance=1.3, guidance_between=(0.01, 20.0))
    small, large = (sampling_operations(tiny_config(classes=3), batch, sampling) for batch in (2, 16))
    assert large.pop(OF_SEEDS) == 8 * small.pop(OF_SEEDS)
    assert small == large
    assert small[SCALAR_READ] <= 1 + 2 * sampling.network_evaluations  # of noise levels, which are on the CPU


def test_operations_of_sampling_grow_with_the_evaluations_of_the_network(tiny_config: Callable[..., Any]) -> None:
    totals = [sampling_operations(tiny_config(), 2, Sampling("heun", steps)).total() for steps in (2, 3, 4)]
    assert totals[2] - totals[1] == totals[1] - totals[0]
