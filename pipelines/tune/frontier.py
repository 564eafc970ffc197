"""Frontier: quality against cost, settings at equal cost, and which key matters."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from patchloom.pipelines.tune.decisions import MOST_SEEDS, ComparedSettings
from patchloom.pipelines.tune.ranking import HELD_OUT_LOSS, RankedSetting, mean_of, of_budget, ranked, tested_settings
from patchloom.platform.recipe.search import SCHEDULE_KEY
from patchloom.platform.records.run import ProgressLine, read_progress
from patchloom.platform.records.search import TrialRow

FINAL_DISTANCE, PREVIEW_DISTANCE = "final_distance", "preview_frechet_distance"
METRIC_TITLES = {
    HELD_OUT_LOSS: "held-out loss",
    FINAL_DISTANCE: "final Fréchet distance",
    PREVIEW_DISTANCE: "Fréchet distance of previews",
}
COST_TITLES = {"flops": "FLOPs", "updates": "updates", "images_seen": "counted images"}
P_KEY = "patches.p"
# Patch Diffusion, Figure 2: FID on CelebA-64x64 by p, each after the same counted images
PAPER_FID = {0.0: 14.51, 0.1: 3.05, 0.25: 2.10, 0.5: 1.77, 0.75: 1.65, 1.0: 1.66}
AGREEMENT_BY_CHANCE = 0.05  # of random orders may agree as well as one that is said to agree
PERMUTATIONS = 2000  # of the metric over trials, for the share that a key without effect explains
FALSE_EFFECTS = 0.05  # of searches without effects in which some key seems to have one
EQUAL_WITHIN = 0.05  # trials whose costs differ by more are not compared
MIN_PAIRS = 3  # of a rank correlation
BUDGET_SHARES = (0.25, 0.5, 0.75, 1.0)

LossCurve = list[ProgressLine]  # the progress lines of a trial that have a held-out loss


@dataclass(frozen=True)
class EqualCostComparison:
    """Settings compared by trials that ended at the same cost, with ramps and averages of that length.

    `by` is the unit of the cost, a key of `COST_TITLES`. `order` ranks the held-out losses, best first. `deviation` is
    the largest difference of a trial from the cost, as a share of it.
    """

    by: str
    cost: float
    order: list[RankedSetting]
    deviation: float

    def by_sigma(self, setting: RankedSetting) -> dict[str, list[float]]:
        """The losses of a setting at each noise level, one per repeat."""
        sigmas = setting.trials[0].held_out_loss_by_sigma
        return {sigma: [trial.held_out_loss_by_sigma[sigma] for trial in setting.trials] for sigma in sigmas}


def held_out_curve(folder: Path, trial: TrialRow) -> LossCurve:
    """The measured points of a trial."""
    return [line for line in read_progress(folder / "trials" / trial.name) if line.held_out_loss is not None]


def compare_at_equal_cost(trials: Sequence[TrialRow], by: str) -> EqualCostComparison | None:
    """The settings at the cost of the cheapest one, by finished trials that ended there.

    Returns None where a repeat of a setting has no trial that ended within `EQUAL_WITHIN` of it: the loss of a longer
    trial on its way is that of an unfinished ramp, and of averages that are too long.
    """
    finished = [trial for trial in trials if trial.status == "finished" and trial.held_out_loss is not None]
    spending = ranked(of_budget(finished), HELD_OUT_LOSS)
    costs = [mean_of(setting.trials, by) for setting in spending]
    if len(costs) < 2 or not all(costs):
        return None
    cost = min(filter(None, costs))
    chosen, deviation = [], 0.0
    for trial in of_budget(finished):
        same = [one for one in finished if (one.settings, one.repeat) == (trial.settings, trial.repeat)]
        nearest = min(same, key=lambda one: abs(float(one[by]) - cost))
        deviation = max(deviation, abs(float(nearest[by]) / cost - 1))
        chosen.append(nearest.model_copy(update={"equal": None}))
    return EqualCostComparison(by, cost, ranked(chosen), deviation) if deviation <= EQUAL_WITHIN else None


def _loss_at(curve: LossCurve, images: float) -> float:
    """The loss after so many counted images, on a straight line between the logarithms of its neighbours."""
    losses = np.log([line[HELD_OUT_LOSS] for line in curve])
    return float(np.exp(np.interp(images, [line.images_seen for line in curve], losses)))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The (cost, loss) points that no other point beats in both, cheapest first."""
    best, front = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than 3 pairs, or where all values of one side are equal."""
    from scipy.stats import spearmanr

    if len(one) < MIN_PAIRS or min(np.ptp(one), np.ptp(other)) == 0:
        return None
    return float(spearmanr(one, other).statistic)


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(n,) from 1; equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    ranks: np.ndarray = rankdata(values)
    return ranks


def order_by_chance(one: Sequence[float], other: Sequence[float]) -> float:
    """The share of all orders of one side whose rank correlation is at least that of the given order, exactly.

    Args:
        one: at most 8 values.
        other: as many values.
    """
    ranks, others = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    sums = np.array(list(permutations(ranks))) @ others
    return float((sums >= ranks @ others - 1e-9).mean())


@dataclass(frozen=True)
class KeyEffect:
    """How much of a metric's variance over trials a key explains, and how much it would explain by chance.

    Args:
        key: the key.
        share: for a key with few values, omega squared, an estimate without bias that may be negative; for a drawn
            number, the squared rank correlation.
        by_chance: what any key exceeds in 5 % of searches whose keys have no effect: a quantile over permutations.
    """

    key: str
    share: float
    by_chance: float

    @property
    def is_seen(self) -> bool:
        """Whether the trials show an effect."""
        return self.share > self.by_chance


def key_effects(
    trials: Sequence[TrialRow], keys: Sequence[str], metric: str, are_drawn: bool = False
) -> list[KeyEffect]:
    """The effect of each key on a metric over finished trials, largest first. Keys that did not vary are skipped.

    Args:
        trials: the trials.
        keys: the keys.
        metric: the metric.
        are_drawn: whether numbers were drawn. Then every setting has its own values of all keys, and its repeats are
            one observation. In a grid, repeats are observations of their own.
    """
    finished = [trial for trial in trials if trial.status == "finished"]
    varied = [
        key for key in keys if len({repr(trial.settings[key]) for trial in finished if key in trial.settings}) > 1
    ]
    observations = [[trial] for trial in finished]
    if are_drawn:
        observations = [setting.trials for setting in ranked(finished, metric)]
    found = []
    for key in varied:
        with_key = [group for group in observations if key in group[0].settings]
        losses = np.array([np.mean([float(trial[metric]) for trial in group]) for group in with_key])
        share_of = _explained_share([group[0].settings[key] for group in with_key])
        if share_of is None or np.ptp(losses) == 0:
            continue
        generator = np.random.default_rng(0)
        shares = [share_of(generator.permutation(losses)) for _ in range(PERMUTATIONS)]
        by_chance = float(np.quantile(shares, 1 - FALSE_EFFECTS / len(varied), method="higher"))
        found.append(KeyEffect(key, share_of(losses), by_chance))
    return sorted(found, key=lambda effect: -effect.share)


def _explained_share(values: list[JsonValue]) -> Callable[[np.ndarray], float] | None:
    """The share of the variance of losses that these values of a key explain; None where it has no estimate."""
    names = list(map(repr, values))
    groups = np.unique(names, return_inverse=True)[1]
    count, number = len(values), len(set(names))
    if number < 2:
        return None
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    if number > count / 2 and len(numbers) == count >= MIN_PAIRS:
        ranks = _ranks(numbers)
        return lambda losses: float(np.corrcoef(ranks, _ranks(losses))[0, 1] ** 2)
    if number == count:
        return None
    sizes = np.bincount(groups)

    def omega_squared(losses: np.ndarray) -> float:
        means, total = np.bincount(groups, losses) / sizes, float(((losses - losses.mean()) ** 2).sum())
        between = float((sizes * (means - losses.mean()) ** 2).sum())
        within = (total - between) / (count - number)
        return (between - (number - 1) * within) / (total + within)

    return omega_squared


@dataclass(frozen=True)
class ProxyCorrelation:
    """Spearman's rank correlation of the held-out loss, at a share of the budget, with an expensive metric."""

    budget_share: float
    correlation: float
    trials: int


def proxy_correlations(
    trials: Sequence[TrialRow], curves: Mapping[str, LossCurve], expensive_metric: str
) -> list[ProxyCorrelation]:
    """How well the held-out loss predicts the order of an expensive metric, at several shares of the budget."""
    measured = [trial for trial in trials if trial.status == "finished" and trial.get(expensive_metric) is not None]
    found = []
    for share in BUDGET_SHARES:
        pairs = []
        for trial in measured:
            curve = curves[trial.name]
            reached = share * curve[-1].images_seen
            if curve[0].images_seen <= reached:
                pairs.append((_loss_at(curve, reached), float(trial[expensive_metric])))
        if len(pairs) == len(measured) >= MIN_PAIRS:
            correlation = rank_correlation(*zip(*pairs, strict=True))
            if correlation is not None:
                found.append(ProxyCorrelation(share, correlation, len(pairs)))
    return found


def cost_of_best(order: Sequence[RankedSetting]) -> str:
    """What the trials of the best setting spent, also compared with the second and the cheapest setting."""
    best, rest = order[0], order[1:]
    images, flops = mean_of(best.trials, "images_seen"), mean_of(best.trials, "flops")
    if not images or not flops:
        return ""
    text = f"It spent {images:,.0f} counted images and {flops / 1e12:,.4g} TFLOP per trial"
    costs = [(cost, setting.title) for setting in rest if (cost := mean_of(setting.trials, "flops"))]
    compared = dict.fromkeys([*costs[:1], *sorted(costs)[:1]])  # the second and the cheapest may be the same
    ratios = [_compared_cost(flops / cost, title) for cost, title in compared]
    return f"{text}: {' and '.join(ratios)}." if ratios else f"{text}."


def _compared_cost(ratio: float, title: str) -> str:
    return f"as many FLOPs as {title}" if f"{ratio:.2g}" == "1" else f"{ratio:.2g} times the FLOPs of {title}"


def decision(order: Sequence[RankedSetting]) -> str:
    """Whether the seeds decide that the first of these settings is the best one, in a sentence or two.

    The error is pooled over the settings; see `decisions`. If the seeds do not decide, it says how many would.
    """
    order = tested_settings(order)
    if len(order) == 1:
        return "It is the only one whose trainings all finished."
    compared = ComparedSettings([setting.by_seed for setting in order])
    rival = compared.rival(0)
    needed = compared.decisive_difference(0, rival)
    if needed is None:
        return (
            "Each setting was run with one seed, so the difference may be chance: run more seeds of the best settings "
            "(of a grid search: --restore --add-seeds 2)."
        )
    rule = f"with {min(map(len, compared.values))} seeds per setting, a difference above {needed:.4f} is significant"
    if compared.winner == 0:
        return f"This is decided: {rule}."
    enough = compared.seeds_to_decide(0, rival)
    if enough is None:
        return f"This is undecided, it may be chance: {rule}. This one would need more than {MOST_SEEDS:,} seeds."
    return (
        f"This is undecided, it may be chance: {rule}. About {enough} seeds could decide it, if it and the spread stay "
        "the same."
    )


def stochastic_by_p(comparison: EqualCostComparison) -> dict[float, RankedSetting]:
    """The settings that differ only in p, as in the paper; empty where other keys vary too."""
    found: dict[float, RankedSetting] = {}
    for setting in comparison.order:
        p = setting.settings.get(P_KEY)
        others = setting.settings.keys() - {P_KEY, SCHEDULE_KEY}
        is_stochastic = setting.settings.get(SCHEDULE_KEY, "stochastic") == "stochastic"
        if isinstance(p, (int, float)) and is_stochastic and not others:
            found[float(p)] = setting
    return dict(sorted(found.items()))


def compared_with_paper(comparison: EqualCostComparison) -> str:
    """Whether the order of p at equal counted images is that of the paper; empty where that cannot be said."""
    by_p = stochastic_by_p(comparison)
    shared = [p for p in by_p if p in PAPER_FID]
    ours, theirs = [by_p[p].mean for p in shared], [PAPER_FID[p] for p in shared]
    correlation = rank_correlation(ours, theirs)
    if correlation is None:
        return ""
    best = min(by_p, key=lambda p: by_p[p].mean)
    by_chance = order_by_chance(ours, theirs)
    fids = ", ".join(f"{PAPER_FID[p]:g} at p = {p:g}" for p in shared)
    return (
        f"At equal counted images, p = {best:g} has the lowest mean here. The order of p {_agreement(ours, theirs)} "
        f"that of the paper: the rank correlation over {len(shared)} values of p is {correlation:.2f}, and "
        f"{by_chance:.0%} of random orders have at least that. Figure 2 of the paper has FID {fids}, after 200 million "
        "counted images. Held-out losses after a short training need not rank like FID after a long one."
    )


def _agreement(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """What the order of two sides allows to say."""
    if order_by_chance(ours, theirs) <= AGREEMENT_BY_CHANCE:
        return "agrees with"
    if order_by_chance(ours, [-value for value in theirs]) <= AGREEMENT_BY_CHANCE:
        return "is the reverse of"
    return "is neither shown to agree with nor shown to differ from"
