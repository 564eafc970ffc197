"""Interleaved timings, and the table of findings."""

import time

import numpy as np
import pytest

from patchloom.benchmarks.findings import Finding, exact, findings_table
from patchloom.benchmarks.interleaved import Spread, interleave


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_spread_equals_median_and_quartiles_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    spread = Spread.of(values)
    assert [spread.low, spread.median, spread.high] == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_alternatives_run_in_alternating_order() -> None:
    called: list[str] = []

    def work(name: str, units: int) -> int:
        called.append(name)
        return units

    timings = interleave({"a": lambda: work("a", 10), "b": lambda: work("b", 20)}, rounds=3, warm_up=1)
    assert "".join(called) in ("abba" * 2, "baab" * 2)
    assert {name: len(rates) for name, rates in timings.wall_rates.items()} == {
        "a": 3,
        "b": 3,
    }  # without the warm-up round
    ratio = timings.ratio("a", "b")
    inverse = timings.ratio("b", "a")
    assert ratio.median == pytest.approx(1 / inverse.median)


def test_rates_are_units_per_second() -> None:
    def work() -> int:
        time.sleep(0.05)
        return 7

    timings = interleave({"sleep": work}, rounds=2)
    assert timings.rate("sleep").high <= 7 / 0.05  # a sleep may take longer, never less
    assert timings.seconds("sleep").median == pytest.approx(1 / timings.rate("sleep").median, rel=0.5)
    assert timings.cpu_rates["sleep"][0] > timings.wall_rates["sleep"][0]  # a sleep takes no CPU time


@pytest.mark.parametrize(
    ("value", "wanted", "is_cost", "is_met"),
    [(1.1, 1.05, False, True), (1.0, 1.05, False, False), (2.0, 3.0, True, True), (4.0, 3.0, True, False),
     (1.0, None, False, None)],
)  # fmt: skip
def test_a_finding_knows_whether_it_meets_its_target(
    value: float, wanted: float | None, is_cost: bool, is_met: bool | None
) -> None:
    found = Finding("something", exact(value), "x", limit=3.0, limit_is="a reason", wanted=wanted, is_cost=is_cost)
    assert found.is_met is is_met
    text = findings_table([found])
    assert "something" in text and "3.00 (a reason)" in text
    assert ("NOT MET" in text) == (is_met is False)
