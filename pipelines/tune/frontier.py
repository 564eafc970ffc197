"""Frontier: what the trials of a search say: quality against cost, settings at equal cost, which key mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from patchloom.pipelines.tune.ranking import Ranked, ranked
from patchloom.platform.records.run import ProgressLine, read_progress

HELD_OUT, BY_SIGMA = "held_out_loss", "held_out_loss_by_sigma"
COSTS = {"flops": "FLOPs", "updates": "updates", "images_seen": "counted images"}
P, SCHEDULE = "patches.p", "patches.schedule"
# Patch Diffusion, Figure 2: FID on CelebA-64x64 by p, each after the same counted images
PAPER_FID = {0.0: 14.51, 0.1: 3.05, 0.25: 2.10, 0.5: 1.77, 0.75: 1.65, 1.0: 1.66}
CLEARLY = 2.0  # standard errors of a difference

Row = dict[str, Any]
Curve = list[ProgressLine]  # the progress lines of a trial that hold a held-out loss


@dataclass(frozen=True)
class Equal:
    """Settings compared where each trial had spent the same: `cost` of what `by` names."""

    by: str
    cost: float
    order: list[Ranked]  # by the held-out loss there, best first; trials hold the losses by sigma too

    def by_sigma(self, setting: Ranked) -> dict[str, list[float]]:
        """A setting's losses at each noise level, one a repeat."""
        sigmas = setting.trials[0][BY_SIGMA]
        return {sigma: [trial[BY_SIGMA][sigma] for trial in setting.trials] for sigma in sigmas}


def curve_of(folder: Path, trial: Row) -> Curve:
    """The measured points of a trial."""
    return [line for line in read_progress(folder / "trials" / trial["name"]) if line.held_out_loss is not None]


def at_equal(trials: Sequence[Row], curves: dict[str, Curve], by: str) -> Equal | None:
    """Finished trials at the largest cost that all of them reached; None where one was first measured after it."""
    finished = [trial for trial in trials if trial["status"] == "finished" and curves[trial["name"]]]
    if not finished:
        return None
    cost = min(curves[trial["name"]][-1][by] for trial in finished)
    if any(curves[trial["name"]][0][by] > cost for trial in finished):
        return None
    there = [trial | _between(curves[trial["name"]], by, cost) for trial in finished]
    return Equal(by, cost, ranked(there, HELD_OUT))


def _between(curve: Curve, by: str, cost: float) -> dict[str, Any]:
    """The losses at a cost, by a straight line between the logarithms of their neighbours."""
    costs = [float(line[by]) for line in curve]

    def at(losses: list[float]) -> float:
        return float(np.exp(np.interp(cost, costs, np.log(losses))))

    sigmas = curve[-1][BY_SIGMA]
    return {
        HELD_OUT: at([line[HELD_OUT] for line in curve]),
        BY_SIGMA: {sigma: at([line[BY_SIGMA][sigma] for line in curve]) for sigma in sigmas},
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, loss) points no other one beats in both, from the cheapest on."""
    best, front = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for ties; None of fewer than 3 pairs, or where one side is all the same."""
    import pandas as pd

    ranks = [pd.Series(values, dtype=float).rank().to_numpy() for values in (one, other)]
    if len(one) < 3 or min(np.ptp(side) for side in ranks) == 0:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def importance(trials: Sequence[Row], keys: Sequence[str], metric: str) -> dict[str, float]:
    """The share of the metric's variance over finished trials that each key alone accounts for, largest first.

    Of a key with few values, that between their means (eta squared); of a drawn number, that of a line through the
    ranks. Keys that did not vary are left out.
    """
    shares = {}
    for key in keys:
        having = [trial for trial in trials if trial["status"] == "finished" and key in trial["settings"]]
        values = [trial["settings"][key] for trial in having]
        losses = np.array([float(trial[metric]) for trial in having])
        groups = {repr(value): [index for index, other in enumerate(values) if other == value] for value in values}
        if len(groups) < 2 or np.ptp(losses) == 0:
            continue
        if len(groups) > len(having) / 2 and all(isinstance(value, (int, float)) for value in values):
            found = rank_correlation(values, losses.tolist())
            if found is not None:
                shares[key] = found**2
            continue
        between = sum(len(rows) * (losses[rows].mean() - losses.mean()) ** 2 for rows in groups.values())
        shares[key] = float(between / ((losses - losses.mean()) ** 2).sum())
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def proxy_correlations(trials: Sequence[Row], curves: dict[str, Curve], expensive: str) -> list[tuple[str, float, int]]:
    """How well the held-out loss, at parts of the budget and at the end, foretells the order of an expensive metric.

    Returns (where, Spearman's rank correlation, trials) of each.
    """
    having = [trial for trial in trials if trial["status"] == "finished" and expensive in trial]
    found = []
    for part in (0.25, 0.5, 0.75, 1.0):
        there = []
        for trial in having:
            curve = curves[trial["name"]]
            reached = part * curve[-1]["images_seen"]
            if curve[0]["images_seen"] <= reached:
                there.append((_between(curve, "images_seen", reached)[HELD_OUT], float(trial[expensive])))
        correlation = rank_correlation(*zip(*there, strict=True)) if len(there) == len(having) > 2 else None
        if correlation is not None:
            found.append((f"{part:.0%} of the budget", correlation, len(there)))
    return found


def recommendation(order: Sequence[Ranked], budget: str) -> str:
    """What to take, in a sentence with its evidence: how many seeds, at what budget, how far ahead of the next."""
    best = order[0]
    words = f"Take {best.words()}: {metric_words(best.metric)} {best.value_of_n()} at {budget} a trial"
    if len(order) == 1:
        return f"{words}; no other setting finished."
    second = order[1]
    gap = second.mean - best.mean
    words += f", {gap:.4f} ahead of {second.words()}"
    error = _error_of_difference(best, second)
    if error is None:
        return f"{words}. One seed each: luck is not excluded; repeat the first few with `repeats`."
    if gap > CLEARLY * error:
        return f"{words}, {gap / error:.1f} standard errors over {len(best.trials)} seeds."
    return f"{words}, which {len(best.trials)} seeds do not tell apart (standard error of the difference {error:.4f})."


def _error_of_difference(one: Ranked, other: Ranked) -> float | None:
    if one.spread is None or other.spread is None:
        return None
    return math.sqrt(one.spread**2 / len(one.trials) + other.spread**2 / len(other.trials))


def metric_words(metric: str) -> str:
    """`held-out loss`."""
    return {HELD_OUT: "held-out loss", "final_distance": "final Fréchet distance",
            "preview_frechet_distance": "Fréchet distance of previews"}[metric]  # fmt: skip


def stochastic_by_p(equal: Equal) -> dict[float, Ranked]:
    """The settings that differ in p alone, as the paper's did; empty where others vary too."""
    found: dict[float, Ranked] = {}
    for setting in equal.order:
        others = {key: value for key, value in setting.settings.items() if key not in (P, SCHEDULE)}
        if P in setting.settings and setting.settings.get(SCHEDULE, "stochastic") == "stochastic" and not others:
            found[float(setting.settings[P])] = setting
    return dict(sorted(found.items()))


def beside_the_paper(equal: Equal) -> str:
    """Whether the order of p at equal counted images is the paper's, in a sentence; empty where it cannot be told."""
    here = stochastic_by_p(equal)
    shared = [p for p in here if p in PAPER_FID]
    correlation = rank_correlation([here[p].mean for p in shared], [PAPER_FID[p] for p in shared])
    if correlation is None:
        return ""
    best = min(here, key=lambda p: here[p].mean)
    agrees = "agrees with" if correlation > 0.5 else "does not agree with"
    fids = ", ".join(f"{PAPER_FID[p]:g} at p = {p:g}" for p in shared)
    return (
        f"At equal counted images p = {best:g} is best here, and the order of p {agrees} the paper's (rank correlation "
        f"{correlation:.2f} over {len(shared)} values of p; its Figure 2 has FID {fids}, after 200 million counted "
        "images). Held-out losses after so short a training and FID after a long one need not rank alike."
    )


def mean_over(setting: Ranked, key: str) -> float:
    """The mean of a number over a setting's repeats."""
    return mean(float(trial[key]) for trial in setting.trials)
