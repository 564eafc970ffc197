"""Search page: which setting to take and on what evidence, every trial a point, and what was not tried."""

import html
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from patchloom.errors import UserError
from patchloom.pipelines.pages.html import document, numbers, table
from patchloom.pipelines.tune.frontier import (
    COSTS,
    HELD_OUT,
    Curve,
    Equal,
    Row,
    at_equal,
    beside_the_paper,
    curve_of,
    importance,
    mean_over,
    metric_words,
    proxy_correlations,
    recommendation,
)
from patchloom.pipelines.tune.plots import curve_sections, frontier_plot, p_curves, parallel_coordinates
from patchloom.pipelines.tune.ranking import (
    SEARCH_FILE,
    SEARCH_FORMAT,
    TRIALS_FILE,
    Ranked,
    ranked,
    setting_words,
    value_words,
)
from patchloom.platform.files.storage import read_json, read_json_lines, write_atomic
from patchloom.platform.progress import clock

KNOBS = {  # of a recipe, by what people ask of them first
    "patches.p": "p",
    "patches.schedule": "the schedule",
    "patches.sizes": "patch sizes and batch multipliers",
    "patches.draw": "how sizes are drawn across workers",
    "loss.reduction": "the loss's reduction",
    "model.coordinates": "the coordinates' encoding",
    "model.width": "the network's width",
    "optimizer.lr": "the learning rate",
    "train.batch_size": "the batch size",
    "noise.mean": "the training noise",
}


def write_search_page(folder: Path, page: Path) -> Path:
    """Write the page of a finished search as one HTML file; returns its path."""
    write_atomic(page, document(f"Search {read_json(folder / SEARCH_FILE)['search']['name']}", search_sections(folder)))
    return page


def search_sections(folder: Path) -> list[str]:
    """The page of a search's folder; raises UserError for one that is not finished."""
    card = read_json(folder / SEARCH_FILE)
    if card["format_version"] != SEARCH_FORMAT:
        raise UserError(f"{folder} was written by another version of patchloom: search again with this one")
    trials, search = read_json_lines(folder / TRIALS_FILE), card["search"]
    order = ranked(trials, search["metric"])
    if not order:
        raise UserError(f"{folder} has no finished trial yet: let `patchloom tune` end, or go on with --restore")
    curves = {trial["name"]: curve_of(folder, trial) for trial in trials}
    keys = list(dict.fromkeys([*search["space"], *(key for setting in search["also"] for key in setting)]))
    return [
        f'<p class="lead">{html.escape(recommendation(order, _budget(search)))}</p>',
        numbers(*_counts(trials, order)),
        f"<p>{html.escape(_how(search))}</p>",
        "<h3>Quality against cost</h3>",
        frontier_plot(folder, trials, search["metric"]),
        *_equal_sections(trials, curves),
        *curve_sections(trials, curves),
        *_importance_sections(trials, keys, search["metric"]),
        *_proxy_sections(trials, curves),
        "<h3>Every setting</h3>",
        _settings_table(trials, order, keys),
        "<h3>Not tried</h3>",
        f"<p>{html.escape(_not_tried(trials, search, keys))}</p>",
    ]


def _budget(search: dict[str, Any]) -> str:
    """`4 TFLOP`, `20,000 images`."""
    name, value = next((name, value) for name, value in search["budget"].items() if value)
    return f"{value / 1e12:,.4g} TFLOP" if name == "flops" else f"{value:,.10g} {name}"


def _counts(trials: list[Row], order: list[Ranked]) -> list[tuple[str, str]]:
    states = [trial["status"] for trial in trials]
    spent = [trial for trial in trials if "flops" in trial]
    counts = [("settings with a result", f"{len(order)}"), ("trials finished", f"{states.count('finished')}")]
    counts += [(f"trials {name}", f"{states.count(name)}") for name in ("stopped", "failed") if name in states]
    seconds = sum(trial.get("seconds", 0.0) for trial in trials)
    return [
        *counts,
        ("TFLOP spent", f"{sum(trial['flops'] for trial in spent) / 1e12:,.2f}"),
        ("time of trials", clock(seconds)),
    ]


def _how(search: dict[str, Any]) -> str:
    """How trials were chosen and made comparable."""
    words = "All trials see the same rows, noise and crop positions, so that differences are less luck. "
    if search["metric"] == HELD_OUT:
        words += "The held-out loss is that of the averaged weights on full-size images. "
    if search["repeats"] > 1:
        words += f"Means of {search['repeats']} seeds with their standard deviation. "
    if search["searcher"] != "grid":
        words += f"Optuna chose the settings ({search['searcher']}). "
    if search["scheduler"]["kind"] != "none":
        words += "Trials that were behind were stopped early (asha). "
    return words + "Trials this short tell which setting starts best, not which ends best."


def _equal_sections(trials: list[Row], curves: dict[str, Curve]) -> list[str]:
    """Which setting is ahead at equal FLOPs, updates and counted images, in all and at each noise level."""
    equals, sections = [], ["<h3>At equal cost, counted in three ways</h3>"]
    for by, name in COSTS.items():
        equal = at_equal(trials, curves, by)
        if equal is None:
            sections.append(
                f'<p class="note">At equal {name} nothing can be said: some trial was first measured when another had '
                "ended. A smaller train.held_out_every_images tells.</p>"
            )
            continue
        best = equal.order[0]
        sections.append(
            f"<p>At equal {name} ({equal.cost:,.4g}): <b>{html.escape(best.words())}</b> is ahead, "
            f"{best.value_of_n()}.</p>"
        )
        sections.append(_equal_table(equal))
        equals.append(equal)
    sections.append(
        '<p class="note">Numbers between two measurements of a trial lie on a straight line of their logarithms. Ramps '
        "and averages are those of a trial's own length, so one that could have gone on is judged a little early.</p>"
    )
    by_images = next((equal for equal in equals if equal.by == "images_seen"), None)
    words = beside_the_paper(by_images) if by_images else ""
    return [*sections, *p_curves(equals), *([f"<p>{html.escape(words)}</p>"] if words else [])]


def _equal_table(equal: Equal) -> str:
    sigmas = list(equal.by_sigma(equal.order[0]))
    leads = {sigma: min(equal.order, key=lambda setting: mean(equal.by_sigma(setting)[sigma])) for sigma in sigmas}
    rows = []
    for setting in equal.order:
        cells = [setting.words(), setting.value()]
        for sigma, losses in equal.by_sigma(setting).items():
            spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
            cells.append(f"{mean(losses):.3f}{spread}{' *' if leads[sigma] is setting else ''}")
        rows.append(cells)
    return table(["setting", "held-out loss", *(f"sigma {sigma}" for sigma in sigmas)], rows) + (
        '<p class="note">* least at this noise level.</p>'
    )


def _importance_sections(trials: list[Row], keys: list[str], metric: str) -> list[str]:
    shares = importance(trials, keys, metric)
    if len(shares) < 2:
        return []
    rows = [[key, f"{share:.0%}"] for key, share in shares.items()]
    words = (
        "Share of the variance over finished trials that each key accounts for by itself; the rest is seeds, and keys "
    )
    words += "together."
    return [
        "<h3>Which key mattered</h3>",
        f"<p>{words}</p>",
        table(["key", "share"], rows),
        parallel_coordinates(trials, keys, metric),
    ]


def _proxy_sections(trials: list[Row], curves: dict[str, Curve]) -> list[str]:
    """Whether the held-out loss, which stops and ranks trials, foretells what is dear to measure."""
    sections = []
    for expensive in ("final_distance", "preview_frechet_distance"):
        found = proxy_correlations(trials, curves, expensive)
        if found:
            rows = [[where, f"{correlation:.2f}", f"{count}"] for where, correlation, count in found]
            title = metric_words(expensive)
            sections.append(f"<p>Rank correlation (Spearman) of the held-out loss with the {title}:</p>")
            sections.append(table(["held-out loss at", "correlation", "trials"], rows, best=False))
    return ["<h3>Can the held-out loss be trusted?</h3>", *sections] if sections else []


def _settings_table(trials: list[Row], order: list[Ranked], keys: list[str]) -> str:
    metric = order[0].metric
    more = [name for name in ("final_distance", "preview_frechet_distance") if name != metric and name in order[0].best]
    header = [*(key.split(".")[-1] for key in keys), metric_words(metric), *map(metric_words, more), "updates",
              "counted images", "TFLOP", "seconds"]  # fmt: skip
    rows = []
    for found in order:
        cells = [found.value(), *(f"{mean_over(found, name):.4g}" for name in more)]
        cells += [f"{mean_over(found, 'updates'):,.0f}", f"{mean_over(found, 'images_seen'):,.0f}"]
        cells += [f"{mean_over(found, 'flops') / 1e12:.3f}", f"{mean_over(found, 'seconds'):.0f}"]
        rows.append([*_setting_cells(found.settings, keys), *cells])
    for trial in trials:
        if trial["status"] == "stopped":
            told = f"stopped at {trial[metric]:.4f}" if metric in trial else "stopped"
            cells = [told, *("" for _ in more), f"{trial.get('updates', 0):,}", f"{trial.get('images_seen', 0):,}"]
            rows.append([*_setting_cells(trial["settings"], keys), *cells, f"{trial.get('flops', 0) / 1e12:.3f}", ""])
        if trial["status"] == "failed":
            rows.append([*_setting_cells(trial["settings"], keys), f"failed: {trial['error']}"])
    return table(header, rows)


def _setting_cells(settings: dict[str, Any], keys: list[str]) -> list[str]:
    return [value_words(settings.get(key, "")) for key in keys]  # a key that hangs on others may not be there


def _not_tried(trials: list[Row], search: dict[str, Any], keys: list[str]) -> str:
    """What this search says nothing about."""
    fixed = [words for key, words in KNOBS.items() if not any(name.startswith(key) for name in keys)]
    sentences = [f"This search kept fixed: {', '.join(fixed)}."]
    failed = [trial for trial in trials if trial["status"] == "failed"]
    if failed:
        words = "; ".join(dict.fromkeys(setting_words(trial["settings"]) for trial in failed))
        sentences.append(f"Settings without a result, because they failed: {words}.")
    if any(trial["status"] == "stopped" for trial in trials):
        sentences.append("Settings that were stopped early might have caught up.")
    if search["repeats"] == 1:
        sentences.append("No setting was repeated with another seed.")
    sentences.append("Longer budgets, other data and other networks may order settings otherwise.")
    return " ".join(sentences)
