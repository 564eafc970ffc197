"""The page of a search: which setting to take and on what evidence, every trial, and what was not tried."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from markupsafe import Markup

from patchloom.errors import UserError
from patchloom.pipelines.pages.html import Number, Table, document, render
from patchloom.pipelines.tune import frontier, plots
from patchloom.pipelines.tune.amounts import MEMORISED_BY_CHANCE, MEMORISED_SHARE, shown_amounts
from patchloom.pipelines.tune.frontier import (
    COST_TITLES,
    EQUAL_WITHIN,
    FINAL_DISTANCE,
    METRIC_TITLES,
    PREVIEW_DISTANCE,
    EqualCostComparison,
    KeyEffect,
    LossCurve,
    compare_at_equal_cost,
    compared_with_paper,
    held_out_curve,
)
from patchloom.pipelines.tune.parallel import parallel_coordinates
from patchloom.pipelines.tune.ranking import (
    HELD_OUT_LOSS,
    RankedSetting,
    mean_of,
    of_budget,
    ranked,
    setting_title,
    value_title,
    with_spread,
)
from patchloom.pipelines.tune.summary import search_summary, tune_command
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import write_atomic
from patchloom.platform.progress import clock
from patchloom.platform.recipe.search import Search
from patchloom.platform.records.run import RUN_FILE, RunCard
from patchloom.platform.records.search import SearchCard, TrialRow, read_trials

EXPENSIVE_METRICS = (FINAL_DISTANCE, PREVIEW_DISTANCE)
COMMON_KEYS = {  # what people ask about first
    "patches.p": "p",
    "patches.schedule": "the schedule",
    "patches.sizes": "patch sizes and batch multipliers",
    "patches.draw": "how sizes are drawn across workers",
    "loss.reduction": "the reduction of the loss",
    "model.coordinates": "the encoding of coordinates",
    "model.width": "the width of the network",
    "optimizer.lr": "the learning rate",
    "train.batch_size": "the batch size",
    "data.images": "the number of training images",
    "noise.mean": "the training noise",
}


@dataclass(frozen=True)
class Column:
    """A column of the table of settings: its title, and its text for the trials of a setting."""

    title: str
    text: Callable[[Sequence[TrialRow]], str]


def _mean_column(title: str, field: str, pattern: str, unit: float = 1.0) -> Column:
    """The mean of a field of `TrialRow`, empty where a trial does not have it."""

    def text(trials: Sequence[TrialRow]) -> str:
        value = mean_of(trials, field)
        return "" if value is None else pattern.format(value / unit)

    return Column(title, text)


# add a column here; the metric of the search and the setting itself stand before these
COLUMNS = (
    _mean_column("updates", "updates", "{:,.0f}"),
    _mean_column("counted images", "images_seen", "{:,.0f}"),
    _mean_column("TFLOP", "flops", "{:.3f}", unit=1e12),
    _mean_column("seconds", "seconds", "{:.0f}"),
)


def write_search_page(folder: Path, page: Path) -> Path:
    """Write the page of a finished search as one HTML file; returns its path."""
    write_atomic(page, document(search_title(folder), search_section(folder)))
    return page


def search_title(folder: Path) -> str:
    """The title of the page of a search folder."""
    return f"Search {SearchCard.read(Folder.at(folder)).search.name}"


def search_section(folder: Path, command: str = "", name: str = "") -> Markup:
    """The body of the page of a search folder; raises UserError where no trial has finished.

    Args:
        folder: the folder.
        command: the command that does the same as the search; that of its card by default.
        name: how commands name it; by default as the folder.
    """
    card, trials = SearchCard.read(Folder.at(folder)), read_trials(Folder.at(folder))
    search, seeds, all_trials = card.search, card.seeds, trials
    trials = of_budget(trials)
    order = ranked(trials, search.metric)
    if not order:
        raise UserError(f"{folder} has no finished trial: wait for `patchloom tune`, or continue it with --restore")
    curves = {trial.name: held_out_curve(folder, trial) for trial in trials}
    keys = list(dict.fromkeys([*search.space, *(key for setting in search.also for key in setting)]))
    are_drawn = any(value.is_drawn for value in search.space.values())
    effects = frontier.key_effects(trials, keys, search.metric, are_drawn)
    command = command or tune_command(card, name or folder.name, _dataset_of(folder, trials))
    return render(
        "search.html",
        command=command,
        summary=search_summary(card, trials, order, effects, search.budget.words, command),
        counts=[*_counts(all_trials, order), *_spent_per_trial(trials)],
        method=_method(search, seeds),
        amounts=shown_amounts(trials, search),
        frontier=plots.frontier_plot(folder, all_trials, search.metric),
        **_compared(all_trials, search),
        training_curves=plots.training_curves(trials, curves),
        importance=_importance_table(effects) if len(effects) > 1 else None,
        parallel=parallel_coordinates(trials, keys, search.metric),
        proxies=_proxy_tables(trials, curves),
        settings=_settings_table(trials, order, keys),
        not_tried=_not_tried(all_trials, keys),
    )


def _dataset_of(folder: Path, trials: Sequence[TrialRow]) -> str | None:
    """The address of the dataset of the trials, where their folders have it."""
    places = [folder / "trials" / trial.name for trial in trials if trial.status == "finished"]
    return next((RunCard.read(place).dataset for place in places if (place / RUN_FILE).is_file()), None)


def _compared(trials: Sequence[TrialRow], search: Search) -> dict[str, Any]:
    """What the page shows of settings at equal cost."""
    comparisons = {by: compare_at_equal_cost(trials, by) for by in COST_TITLES}
    found = [comparison for comparison in comparisons.values() if comparison]
    by_images = comparisons["images_seen"]
    return {
        "comparisons": [_shown_comparison(comparison, search) for comparison in found],
        "not_compared": _not_compared([by for by, comparison in comparisons.items() if not comparison], search),
        "ramps": _ramps(search),
        "p_curves": plots.p_curves(found),
        "compared_with_paper": compared_with_paper(by_images) if by_images else "",
    }


def _counts(trials: Sequence[TrialRow], order: Sequence[RankedSetting]) -> list[Number]:
    states = [trial.status for trial in trials]
    counts = [
        Number("settings with a result", f"{len(order)}"),
        Number("trials finished", f"{states.count('finished')}"),
        *(Number(f"trials {name}", f"{states.count(name)}") for name in ("stopped", "failed") if name in states),
    ]
    return [
        *counts,
        Number("TFLOP spent", f"{sum(trial.flops or 0.0 for trial in trials) / 1e12:,.2f}"),
        Number("time of trials", clock(sum(trial.seconds or 0.0 for trial in trials))),
    ]


def _spent_per_trial(trials: Sequence[TrialRow]) -> list[Number]:
    """The ranges of what finished trials spent, without those that are the same for all: the summary has the budget."""
    finished = [trial for trial in trials if trial.status == "finished"]
    spent = {
        "counted images per trial": [f"{trial.images_seen:,}" for trial in finished],
        "TFLOP per trial": [f"{(trial.flops or 0.0) / 1e12:,.3g}" for trial in finished],
    }
    number = {
        unit: sorted(set(values), key=lambda value: float(value.replace(",", ""))) for unit, values in spent.items()
    }
    return [Number(unit, f"{values[0]} to {values[-1]}") for unit, values in number.items() if len(values) > 1]


def _method(search: Search, seeds: int) -> list[str]:
    """How trials were chosen and compared, in sentences."""
    sentences = [
        "All trials with the same seed use the same noise levels and patch positions in a step, so that they can be "
        "compared. They rarely use the same images in a step, because smaller patches come in larger batches."
    ]
    if search.metric == HELD_OUT_LOSS:
        sentences.append("The held-out loss is measured on full-size images, with the averaged weights (EMA).")
    if seeds > 1:
        sentences.append(
            f"Values are means over {seeds} seeds, with their standard deviation. A setting is the best one if a t "
            "test at the 5 % level says so against each other setting; its error is pooled over all settings. If all "
            "settings were equal, at most one search in 20 would call one of them the best."
        )
    if search.is_adaptive:
        sentences.append(f"Optuna chose the settings ({search.searcher}).")
    if search.stops_early:
        sentences.append("ASHA stopped trials with a worse metric early.")
    return sentences


@dataclass(frozen=True)
class _ShownComparison:
    """An `EqualCostComparison` as text."""

    unit: str
    cost: str
    deviation: str
    best: str
    value: str
    decision: str
    table: Table


def _shown_comparison(comparison: EqualCostComparison, search: Search) -> _ShownComparison:
    """A comparison, with what its seeds decide unless the summary of the search says that."""
    best = comparison.order[0]
    has_seeds = any(len(setting.trials) > 1 for setting in comparison.order)
    is_budget = (
        search.metric == HELD_OUT_LOSS and getattr(search.budget, comparison.by.removesuffix("_seen")) is not None
    )
    cost = f"{comparison.cost / 1e12:,.4g} TFLOP" if comparison.by == "flops" else f"{comparison.cost:,.0f}"
    return _ShownComparison(
        COST_TITLES[comparison.by], cost, f"{comparison.deviation:.1%}", best.title,
        best.value_of_n(), frontier.decision(comparison.order) if has_seeds and not is_budget else "",
        _equal_cost_table(comparison),
    )  # fmt: skip


def _not_compared(units: Sequence[str], search: Search) -> list[str]:
    """Why settings are not compared in some units, and what would compare them, in sentences."""
    asked = [unit for unit in units if unit.removesuffix("_seen") in search.equal_costs]
    others = [unit for unit in units if unit not in asked]
    sentences = []
    if asked:
        sentences.append(
            f"Settings are not compared at equal {_either(asked)}, because a trial failed, or ended more than "
            f"{EQUAL_WITHIN:.0%} away from the others: a single step is then a large part of a trial, and a larger "
            "budget helps."
        )
    if others:
        keys = ", ".join(unit.removesuffix("_seen") for unit in others)
        sentences.append(
            f"Settings are not compared at equal {_either(others)}, because their trials ended at different values. "
            f"Add equal_costs: [{keys}] to the search: it then runs each setting for as long as that takes."
        )
    return sentences


def _either(units: Sequence[str]) -> str:
    return " or ".join(COST_TITLES[unit] for unit in units)


def _ramps(search: Search) -> str:
    """How the ramps and averages of trials follow their lengths."""
    fractions = {key.split(".")[-1]: value for key, value in search.of_budget.items()}
    known = [name for name in ("lr_rampup_images", "halflife_images") if name in fractions]
    if not known:
        return (
            "Learning-rate ramps and averages have the same length in all trials, so a short trial may end during its "
            "ramp."
        )
    listed = " and ".join(f"{name} is {fractions[name]:.3g}" for name in known)
    return f"Ramps follow the length of a trial: {listed} of it."


def _equal_cost_table(comparison: EqualCostComparison) -> Table:
    losses = [comparison.by_sigma(setting) for setting in comparison.order]
    sigmas = list(losses[0])
    lowest = {sigma: min(range(len(losses)), key=lambda row: mean(losses[row][sigma])) for sigma in sigmas}
    rows = []
    for number, setting in enumerate(comparison.order):
        cells = [with_spread(losses[number][sigma], 1) + (" *" if lowest[sigma] == number else "") for sigma in sigmas]
        rows.append([setting.title, setting.value(), *cells])
    return Table(["setting", "held-out loss", *(f"sigma {sigma}" for sigma in sigmas)], rows, marks_first=True)


def _importance_table(effects: Sequence[KeyEffect]) -> Table:
    rows = [
        [effect.key, f"{max(0, effect.share):.0%}", f"{max(0, effect.by_chance):.0%}",
         "" if effect.is_seen else "no effect seen"]
        for effect in effects
    ]  # fmt: skip
    return Table(["key", "share", "by chance", ""], rows, marks_first=effects[0].is_seen)


def _proxy_tables(trials: Sequence[TrialRow], curves: Mapping[str, LossCurve]) -> list[tuple[str, Table]]:
    """How well the held-out loss predicts each expensive metric that was measured."""
    tables = []
    for metric in EXPENSIVE_METRICS:
        found = frontier.proxy_correlations(trials, curves, metric)
        rows = [[f"{one.budget_share:.0%} of the budget", f"{one.correlation:.2f}", f"{one.trials}"] for one in found]
        if rows:
            tables.append((METRIC_TITLES[metric], Table(["held-out loss at", "correlation", "trials"], rows)))
    return tables


def _memorised(order: Sequence[RankedSetting]) -> list[Column]:
    """The columns of memorised shares, if they were measured."""
    names = {MEMORISED_SHARE: "memorised", MEMORISED_BY_CHANCE: "by chance"}
    return [
        _mean_column(title, name, "{:.1%}")
        for name, title in names.items()
        if any(mean_of(setting.trials, name) is not None for setting in order)
    ]


def _settings_table(trials: Sequence[TrialRow], order: Sequence[RankedSetting], keys: Sequence[str]) -> Table:
    """Ranked settings first, then trials that were stopped or failed."""
    metric = order[0].metric
    more = [name for name in EXPENSIVE_METRICS if name != metric and order[0].best.value_of(name) is not None]
    columns = [*(_mean_column(METRIC_TITLES[name], name, "{:.4g}") for name in more), *_memorised(order), *COLUMNS]
    header = [*(key.split(".")[-1] for key in keys), METRIC_TITLES[metric], *(column.title for column in columns)]

    def row(setting: TrialRow | RankedSetting, value: str, of: Sequence[TrialRow]) -> list[str]:
        # a key that depends on others may be missing
        cells = [value_title(key, setting.settings.get(key, "")) for key in keys]
        return [*cells, value, *(column.text(of) for column in columns)]

    rows = [row(setting, setting.value(), setting.trials) for setting in order]
    others = [trial for trial in trials if trial.status != "finished"]
    for trial in others:
        value = trial.value_of(metric)
        if trial.status == "stopped":
            rows.append(row(trial, "stopped" if value is None else f"stopped at {value:.4f}", [trial]))
        if trial.status == "failed":
            rows.append(row(trial, f"failed: {trial.error}", [])[: len(keys) + 1])
    names = [[trial.name for trial in setting.trials] for setting in order] + [[trial.name] for trial in others]
    return Table(header, rows, marks_first=True, trials=names)


def _not_tried(trials: Sequence[TrialRow], keys: Sequence[str]) -> list[str]:
    """What this search cannot answer, in sentences."""
    fixed = [text for key, text in COMMON_KEYS.items() if not any(name.startswith(key) for name in keys)]
    sentences = [f"This search did not vary {', '.join(fixed)}."]
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        titles = "; ".join(dict.fromkeys(setting_title(trial.settings) for trial in failed))
        sentences.append(f"These settings failed and have no result: {titles}.")
    if any(trial.status == "stopped" for trial in trials):
        sentences.append("Settings that were stopped early might have caught up.")
    return [*sentences, "Longer budgets, other data and other networks may rank settings differently."]
