"""Decisions: whether the seeds of a search decide which of its settings is the best one.

A setting is called the best one if it is ahead of each other setting by what a t test at 5 % asks of a single pair.
That needs no correction for the number of settings: if all of them are equal, the best one of many is less far ahead of
the second than the better one of two, so two equal settings are the worst case (Gutmann and Maymin 1987).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

FALSE_WINNERS = 0.05  # of searches whose settings are all equal
MOST_SEEDS = 1000


@dataclass(frozen=True)
class ComparedSettings:
    """The values of each setting of a search, smaller is better, and the error of their differences.

    If all settings have the same seeds, what a seed adds to all of them is taken out (a two-way layout); otherwise
    all values of a setting differ by chance (a one-way layout). The error is pooled over the settings.

    Args:
        values: the values of each setting by seed; each setting has at least one.
    """

    values: Sequence[dict[int, float]]

    @property
    def shares_seeds(self) -> bool:
        """Whether all settings have the same seeds, at least two."""
        seeds = set(self.values[0])
        return len(seeds) > 1 and all(set(one) == seeds for one in self.values)

    @property
    def degrees_of_freedom(self) -> int:
        """Of the pooled error."""
        settings, count = len(self.values), sum(map(len, self.values))
        return (settings - 1) * (len(self.values[0]) - 1) if self.shares_seeds else count - settings

    @cached_property
    def means(self) -> np.ndarray:
        """(k,) the mean of each setting."""
        return np.array([np.mean(list(one.values())) for one in self.values])

    @cached_property
    def error(self) -> float | None:
        """The pooled standard deviation of a value around its setting and seed; None without two seeds of a setting."""
        if self.degrees_of_freedom == 0:
            return None
        residuals = [np.array([one[seed] for seed in sorted(one)]) - np.mean(list(one.values())) for one in self.values]
        if self.shares_seeds:
            residuals = list(np.array(residuals) - np.mean(residuals, axis=0))
        return math.sqrt(sum(float((part**2).sum()) for part in residuals) / self.degrees_of_freedom)

    def decisive_difference(self, one: int, other: int) -> float | None:
        """The least difference of two settings that decides between them; None without an error."""
        if self.error is None:
            return None
        counts = len(self.values[one]), len(self.values[other])
        spread = math.sqrt(sum(1 / count for count in counts))
        return t_quantile(self.degrees_of_freedom) * self.error * spread

    @property
    def winner(self) -> int | None:
        """The setting that is ahead of each other by more than the decisive difference; None if there is none."""
        best, *rest = sorted(range(len(self.values)), key=lambda setting: float(self.means[setting]))
        for other in rest:
            needed = self.decisive_difference(best, other)
            if needed is None or self.means[other] - self.means[best] <= needed:
                return None
        return best if rest else None

    def rival(self, best: int) -> int:
        """The setting that is the least clearly behind: with the smallest lead over it in decisive differences."""

        def lead(other: int) -> float:
            return float(self.means[other] - self.means[best]) / (self.decisive_difference(best, other) or 1.0)

        return min((other for other in range(len(self.values)) if other != best), key=lead)

    def seeds_to_decide(self, one: int, other: int) -> int | None:
        """How many seeds of each setting would decide between two of them, if their difference and the error stay.

        None if the error is not known, or if it takes more than `MOST_SEEDS`.
        """
        gap = abs(float(self.means[one] - self.means[other]))
        if self.error is None or gap == 0:
            return None
        settings = len(self.values)
        for seeds in range(2, MOST_SEEDS + 1):
            freedom = (settings - 1 if self.shares_seeds else settings) * (seeds - 1)
            if t_quantile(freedom) * self.error * math.sqrt(2 / seeds) < gap:
                return seeds
        return None


@lru_cache(maxsize=4096)
def t_quantile(degrees_of_freedom: int) -> float:
    """What the size of Student's t exceeds in `FALSE_WINNERS` of cases."""
    from scipy.stats import t

    return float(t.ppf(1 - FALSE_WINNERS / 2, degrees_of_freedom))
