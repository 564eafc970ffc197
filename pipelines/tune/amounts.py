"""Amounts of data: quality and memorised samples over the number of training images, and what the seeds decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from patchloom.pipelines.evaluate.features import COLOUR_FEATURES
from patchloom.pipelines.pages.html import LINE_COLOURS, svg, tidy
from patchloom.pipelines.tune.decisions import ComparedSettings
from patchloom.pipelines.tune.frontier import FINAL_DISTANCE, METRIC_TITLES
from patchloom.pipelines.tune.plots import STOPPED_COLOUR, Plot
from patchloom.pipelines.tune.ranking import IMAGES_KEY, setting_title
from patchloom.platform.recipe.search import Search
from patchloom.platform.records.search import TrialRow

MEMORISED_SHARE, MEMORISED_BY_CHANCE = "memorised_share", "memorised_by_chance"
MEASURED_TITLES = {**METRIC_TITLES, MEMORISED_SHARE: "memorised share"}
ONLY_AMOUNTS = "all settings"  # the title of the line if no other key was varied

LEAST_SHOWN_SHARE = 0.2  # the top of an axis of shares, at least

SeedValues = dict[int, float]  # by the number of the repeat


@dataclass(frozen=True)
class AmountsOfData:
    """The finished trials of a search by the other keys and by the number of training images, both in order.

    Args:
        lines: per title of the other keys, the trials of each number of images.
    """

    lines: Mapping[str, Mapping[int, Sequence[TrialRow]]]

    @property
    def images(self) -> list[int]:
        """All numbers of training images, ascending."""
        return sorted({images for line in self.lines.values() for images in line})

    def values(self, field: str) -> dict[str, dict[int, SeedValues]]:
        """A field of `TrialRow` by line, number of images and seed, without what was not measured."""
        found: dict[str, dict[int, SeedValues]] = {}
        for title, line in self.lines.items():
            for images, trials in line.items():
                seeds = {trial.repeat: value for trial in trials if (value := trial.value_of(field)) is not None}
                if seeds:
                    found.setdefault(title, {})[images] = seeds
        return found

    def winners(self, field: str) -> dict[int, str | None]:
        """By number of images, the line whose mean of a field is decided to be the lowest; None if it is undecided.

        Each number is compared by itself, also its error: a small set makes results vary more. Numbers of images of a
        single line are skipped.
        """
        values, found = self.values(field), dict[int, str | None]()
        for images in self.images:
            cells = {title: line[images] for title, line in values.items() if images in line}
            if len(cells) > 1:
                winner = ComparedSettings(list(cells.values())).winner
                found[images] = None if winner is None else list(cells)[winner]
        return found


def amounts_of_data(trials: Sequence[TrialRow]) -> AmountsOfData | None:
    """The finished trials by number of training images; None if that was not varied."""
    lines: dict[str, dict[int, list[TrialRow]]] = {}
    for trial in trials:
        images = trial.settings.get(IMAGES_KEY) or trial.training_images
        if trial.status == "finished" and IMAGES_KEY in trial.settings and isinstance(images, int):
            title = setting_title({key: value for key, value in trial.settings.items() if key != IMAGES_KEY})
            lines.setdefault(title or ONLY_AMOUNTS, {}).setdefault(images, []).append(trial)
    found = AmountsOfData({title: dict(sorted(line.items())) for title, line in sorted(lines.items())})
    return found if len(found.images) > 1 else None


@dataclass(frozen=True)
class ShownAmounts:
    """What a page shows of a search over the number of training images."""

    quality: list[Plot]
    decisions: str
    memorised: Plot | None
    memorised_decisions: str
    is_coarse: bool  # the features are mean colours


def shown_amounts(trials: Sequence[TrialRow], search: Search) -> ShownAmounts | None:
    """The plots and sentences about the number of training images; None if that was not varied."""
    amounts = amounts_of_data(trials)
    if amounts is None:
        return None
    fields = [field for field in dict.fromkeys((search.metric, FINAL_DISTANCE)) if amounts.values(field)]
    return ShownAmounts(
        quality=[_plot(amounts, field) for field in fields],
        decisions=" ".join(decided_by_amount(amounts, field) for field in fields),
        memorised=_plot(amounts, MEMORISED_SHARE) if amounts.values(MEMORISED_SHARE) else None,
        memorised_decisions=decided_by_amount(amounts, MEMORISED_SHARE),
        is_coarse=search.final is not None and search.final.features == COLOUR_FEATURES,
    )


def decided_by_amount(amounts: AmountsOfData, field: str) -> str:
    """What the seeds decide about a field at each number of images, in a sentence; empty if there is one line."""
    winners = amounts.winners(field) if amounts.values(field) else {}
    parts = [
        f"undecided with {_listed(winners, title)}"
        if title is None
        else f"lowest for {title} with {_listed(winners, title)} (decided)"
        for title in sorted(set(winners.values()), key=lambda title: (title is None, title))
    ]
    return f"{_title(field)}: {'; '.join(parts)}." if parts else ""


def _title(field: str) -> str:
    """`Final Fréchet distance`."""
    return f"{MEASURED_TITLES[field][0].upper()}{MEASURED_TITLES[field][1:]}"


def _listed(winners: Mapping[int, str | None], wanted: str | None) -> str:
    """`32, 125 and 2,000 images`: where this line is the winner."""
    *first, last = [f"{images:,}" for images, winner in winners.items() if winner == wanted]
    return f"{', '.join(first)} and {last} images" if first else f"{last} images"


def _plot(amounts: AmountsOfData, field: str) -> Plot:
    """A field over the number of training images, a line per setting of the other keys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, amounts, field)
    if field == MEMORISED_SHARE:
        chance = chance_by_amount(amounts)
        axes.plot(list(chance), list(chance.values()), "--", color=STOPPED_COLOUR, label="held-out images (chance)")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_ylim(0, max(LEAST_SHOWN_SHARE, axes.get_ylim()[1]))
    tidy(axes)
    return Plot(svg(figure), f"{_title(field)} over the number of training images.")


def chance_by_amount(amounts: AmountsOfData) -> dict[int, float]:
    """By number of training images, the mean memorised share of held-out images."""
    found: dict[int, list[float]] = {}
    for line in amounts.values(MEMORISED_BY_CHANCE).values():
        for images, seeds in line.items():
            found.setdefault(images, []).extend(seeds.values())
    return {images: mean(values) for images, values in sorted(found.items())}


def _draw_lines(axes: Any, amounts: AmountsOfData, field: str) -> None:
    """A line per setting with its spread over seeds; the numbers of images are the ticks of a logarithmic axis."""
    for number, (title, line) in enumerate(amounts.values(field).items()):
        means = [mean(seeds.values()) for seeds in line.values()]
        spreads = [stdev(seeds.values()) if len(seeds) > 1 else 0.0 for seeds in line.values()]
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        axes.errorbar(list(line), means, spreads, color=colour, marker="o", markersize=4, capsize=3, label=title)
    axes.set_xscale("log")
    axes.set_xticks(amounts.images, [f"{images:,}" for images in amounts.images])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training images")
    axes.set_ylabel(MEASURED_TITLES[field])
