"""Paired turns, and what is said of them."""

import time

import numpy as np
import pytest

from patchloom.benchmarks.findings import Finding, exactly, table
from patchloom.benchmarks.paired import Spread, in_turns


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_spread_is_numpys_median_and_quartiles(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    spread = Spread.of(values)
    assert [spread.low, spread.median, spread.high] == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_ways_take_turns_and_the_order_turns_round() -> None:
    called: list[str] = []

    def way(name: str, units: int) -> int:
        called.append(name)
        return units

    turns = in_turns({"a": lambda: way("a", 10), "b": lambda: way("b", 20)}, rounds=3, warm_up=1)
    assert "".join(called) in ("abba" * 2, "baab" * 2)
    assert {name: len(rates) for name, rates in turns.by_clock.items()} == {"a": 3, "b": 3}  # without the first
    ratio = turns.ratio("a", "b")
    inverse = turns.ratio("b", "a")
    assert ratio.median == pytest.approx(1 / inverse.median)


def test_rates_are_units_over_seconds() -> None:
    def work() -> int:
        time.sleep(0.05)
        return 7

    turns = in_turns({"sleep": work}, rounds=2)
    assert turns.rate("sleep").high <= 7 / 0.05  # a sleep may be longer, and is never shorter
    assert turns.seconds("sleep").median == pytest.approx(1 / turns.rate("sleep").median, rel=0.5)
    assert turns.by_core["sleep"][0] > turns.by_clock["sleep"][0]  # asleep, a core has nothing to do


@pytest.mark.parametrize(
    ("value", "wanted", "is_cost", "is_met"),
    [(1.1, 1.05, False, True), (1.0, 1.05, False, False), (2.0, 3.0, True, True), (4.0, 3.0, True, False),
     (1.0, None, False, None)],
)  # fmt: skip
def test_a_finding_knows_whether_it_is_as_wanted(
    value: float, wanted: float | None, is_cost: bool, is_met: bool | None
) -> None:
    found = Finding("something", exactly(value), "x", limit=3.0, limit_is="a reason", wanted=wanted, is_cost=is_cost)
    assert found.is_met is is_met and found.describe()["is_met"] is is_met
    words = table([found])
    assert "something" in words and "3.00 (a reason)" in words
    assert ("NOT MET" in words) == (is_met is False)
