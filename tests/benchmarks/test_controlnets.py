"""The ControlNet benchmark: gains for timings whose gains are known."""

import pytest

from patchloom.benchmarks.controlnets import gain_findings
from patchloom.benchmarks.findings import TINY, Finding
from patchloom.benchmarks.interleaved import Timings
from patchloom.benchmarks.setups import step_settings

FLOPS = {16: 64, 8: 16, 4: 4}  # proportional to pixels
LIMIT = 1.9 / 0.7  # counted images per unit of cost: Eq. 5 with p = .5 and multipliers 2 and 4


def findings(*rounds: dict[int, float]) -> dict[str, Finding]:
    """Findings for rounds of seconds per crop, of which CPU time is half."""
    rates = {str(size): [1 / one[size] for one in rounds] for size in FLOPS}
    timings = Timings(rates, {size: [2 * rate for rate in values] for size, values in rates.items()})
    found = gain_findings(step_settings(TINY, 0.5), timings, FLOPS)
    return {f"{one.what} {one.unit}": one for one in found}


def test_seconds_that_follow_the_flops_gain_as_much() -> None:
    found = findings({size: 0.5 * flops for size, flops in FLOPS.items()})
    gain = found["p = 0.5 over p = 1 x per counted image"]
    assert gain.limit == pytest.approx(LIMIT) and gain.measured.median == pytest.approx(LIMIT)
    assert found["p = 0.5 over p = 1 x per update"].measured.median == pytest.approx(1 / 0.7)
    for name in ("measured gain over the gain by FLOPs x", "measured gain over the gain by FLOPs, CPU time x"):
        assert found[name].measured.median == pytest.approx(1)
    assert found["p = 1, seconds per counted image s"].measured.median == pytest.approx(32)
    assert found["p = 0.5, seconds per counted image s"].measured.median == pytest.approx(32 / LIMIT)
    assert found[f"full-size step of {TINY.batch} s"].measured.median == pytest.approx(32 * TINY.batch)


def test_crops_that_all_take_equally_long_gain_nothing() -> None:
    found = findings(dict.fromkeys(FLOPS, 1.0), {size: 1.0 * flops for size, flops in FLOPS.items()})
    share = found["measured gain over the gain by FLOPs x"]
    assert (share.measured.low, share.measured.high) == pytest.approx(
        (1 / LIMIT + (1 - 1 / LIMIT) / 4, 1 - (1 - 1 / LIMIT) / 4)
    )
    assert share.is_met is False and share.wanted == 0.8
