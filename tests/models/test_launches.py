"""A training step dispatches the same operations for any batch, and reads no number from the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchloom.models import random_words
from patchloom.models.denoiser import build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

EARLIER = 2277  # operations at batch 8 when each block had generators of its own, and 3,858 at batch 256
SCALAR_READ = "aten._local_scalar_dense.default"


class CountedOperations(TorchDispatchMode):
    """Counts the operations that are dispatched inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def operations(tiny_config: Callable[..., Any], batch: int, **changes: Any) -> Counter[str]:
    """The operations of one step: DDPM++ of width 16 with dropout, on blocks of 8."""
    options = {"width": 16, "width_multipliers": [1, 2], "blocks": 2, "attention": [16], "dropout": 0.1}
    denoiser = build_denoiser(tiny_config(network_options=options)).train()
    settings = StepSettings(
        seed=0, schedule=patch_schedule(16, 1.0), updates=10, batch_size=batch, block_size=8, lr=1e-3,
        lr_rampup_images=0, **changes,
    )  # fmt: skip
    state = new_state(denoiser, [HalfLifeEMA(denoiser, 1000)], settings, (0.9, 0.999), 1e-8)
    rows = StoredRows(torch.zeros(batch, 3, 16, 16, dtype=torch.uint8), torch.full((batch,), -1))
    plan = plan_step(settings, 0, 0)
    with CountedOperations() as counted:
        training_step(state, settings, plan, zip(plan.share(), [rows], strict=True), pixel_normalisation(), lambda _: 0)
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


def test_augmentation_and_mirroring_read_no_numbers_either(tiny_config: Callable[..., Any]) -> None:
    small, large = (operations(tiny_config, batch, augmentation=0.12, mirror=True) for batch in (8, 64))
    assert small == large
    assert small[SCALAR_READ] == 0
