"""Ranking: the settings of a search, best first, by the mean over their repeats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from pydantic import JsonValue

from patchloom.platform.recipe.search import BUDGET_SHARE
from patchloom.platform.records.search import TrialRow

HELD_OUT_LOSS = "held_out_loss"
IMAGES_KEY = "data.images"


@dataclass(frozen=True)
class RankedSetting:
    """A setting with its finished trials.

    `spread` is the standard deviation over repeats, None for a single trial. `is_whole` says that no repeat failed or
    was stopped.
    """

    settings: dict[str, JsonValue]
    trials: list[TrialRow]
    mean: float
    spread: float | None
    metric: str
    is_whole: bool = True

    @property
    def best(self) -> TrialRow:
        """The trial with the lowest metric."""
        return min(self.trials, key=lambda trial: float(trial[self.metric]))

    @property
    def by_seed(self) -> dict[int, float]:
        """The metric of each repeat, by its number. All settings have the same seed in the same repeat."""
        return {trial.repeat: float(trial[self.metric]) for trial in self.trials}

    @property
    def title(self) -> str:
        """`p 0.25, schedule stochastic`."""
        return setting_title(self.settings)

    def value(self) -> str:
        """`0.5123`, or `0.5123 ± 0.0040`."""
        return f"{self.mean:.4f}" + ("" if self.spread is None else f" ± {self.spread:.4f}")

    def value_of_n(self) -> str:
        """`0.5123 ± 0.0040 (n = 3)`."""
        return self.value() + ("" if self.spread is None else f" (n = {len(self.trials)})")


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean and the standard deviation, of which so many digits are shown: `0.1234 ± 0.0012`."""
    spread = stdev(values) if len(values) > 1 else 0.0
    if spread == 0:
        return f"{mean(values):.4g}" + (" ± 0" if len(values) > 1 else "")
    places = max(0, digits - 1 - math.floor(math.log10(spread) + 1e-9))
    return f"{mean(values):.{places}f} ± {spread:.{places}f}"


def mean_of(trials: Sequence[TrialRow], field: str) -> float | None:
    """The mean of a field of `TrialRow` over trials; None where a trial does not have it."""
    known = [value for trial in trials if (value := trial.value_of(field)) is not None]
    return mean(known) if known and len(known) == len(trials) else None


def of_budget(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """The trials that spend the budget of the search, without those of `equal_costs`."""
    return [trial for trial in trials if trial.equal is None]


def ranked(trials: Sequence[TrialRow], metric: str = HELD_OUT_LOSS) -> list[RankedSetting]:
    """Settings that have a finished trial, best first.

    A setting with a failed or stopped repeat comes after all settings whose trials finished.
    """
    groups: dict[str, list[TrialRow]] = {}
    for trial in sorted(trials, key=lambda trial: trial.name):
        groups.setdefault(repr(sorted(trial.settings.items())), []).append(trial)
    found = []
    for group in groups.values():
        finished = [trial for trial in group if trial.status == "finished"]
        if finished:
            found.append(_ranked_setting(finished, metric, is_whole=len(finished) == len(group)))
    return sorted(found, key=lambda setting: (not setting.is_whole, setting.mean))


def _ranked_setting(trials: list[TrialRow], metric: str, is_whole: bool) -> RankedSetting:
    values = [float(trial[metric]) for trial in trials]
    spread = stdev(values) if len(values) > 1 else None
    return RankedSetting(trials[0].settings, trials, mean(values), spread, metric, is_whole)


def tested_settings(order: Sequence[RankedSetting]) -> list[RankedSetting]:
    """The settings that a test can compare, best first: those that had the largest share of the budget, and of them
    those that are whole, if any is.
    """
    shares = [float(str(setting.settings.get(BUDGET_SHARE, 1))) for setting in order]
    longest = [setting for setting, share in zip(order, shares, strict=True) if share == max(shares)]
    return [setting for setting in longest if setting.is_whole] or longest


def setting_title(settings: dict[str, JsonValue]) -> str:
    """A setting by the last parts of its keys: `p 0.25, sizes 0.5/0.6/2 + 0.25/0.4/4`."""
    return ", ".join(f"{key.split('.')[-1]} {value_title(key, value)}" for key, value in settings.items())


def value_order(value: JsonValue) -> tuple[bool, float, str]:
    """How values of a key are sorted: numbers by size, then names."""
    is_number = is_number_value(value)
    return not is_number, float(str(value)) if is_number else 0.0, str(value)


def is_number_value(value: JsonValue) -> bool:
    """Whether a value is a number; `true` and `false` are names."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def value_title(key: str, value: JsonValue) -> str:
    """The value of a key in a few characters; `data.images: null` is all images."""
    return "all" if key == IMAGES_KEY and value is None else short_value(value)


def short_value(value: JsonValue) -> str:
    """A value in a few characters; a patch size is `fraction/weight/batch multiplier`."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " + ".join(map(short_value, value)) or "none"
    if isinstance(value, dict):
        return "/".join(map(short_value, value.values()))
    return str(value)
