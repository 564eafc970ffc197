"""Request limits: their bounds, the environment that sets them, and a deadline that samplers keep."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import environment

from patchloom.errors import UserError
from patchloom.models.generate import Sampling
from patchloom.pipelines.sample.request_limits import (
    Deadline,
    RequestLimits,
    RequestTooSlow,
    limits_of_environment,
)
from patchloom.pipelines.sample.sampler import load_model_for_sampling, sample_classes


@pytest.mark.parametrize(
    ("images", "batch", "options", "named"),
    [
        (5, 8, {}, "max_images"),
        (4, 8, {"steps": 21}, "max_steps"),
        (4, 8, {"guidance": 3.5}, "max_guidance"),
        (4, 8, {"guidance": -3.5}, "max_guidance"),
        (4, 8, {"size": (40, 8)}, "max_side"),
        (1, 1_000_000, {}, "max_batch"),
        (4, 16, {"size": (32, 32)}, "max_batch_pixels"),
    ],
)
def test_request_beyond_a_bound_is_refused(images: int, batch: int, options: Any, named: str) -> None:
    limits = RequestLimits(
        max_images=4, max_side=32, max_steps=20, max_guidance=3, max_batch=64, max_batch_pixels=8 * 1024
    )
    limits.check(4, Sampling(steps=20, guidance=3, size=(32, 32)), 8, 16)
    with pytest.raises(ValueError, match=rf"\({named}\)"):
        limits.check(images, Sampling(**options), batch, 16)


def test_environment_sets_bounds_that_are_not_given() -> None:
    from patchloom.pipelines.serve.requests import ServerLimits

    with environment(PATCHLOOM_MAX_STEPS="7", PATCHLOOM_MAX_BODY_BYTES="99", PATCHLOOM_MAX_IMAGES=""):
        assert limits_of_environment().max_steps == ServerLimits().max_steps == 7
        assert ServerLimits(max_steps=9).max_steps == 9 and ServerLimits().max_body_bytes == 99
        assert RequestLimits().max_images == 1000 and ServerLimits().max_images == 16
    for value in ("many", "0", "-1"):
        with environment(PATCHLOOM_MAX_STEPS=value), pytest.raises(UserError, match=f"PATCHLOOM_MAX_STEPS={value}"):
            limits_of_environment()


def test_deadline_is_checked_before_each_evaluation(trained: Path) -> None:
    model, calls = load_model_for_sampling(trained / "model"), list[int]()
    sampling = Sampling(steps=6, sampler="euler")

    def sample(check: Any) -> Any:
        return sample_classes(model, [0], [0], sampling, 1, check)

    assert (sample(lambda: calls.append(1)) == sample(None)).all() and len(calls) == 6
    with pytest.raises(RequestTooSlow, match=r"5 seconds \(request_timeout_s\)"):
        sample(Deadline(time.monotonic() - 1, 5).check)
    began = time.monotonic()
    slow = replace(sampling, steps=100_000)
    with pytest.raises(RequestTooSlow):
        sample_classes(model, [0], [0], slow, 1, Deadline(time.monotonic() + 1, 1).check)
    assert time.monotonic() - began < 10
