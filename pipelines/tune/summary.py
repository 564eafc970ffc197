"""Summary of a search: what was compared and measured, what its seeds decide, and the command that decides the rest."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from patchloom.pipelines.pages.html import Fact
from patchloom.pipelines.tune.decisions import MOST_SEEDS, ComparedSettings
from patchloom.pipelines.tune.frontier import METRIC_TITLES, KeyEffect, cost_of_best
from patchloom.pipelines.tune.ranking import (
    HELD_OUT_LOSS,
    RankedSetting,
    is_number_value,
    mean_of,
    tested_settings,
    value_order,
    value_title,
)
from patchloom.platform.progress import clock
from patchloom.platform.recipe.search import BUDGET_SHARE, Search
from patchloom.platform.records.search import SearchCard, TrialRow

LISTED_VALUES = 8  # values of a key
SEEDS_TO_BEGIN = 2  # more seeds where each setting has one


@dataclass(frozen=True)
class SearchSummary:
    """What a search found, for the top of its page.

    Args:
        facts: what was compared, measured and decided.
        advice: what to run next, in a sentence; empty where nothing helps.
        command: the command for that; empty where there is none.
    """

    facts: list[Fact]
    advice: str
    command: str


def search_summary(
    card: SearchCard, trials: Sequence[TrialRow], order: Sequence[RankedSetting], effects: Sequence[KeyEffect],
    budget: str, command: str,
) -> SearchSummary:  # fmt: skip
    """The summary of a finished search.

    Args:
        card: its card.
        trials: the trials that spend its budget.
        order: its settings, best first.
        effects: how much each key matters.
        budget: the budget of a trial, as text.
        command: the command that started it.
    """
    tested = tested_settings(order)
    decided, undecided = _decisions(tested, effects)
    facts = [
        Fact("compared", _compared(card, trials, order, budget)),
        Fact("measured", _measured(card.search, tested)),
        Fact("lowest mean", _lowest(tested)),
        Fact("decided", " ".join(decided) or "Nothing yet."),
        Fact("not decided", " ".join([*_left_out(order, tested), *undecided])),
    ]
    return SearchSummary(facts, *_next_step(card, tested, command))


def _compared(card: SearchCard, trials: Sequence[TrialRow], order: Sequence[RankedSetting], budget: str) -> str:
    """`p (0.25, 0.5): 2 settings, 3 seeds each, with a budget of 1 TFLOP per trial.`"""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    texts = [f"{key.split('.')[-1]} ({_values(key, trials)})" for key in keys]
    settings = f"{len(order)} setting{'s' * (len(order) != 1)}"
    seeds = f"{card.seeds} seed{'s' * (card.seeds != 1)} each"
    shares = " Only trials that had all of it are compared here." if BUDGET_SHARE in keys else ""
    up_to = "up to " if shares else ""
    return f"{' and '.join(texts)}: {settings}, {seeds}, with a budget of {up_to}{budget} per trial.{shares}"


def _values(key: str, trials: Sequence[TrialRow]) -> str:
    found = sorted((trial.settings[key] for trial in trials if key in trial.settings), key=value_order)
    names = list(dict.fromkeys(value_title(key, value) for value in found))
    if len(names) <= LISTED_VALUES:
        return ", ".join(names)
    return f"{len(names)} values" + (f" from {names[0]} to {names[-1]}" if all(map(is_number_value, found)) else "")


def _measured(search: Search, order: Sequence[RankedSetting]) -> str:
    """`Held-out loss of the averaged weights (EMA), on 64 full-size images; lower is better.`"""
    title = METRIC_TITLES[search.metric]
    text = f"{title[0].upper()}{title[1:]}"
    if search.metric == HELD_OUT_LOSS:
        images = mean_of([trial for setting in order for trial in setting.trials], "held_out_images")
        count = f"{images:,.0f} " if images else ""
        text += f" of the averaged weights (EMA), on {count}full-size images that no trial trains on"
    return f"{text}; lower is better."


def _lowest(order: Sequence[RankedSetting]) -> str:
    """The best setting, its value and lead, and what it cost."""
    best = order[0]
    text = f"{best.title}: {METRIC_TITLES[best.metric]} {best.value_of_n()}"
    if len(order) > 1:
        text += f", {order[1].mean - best.mean:.4f} below {order[1].title}"
    return f"{text}. {cost_of_best(order)}".strip()


def _decisions(order: Sequence[RankedSetting], effects: Sequence[KeyEffect]) -> tuple[list[str], list[str]]:
    """What is decided at the 5 % level and what is not, in sentences."""
    decided, undecided = list[str](), list[str]()
    (decided if is_decided(order) else undecided).append(about_best(order))
    seen, unseen = ([effect.key.split(".")[-1] for effect in effects if effect.is_seen is one] for one in (True, False))
    is_one_question = len(order) == 2  # whether a key matters is then whether its two values differ
    if seen and not (is_one_question and undecided):
        decided.append(f"The choice of {' and of '.join(seen)} matters: its effect is larger than chance (5 %).")
    if unseen and not is_decided(order):  # a best setting shows that some key matters
        undecided.append(f"Whether the choice of {' or of '.join(unseen)} matters: its effect may be chance.")
    undecided.append("The order after a longer training: short trials show which setting learns fastest at first.")
    return decided, undecided


def _left_out(order: Sequence[RankedSetting], tested: Sequence[RankedSetting]) -> list[str]:
    """Settings with a lower mean than the best one, some of whose trainings did not finish, in a sentence."""
    better = [f"{one.title} ({one.value_of_n()})" for one in order if not one.is_whole and one.mean < tested[0].mean]
    if not better or not tested[0].is_whole:
        return []
    return [f"Whether {' or '.join(better)} is better: some of its trainings failed or were stopped."]


def is_decided(order: Sequence[RankedSetting]) -> bool:
    """Whether the seeds decide that the first setting is the best one of those that can be compared."""
    return ComparedSettings([setting.by_seed for setting in tested_settings(order)]).winner == 0


def about_best(order: Sequence[RankedSetting]) -> str:
    """Whether the lead of the best setting is more than chance."""
    order = tested_settings(order)
    if len(order) == 1:
        return "Which setting is the best one: only one can be compared."
    compared = ComparedSettings([setting.by_seed for setting in order])
    rival = compared.rival(0)
    needed = compared.decisive_difference(0, rival)
    if needed is None:
        return "Which setting is the best one: with one seed per setting, the difference may be chance."
    seeds = f"with {min(map(len, compared.values))} seeds, a difference above {needed:.4f} is significant (t test, 5 %)"
    if compared.winner == 0:
        return f"{order[0].title} is the best of these settings: {seeds}."
    lead = f"{order[rival].mean - order[0].mean:.4f}"
    return f"Which setting is the best one: {seeds}, and the lead over {order[rival].title} is {lead}."


def _next_step(card: SearchCard, order: Sequence[RankedSetting], command: str) -> tuple[str, str]:
    """What would decide which setting is the best one: a sentence and a command."""
    if len(order) == 1 or is_decided(order):
        return "", ""
    if card.search.is_adaptive or card.search.stops_early:
        return (
            "To decide it, repeat the best settings with several seeds: a search with a grid of them and `repeats: 3`.",
            "",
        )
    compared = ComparedSettings([setting.by_seed for setting in order])
    enough = card.seeds + SEEDS_TO_BEGIN if compared.error is None else compared.seeds_to_decide(0, compared.rival(0))
    if enough is None:
        return f"More than {MOST_SEEDS:,} seeds would be needed: these settings are equal for practical purposes.", ""
    added = max(1, enough - card.seeds)
    seconds = added * sum(mean_of(setting.trials, "seconds") or 0.0 for setting in order)
    time = f" They train for about {clock(seconds)}, one trial after the other." if seconds else ""
    if compared.error is None:
        advice = f"Add {added} seeds of each setting to see how large chance is.{time}"
    else:
        advice = f"About {enough} seeds per setting could decide it, if the lead and the spread stay the same.{time}"
    return advice, f"{command} --restore --add-seeds {added}"


def tune_command(card: SearchCard, folder: str, dataset: str | None) -> str:
    """The command of a search. Where it was not recorded, the parts that are not known are in capitals."""
    if card.command.startswith("patchloom tune "):
        return card.command
    return shlex.join(["patchloom", "tune", "SEARCH.yaml", "--data", dataset or "DATASET", "--out", folder])
