"""Findings: what a benchmark says, each number with its spread, its limit and what was wanted of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from patchloom.benchmarks.paired import Spread

Say = Callable[[str], None]  # one line of progress


@dataclass(frozen=True)
class Scale:
    """How large the work is that is measured; `TINY` only shows that everything runs."""

    rounds: int = 5
    width: int = 32
    side: int = 64
    blocks: int = 4
    batch: int = 8
    images: int = 8_000
    seconds: float = 20.0  # of a command that is watched while it works


TINY = Scale(rounds=1, width=8, side=16, blocks=1, batch=8, images=48, seconds=0.2)


@dataclass(frozen=True)
class Finding:
    """One measured number.

    unit: "x" (a ratio), "images/s", "s", "%", "MiB", ... limit: the best that could be, and `limit_is` what
    sets it. wanted: what the project asks for, at least, or at most where the number `is_cost`.
    """

    what: str
    measured: Spread
    unit: str
    limit: float | None = None
    limit_is: str = ""
    wanted: float | None = None
    is_cost: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether it is as wanted; None where nothing was."""
        if self.wanted is None:
            return None
        return self.measured.median <= self.wanted if self.is_cost else self.measured.median >= self.wanted

    def describe(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        return asdict(self) | {"is_met": self.is_met}


def exactly(value: float) -> Spread:
    """A number without spread: counted, or measured once."""
    return Spread(value, value, value)


def table(findings: list[Finding]) -> str:
    """Lines for a terminal: what, how much, the middle half of the rounds, the limit, and what was wanted."""
    rows = [("", "median", "middle half", "limit", "wanted")]
    for found in findings:
        spread = found.measured
        middle = "" if spread.low == spread.high else f"{_number(spread.low)} to {_number(spread.high)}"
        limit = "" if found.limit is None else f"{_number(found.limit)} ({found.limit_is})"
        wanted = ""
        if found.wanted is not None:
            verdict = "met" if found.is_met else "NOT MET"
            wanted = f"{'at most' if found.is_cost else 'at least'} {_number(found.wanted)}: {verdict}"
        rows.append((found.what, f"{_number(spread.median)} {found.unit}", middle, limit, wanted))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def _number(value: float) -> str:
    """Three figures, however large."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
