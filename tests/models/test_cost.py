"""What patches save is arithmetic: limits in closed form, and the hours that follow for the paper's own runs."""

from typing import Any

import pytest

from patchloom.models.cost import estimated_gain, measured_seconds_of_crop
from patchloom.models.patches import patch_schedule
from patchloom.models.step import new_state
from patchloom.models.step_plan import StepSettings

AS_PIXELS = {64: 64.0**2, 32: 32.0**2, 16: 16.0**2}
HOURS_AT_1 = 48.5  # CelebA-64, 200 million images, 16 GPUs (Patch Diffusion, Table 1)


def step_settings(p: float, **changes: Any) -> StepSettings:
    values: dict[str, Any] = {"seed": 0, "schedule": patch_schedule(64, p), "updates": 10**6, "batch_size": 512}
    return StepSettings(**{**values, "block_size": 8, "lr": 1e-4, "lr_rampup_images": 0, **changes})


@pytest.mark.parametrize(("p", "hours"), [(0, 6.9), (0.1, 8.5), (0.25, 11.4), (0.5, 17.9), (0.75, 28.4), (1, 48.5)])
@pytest.mark.parametrize("draw", ["shared", "stratified"])
def test_cost_of_shared_draws_follows_the_pixels(p: float, hours: float, draw: str) -> None:
    gain = estimated_gain(step_settings(p, draw=draw), AS_PIXELS, workers=1)
    assert HOURS_AT_1 / gain.per_image == pytest.approx(hours, abs=0.06)


@pytest.mark.parametrize(("p", "hours"), [(0, 8.7), (0.1, 16.8), (0.25, 20.5), (0.5, 25.5), (0.75, 33.4), (1, 48.5)])
def test_sizes_that_each_rank_draws_make_all_wait_for_the_slowest(p: float, hours: float) -> None:
    method = step_settings(p, draw="independent", emulated_ranks=16)
    gain = estimated_gain(method, AS_PIXELS, workers=16)
    assert HOURS_AT_1 / gain.per_image == pytest.approx(hours, rel=0.02)  # of 4000 planned steps


def test_the_limits_at_p_one_half_are_2_72_by_image_and_1_43_by_update() -> None:
    gain = estimated_gain(step_settings(0.5), AS_PIXELS, workers=4)
    # a step of R/2 costs 2/4 of a full one, of R/4 4/16: .5 + .3 * .5 + .2 * .25 = .7 for 1.9 batches
    assert gain.per_update == pytest.approx(1 / 0.7)
    assert gain.per_image == pytest.approx(1.9 / 0.7)


def test_a_progressive_run_by_images_gains_as_its_shares_say() -> None:
    schedule = patch_schedule(64, 0.5, kind="progressive", shares_of="images")
    gain = estimated_gain(step_settings(0.5, schedule=schedule), AS_PIXELS, workers=1)
    assert gain.per_image == pytest.approx(1 / (0.5 + 0.3 / 4 + 0.2 / 16))


def test_the_seconds_of_a_crop_are_measured_for_every_size(tiny_denoiser: Any) -> None:
    method = step_settings(0.5, schedule=patch_schedule(16, 0.5), batch_size=16)
    state = new_state(tiny_denoiser().train(), [], method, (0.9, 0.999), 1e-8)
    seconds = measured_seconds_of_crop(state, method, workers=2)
    assert set(seconds) == {16, 8, 4}
    assert all(0 < value < 10 for value in seconds.values())
