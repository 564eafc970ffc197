"""Findings: the numbers of a benchmark, each with its spread, its limit and its target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchloom.benchmarks.interleaved import Spread

Say = Callable[[str], None]  # shows one line of progress
EXTRAPOLATED = " (extrapolated)"  # the end of the name of a number that was calculated from others


@dataclass(frozen=True)
class Scale:
    """The sizes of the measured work. `TINY` only checks that everything runs."""

    rounds: int = 5
    width: int = 32
    side: int = 64
    blocks: int = 4
    batch: int = 8
    images: int = 8_000
    seconds: float = 20.0  # how long a command runs while it is measured


TINY = Scale(rounds=1, width=8, side=16, blocks=1, batch=8, images=48, seconds=0.2)


@dataclass(frozen=True)
class Finding:
    """One measured number. The fields are the keys of the result file.

    Args:
        what: name of the number.
        measured: median and quartiles.
        unit: "x" (a ratio), "images/s", "s", "%", "MiB", ...
        limit: the best possible value, or None.
        limit_is: what sets the limit.
        wanted: the target: at least this, or at most this where `is_cost`.
        is_cost: whether less is better.
        rows: the rows of the dataset for which it was measured, or None.
    """

    what: str
    measured: Spread
    unit: str
    limit: float | None = None
    limit_is: str = ""
    wanted: float | None = None
    is_cost: bool = False
    rows: int | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the number meets its target; None without a target."""
        if self.wanted is None:
            return None
        return self.measured.median <= self.wanted if self.is_cost else self.measured.median >= self.wanted


def exact(value: float) -> Spread:
    """A number without spread: counted, or measured once."""
    return Spread(value, value, value)


def findings_table(findings: Sequence[Finding]) -> str:
    """Lines for a terminal: name, median, middle half of the rounds, limit and target."""
    rows = [("", "median", "middle half", "limit", "target"), *map(_table_row, findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def _table_row(found: Finding) -> tuple[str, str, str, str, str]:
    spread = found.measured
    middle = "" if spread.low == spread.high else f"{_three_digits(spread.low)} to {_three_digits(spread.high)}"
    limit = "" if found.limit is None else f"{_three_digits(found.limit)} ({found.limit_is})"
    target = ""
    if found.wanted is not None:
        verdict = "met" if found.is_met else "NOT MET"
        target = f"{'at most' if found.is_cost else 'at least'} {_three_digits(found.wanted)}: {verdict}"
    what = found.what if found.rows is None else f"{found.what}, {found.rows:,} rows"
    return what, f"{_three_digits(spread.median)} {found.unit}", middle, limit, target


def _three_digits(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
