"""Ranking: the settings of a search, best first, by the mean over their repeats."""

from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

SEARCH_FORMAT = 2
SEARCH_FILE, TRIALS_FILE = "search.json", "trials.jsonl"  # of a search's folder: what it is, and its table


@dataclass(frozen=True)
class Ranked:
    """One setting with its finished trials; the spread is the standard deviation over repeats, None of one alone."""

    settings: dict[str, Any]
    trials: list[dict[str, Any]]
    mean: float
    spread: float | None
    metric: str

    @property
    def best(self) -> dict[str, Any]:
        """The trial of the lowest metric among its repeats."""
        return min(self.trials, key=lambda trial: float(trial[self.metric]))

    def words(self) -> str:
        """`p 0.25, schedule stochastic`."""
        return setting_words(self.settings)

    def value(self) -> str:
        """`0.5123`, or `0.5123 ± 0.0040`."""
        return f"{self.mean:.4f}" + ("" if self.spread is None else f" ± {self.spread:.4f}")

    def value_of_n(self) -> str:
        """`0.5123 ± 0.0040 (n = 3)`."""
        return self.value() + ("" if self.spread is None else f" (n = {len(self.trials)})")


def ranked(trials: list[dict[str, Any]], metric: str = "held_out_loss") -> list[Ranked]:
    """Settings that have a finished trial, best first; those of which a repeat failed come after all others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda trial: str(trial["name"])):
        groups.setdefault(repr(sorted(trial["settings"].items())), []).append(trial)
    found, whole = [], {}
    for name, group in groups.items():
        losses = [float(trial[metric]) for trial in group if trial["status"] == "finished"]
        if losses:
            good = [trial for trial in group if trial["status"] == "finished"]
            spread = stdev(losses) if len(losses) > 1 else None
            found.append(Ranked(good[0]["settings"], good, mean(losses), spread, metric))
            whole[name] = len(good) == len(group)
    names = [name for name in groups if name in whole]
    order = sorted(range(len(found)), key=lambda number: (not whole[names[number]], found[number].mean))
    return [found[number] for number in order]


def setting_words(settings: dict[str, Any]) -> str:
    """A setting by the last parts of its keys: `p 0.25, sizes 0.5/0.6/2 + 0.25/0.4/4`."""
    return ", ".join(f"{key.split('.')[-1]} {value_words(value)}" for key, value in settings.items())


def value_words(value: Any) -> str:
    """A value in few letters; of patch sizes, fraction, weight and batch multiplier."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " + ".join(map(value_words, value)) or "none"
    if isinstance(value, dict):
        return "/".join(map(value_words, value.values()))
    return str(value)
