"""Frontier: values known by hand or from scipy: fronts, equal costs, rank correlations, shares of variance."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from command_lines import parse

from patchloom.errors import UserError
from patchloom.pipelines.tune.frontier import (
    ProxyCorrelation,
    compare_at_equal_cost,
    compared_with_paper,
    cost_of_best,
    held_out_curve,
    key_effects,
    order_by_chance,
    pareto_front,
    proxy_correlations,
    rank_correlation,
)
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.parallel import parallel_coordinates
from patchloom.pipelines.tune.ranking import ranked
from patchloom.pipelines.tune.summary import SearchSummary, search_summary, tune_command
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import write_json
from patchloom.platform.records.run import ProgressLine, write_progress
from patchloom.platform.records.search import SearchCard, TrialRow, write_trials

RATES = {0.0: 1.0, 0.25: 2.0, 0.5: 3.0, 1.0: 5.0}  # FLOPs per image at each p: larger patches cost more


def trial(name: str, settings: dict[str, Any], loss: float, repeat: int = 0, **more: Any) -> TrialRow:
    row = {"name": name, "settings": settings, "repeat": repeat, "status": "finished", "held_out_loss": loss}
    cost = {"updates": 10, "images_seen": 100, "flops": 1e12, "seconds": 5.0}
    return TrialRow.model_validate({**row, **cost, **more})


def line(images: float, loss: float, rate: float = 1.0) -> ProgressLine:
    by_sigma = {"0.1": loss / 2, "1": loss * 3 / 2}
    return ProgressLine(step=int(images) * 4, updates=int(images) * 4, images_seen=int(images), flops=rate * images,
                        held_out_loss=loss, held_out_loss_by_sigma=by_sigma)  # fmt: skip


def test_front_holds_the_points_that_no_other_point_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 2.0), (2.0, 3.0), (4.0, 1.0), (1.0, 6.0)]
    assert [points[index] for index in pareto_front(points)] == [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0)]
    assert pareto_front([]) == []


def test_rank_correlation_is_spearmans_with_mean_ranks_for_ties() -> None:
    generator = np.random.default_rng(1)
    one = generator.integers(0, 6, 30).astype(float)  # with ties
    other = one + generator.normal(0, 2, 30)
    assert rank_correlation(one.tolist(), other.tolist()) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    # ranks 1.5 1.5 3 4 and 1 2 3 4: covariance 4.5, sums of squares 4.5 and 5
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5), rel=1e-12)
    assert rank_correlation([1, 2], [2, 1]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def ended(name: str, p: float, images: int, repeat: int = 0, **more: Any) -> TrialRow:
    """A trial whose loss falls exponentially with images, more slowly for a smaller p."""
    loss = math.exp(-(0.004 + 0.002 * p) * images)
    cost = {"images_seen": images, "updates": 4 * images, "flops": RATES[p] * images}
    by_sigma = {"0.1": loss / 2, "1": loss * 3 / 2}
    return trial(name, {"patches.p": p}, loss, repeat, held_out_loss_by_sigma=by_sigma, **{**cost, **more})


def test_best_setting_depends_on_the_unit_of_equal_cost() -> None:
    """At p = 0 images cost less and reduce the loss less: best at equal FLOPs, worst at equal images."""
    of_search = [ended("000", 0.0, 500), ended("001", 1.0, 100)]  # 500 FLOPs each
    trials = [*of_search, ended("002", 0.0, 101, equal="images")]
    by_flops, by_images = compare_at_equal_cost(trials, "flops"), compare_at_equal_cost(trials, "images_seen")
    assert by_flops is not None and by_images is not None
    assert by_flops.cost == 500 and by_flops.deviation == 0
    assert [setting.mean for setting in by_flops.order] == pytest.approx([math.exp(-2), math.exp(-0.6)])
    assert by_images.cost == 100 and by_images.deviation == pytest.approx(0.01)
    assert [setting.settings["patches.p"] for setting in by_images.order] == [1.0, 0.0]
    assert by_images.order[1].mean == pytest.approx(math.exp(-0.404))  # of the trial that ended there
    assert by_images.by_sigma(by_images.order[1])["1"] == pytest.approx([1.5 * math.exp(-0.404)])
    assert compare_at_equal_cost(of_search, "images_seen") is None  # one trial is five times as long
    assert compare_at_equal_cost(of_search[:1], "flops") is None


def test_every_repeat_of_a_setting_needs_a_trial_of_that_cost() -> None:
    trials = [ended("000", 0.0, 500), ended("001", 0.0, 500, 1), ended("002", 1.0, 100), ended("003", 1.0, 102, 1),
              ended("004", 0.0, 100, equal="images")]  # fmt: skip
    assert compare_at_equal_cost(trials, "images_seen") is None
    equal = compare_at_equal_cost([*trials, ended("005", 0.0, 104, 1, equal="images")], "images_seen")
    assert equal is not None and equal.cost == 101  # the mean of the cheapest setting
    assert [len(setting.trials) for setting in equal.order] == [2, 2]
    assert compare_at_equal_cost([*trials, ended("005", 0.0, 120, 1, equal="images")], "images_seen") is None


def test_the_share_of_a_key_is_omega_squared() -> None:
    rows = [("mean", 1, 1.0), ("mean", 2, 3.0), ("sum", 1, 5.0), ("sum", 2, 7.0)]
    trials = [
        trial(f"{number:03d}", {"loss.reduction": one, "model.blocks": two, "fixed": 1}, loss)
        for number, (one, two, loss) in enumerate(rows)
    ]
    found = key_effects(trials, ["model.blocks", "loss.reduction", "fixed"], "held_out_loss")
    # sums of squares: total 20, between reductions 16 (within 4 / 2), between blocks 4 (within 16 / 2)
    assert {effect.key: effect.share for effect in found} == {
        "loss.reduction": pytest.approx((16 - 2) / (20 + 2)), "model.blocks": pytest.approx((4 - 8) / (20 + 8)),
    }  # fmt: skip
    assert not any(effect.is_seen for effect in found)  # a third of all permutations explain as much
    drawn = [trial(f"{n:03d}", {"optimizer.lr": 10.0**-n}, loss) for n, loss in enumerate((1, 2, 3, 4, 5, 9.0))]
    (effect,) = key_effects(drawn, ["optimizer.lr"], "held_out_loss")
    assert effect.share == pytest.approx(1.0) and effect.is_seen


@pytest.mark.parametrize(("values", "seeds"), [(2, 2), (2, 8), (3, 4), (6, 2)])
def test_a_key_without_effect_has_no_share_on_average_and_is_rarely_seen(
    values: int, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchloom.pipelines.tune.frontier.PERMUTATIONS", 100)
    generator, shares, seen = np.random.default_rng(values * seeds), [], 0
    for _ in range(300):
        trials = [
            trial(f"{n:03d}", {"patches.p": n % values}, float(loss))
            for n, loss in enumerate(generator.normal(1, 0.1, values * seeds))
        ]
        (effect,) = key_effects(trials, ["patches.p"], "held_out_loss")
        shares.append(effect.share)
        seen += effect.is_seen
    assert abs(np.mean(shares)) < 4 * np.std(shares) / math.sqrt(300)  # eta squared: .32 and more on average
    assert seen / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_repeats_of_drawn_settings_are_one_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw has its own learning rate and width, so the width seems to explain all that the rate does."""
    monkeypatch.setattr("patchloom.pipelines.tune.frontier.PERMUTATIONS", 200)
    generator, seen = np.random.default_rng(3), dict.fromkeys(("optimizer.lr", "model.width"), 0)
    for _ in range(80):
        drawn = zip(generator.uniform(1e-4, 1e-3, 10), generator.permutation(range(8, 128, 8))[:10], strict=True)
        trials = [
            trial(f"{number}-{repeat}", {"optimizer.lr": rate, "model.width": int(width)}, loss, repeat)
            for number, (rate, width) in enumerate(drawn)
            for repeat, loss in enumerate(1000 * rate + generator.normal(0, 0.01, 3))
        ]
        for effect in key_effects(trials, list(seen), "held_out_loss", are_drawn=True):
            seen[effect.key] += effect.is_seen
    assert seen["optimizer.lr"] == 80
    assert seen["model.width"] / 80 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 80)


def test_repeats_of_a_grid_are_observations_though_most_settings_have_their_own_value() -> None:
    """A minimum in the middle has no rank correlation with p, but four seeds of each p show it."""
    losses = [(0.0, 0.5), (0.25, 0.3), (0.5, 0.1), (0.75, 0.3), (1.0, 0.5)]
    trials = [
        trial(f"{p}-{repeat}", {"patches.p": p, "patches.schedule": "stochastic"}, loss + repeat / 1000, repeat)
        for p, loss in losses
        for repeat in range(4)
    ]
    extra = {"patches.p": 0.5, "patches.schedule": "progressive"}
    trials += [trial(f"also-{repeat}", extra, 0.3 + repeat / 1000, repeat) for repeat in range(4)]
    effects = {effect.key: effect for effect in key_effects(trials, ["patches.p", "patches.schedule"], "held_out_loss")}
    assert effects["patches.p"].is_seen


def test_many_keys_without_effect_are_rarely_seen_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchloom.pipelines.tune.frontier.PERMUTATIONS", 400)
    generator, keys, searches = np.random.default_rng(4), ["a", "b", "c", "d", "e"], 0
    for _ in range(150):
        trials = [
            trial(f"{number:02d}", dict(zip(keys, map(int, generator.integers(0, 2, 5)), strict=True)), float(loss))
            for number, loss in enumerate(generator.normal(1, 0.1, 16))
        ]
        searches += any(effect.is_seen for effect in key_effects(trials, keys, "held_out_loss"))
    assert searches / 150 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_a_perfect_order_is_one_of_all_orders(count: int) -> None:
    order = [0.3 * number for number in range(count)]
    assert order_by_chance(order, order) == pytest.approx(1 / math.factorial(count))
    assert order_by_chance(order, order[::-1]) == 1
    generator = np.random.default_rng(count)
    found = [order_by_chance(generator.permutation(count), order) for _ in range(400)]
    assert np.mean(np.array(found) <= 0.2) < 0.2 + 3 * 0.02  # a random order rarely looks like agreement


def test_proxy_correlation_is_measured_at_shares_of_the_budget() -> None:
    finals = (1.0, 2.0, 3.0)
    trials = [trial(f"{n:03d}", {"seed": n}, 0.1, final_distance=final) for n, final in enumerate(finals)]
    early = (3.0, 2.0, 1.0)  # the order is reversed at a quarter of the budget
    curves = {f"{n:03d}": [line(25, early[n]), line(100, final)] for n, final in enumerate(finals)}
    found = proxy_correlations(trials, curves, "final_distance")
    assert found[0] == ProxyCorrelation(0.25, pytest.approx(-1.0), 3)
    assert found[-1] == ProxyCorrelation(1.0, pytest.approx(1.0), 3)
    assert proxy_correlations(trials[:2], curves, "final_distance") == []


COMMAND = "patchloom tune p_search --data dataset --out search"


def summary(trials: list[TrialRow], **values: Any) -> SearchSummary:
    """The summary of a search of p with a budget of 1 TFLOP."""
    search = {"space": {"patches.p": {"grid": [0.5, 1.0]}}, "budget": {"flops": 1e12}, "name": "p",
              "recipe": "base.yaml", "repeats": 1 + max(trial.repeat for trial in trials), **values}  # fmt: skip
    card = SearchCard.model_validate({"run_id": "0", "images": [], "search": search, "dataset_fingerprint": "a"})
    effects = key_effects(trials, ["patches.p"], "held_out_loss")
    return search_summary(card, trials, ranked(trials), effects, "1 TFLOP", COMMAND)


def test_summary_gives_seeds_budget_and_what_the_seeds_decide() -> None:
    clear = [trial("000", {"patches.p": 0.5}, 0.10), trial("001", {"patches.p": 0.5}, 0.12, 1),
             trial("002", {"patches.p": 1.0}, 0.50), trial("003", {"patches.p": 1.0}, 0.54, 1)]  # fmt: skip
    found = summary(clear)
    facts = {fact.name: fact.value for fact in found.facts}
    assert "p (0.5, 1)" in facts["compared"] and "2 seeds" in facts["compared"] and "1 TFLOP" in facts["compared"]
    assert facts["lowest mean"].startswith("p 0.5: held-out loss 0.1100 ± 0.0141 (n = 2), 0.4100 below p 1")
    # differences .40 and .42: their mean is 41 times its error of .01, and t with one degree of freedom is 12.706
    assert "p 0.5" in facts["decided"] and "0.1271" in facts["decided"] and found.command == ""
    close = [*clear[:2], trial("002", {"patches.p": 1.0}, 0.12), trial("003", {"patches.p": 1.0}, 0.16, 1)]
    found = summary(close)  # differences .02 and .04: mean .03, standard deviation .0141
    # t .0141 / sqrt(n) is .0450 for 3 seeds, .0225 for 4
    assert "4 seeds" in found.advice and found.command == f"{COMMAND} --restore --add-seeds 2"
    # the key explains more than chance, and its two values differ by less than a pair of settings must
    losses = [(0.5, [0.096, 0.080, 0.113]), (1.0, [0.124, 0.173, 0.150])]
    near = [trial(f"{p}-{n}", {"patches.p": p}, loss, n) for p, values in losses for n, loss in enumerate(values)]
    assert key_effects(near, ["patches.p"], "held_out_loss")[0].is_seen
    assert [fact.value for fact in summary(near).facts if fact.name == "decided"] == ["Nothing yet."]
    found = summary(clear[::2])  # one seed of each
    assert found.command == f"{COMMAND} --restore --add-seeds 2" and "chance" in found.facts[-1].value
    assert summary(clear[:1]).command == summary(close, scheduler={"kind": "asha"}).command == ""
    parse(shlex.split(found.command)[1:])


def test_command_of_a_search_is_the_recorded_one() -> None:
    search = {"space": {"patches.p": {"grid": [0.5]}}, "budget": {"flops": 1e12}, "name": "p", "recipe": "base.yaml"}
    card = SearchCard.model_validate({"run_id": "0", "images": [], "search": search, "dataset_fingerprint": "a"})
    assert tune_command(card.model_copy(update={"command": COMMAND}), "other", None) == COMMAND
    for command in ("", "patchloom demo"):
        line = tune_command(card.model_copy(update={"command": command}), "my search", "data")
        assert shlex.split(line) == ["patchloom", "tune", "SEARCH.yaml", "--data", "data", "--out", "my search"]


def test_parallel_coordinates_are_shown_where_they_say_more_than_the_table() -> None:
    by_p = [trial(f"{n:03d}", {"patches.p": n / 8}, 0.1 * n, flops=1e12 * n) for n in range(1, 9)]
    assert parallel_coordinates(by_p[:6], ["patches.p"], "held_out_loss") is None
    plot = parallel_coordinates(by_p, ["patches.p", "seed"], "held_out_loss")
    assert plot is not None and plot.plot.count("data-trial=") == 8
    assert re.findall('font-weight="600">(.*?)<', plot.plot) == ["p", "TFLOP", "held-out loss"]  # one key varies
    both = [trial(f"{n:03d}", {"patches.p": n % 2, "model.width": n // 2}, 0.1) for n in range(4)]
    assert parallel_coordinates(both, ["patches.p", "model.width"], "held_out_loss") is not None
    assert parallel_coordinates(both[:2], ["patches.p", "model.width"], "held_out_loss") is None


def test_summary_states_its_cost_and_the_page_what_each_trial_spent(tmp_path: Path) -> None:
    spent = {1.0: (608, 5e12, 0.1), 0.5: (704, 2e12, 0.2), 0.25: (688, 1e12, 0.3)}
    rows = [
        trial(f"{n:03d}", {"patches.p": p}, loss, images_seen=images, flops=flops)
        for n, (p, (images, flops, loss)) in enumerate(spent.items())
    ]
    text = summary(rows).facts[2].value
    assert "608 counted images and 5 TFLOP" in text
    assert "2.5 times the FLOPs of p 0.5 and 5 times the FLOPs of p 0.25" in text
    assert cost_of_best(ranked(rows[:2])).count("2.5 times") == 1  # the second is the cheapest
    assert cost_of_best(ranked([rows[0].model_copy(update={"flops": None})])) == ""
    search = {"space": {"patches.p": {"grid": [1.0, 0.5, 0.25]}}, "budget": {"images": 600}, "name": "spent",
              "recipe": "base.yaml"}  # fmt: skip
    write_json(tmp_path / "search.json", {"format_version": 2, "kind": "search", "run_id": "0", "images": [],
                                          "search": search, "dataset_fingerprint": "a"})  # fmt: skip
    write_trials(Folder.at(tmp_path), rows)
    for row in rows:
        (tmp_path / "trials" / row.name).mkdir(parents=True)
        write_progress(tmp_path / "trials" / row.name, [line(row.images_seen, row.held_out_loss or 0.0)])
    page = str(search_section(tmp_path))
    assert "608 to 704" in page and "budget of 600 images" in page and "1 to 5" in page
    for images in ("608", "704", "688"):  # in the table of settings
        assert f"<td>{images}</td>" in page


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ((0.9, 0.6, 0.5, 0.4), "agrees with"),
        ((0.1, 0.2, 0.3, 0.4), "is the reverse of"),
        ((0.9, 0.5, 0.6, 0.4), "is neither shown"),
    ],
)
def test_order_of_p_is_compared_with_the_paper(losses: tuple[float, ...], text: str) -> None:
    trials = [trial(f"{n:03d}", {"patches.p": p}, loss) for n, (p, loss) in enumerate(zip(RATES, losses, strict=True))]
    equal = compare_at_equal_cost(trials, "images_seen")
    assert equal is not None
    assert f"order of p {text}" in compared_with_paper(equal) and "14.51 at p = 0" in compared_with_paper(equal)


def test_page_shows_finished_stopped_and_failed_trials(tmp_path: Path) -> None:
    """Finished, stopped and failed trials, several keys, drawn values, and a final distance."""
    space = {"patches.p": {"grid": [0.5, 1.0]}, "optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    search = {"space": space, "metric": "held_out_loss", "budget": {"flops": 1e12}, "name": "both",
              "recipe": "base.yaml", "searcher": "tpe", "trials": 6, "scheduler": {"kind": "asha"}}  # fmt: skip
    write_json(tmp_path / "search.json", {"format_version": 2, "kind": "search", "run_id": "0", "images": [],
                                          "search": search, "dataset_fingerprint": "a"})  # fmt: skip
    rows = [
        trial(f"{n:03d}", {"patches.p": p, "optimizer.lr": lr}, loss, final_distance=loss * 2)
        for n, (p, lr, loss) in enumerate(((0.5, 1e-3, 0.2), (1.0, 2e-3, 0.3), (0.5, 5e-3, 0.4), (1.0, 9e-3, 0.5)))
    ]
    rows.append(trial("004", {"patches.p": 0.5, "optimizer.lr": 1e-4}, 0.9, status="stopped"))
    rows.append(TrialRow(name="005", settings={"patches.p": 1.0}, status="failed", error="<bad> & so"))
    write_trials(Folder.at(tmp_path), rows)
    for row in rows[:5]:
        (tmp_path / "trials" / row.name).mkdir(parents=True)
        points = [line(images, (row.held_out_loss or 0.0) + 10 / images) for images in (25, 50, 100)]
        write_progress(tmp_path / "trials" / row.name, points)
    assert len(held_out_curve(tmp_path, rows[0])) == 3
    page = str(search_section(tmp_path))
    assert page.count('<g class="point">') == 5  # every trial that has a number
    assert "&lt;bad&gt; &amp; so" in page and "<bad>" not in page
    headings = re.findall("<h3>(.*?)</h3>", page)
    assert len(headings) == 7  # frontier, equal cost, curves, importance, proxies, settings, not tried
    for text in ("0.9000", "equal FLOPs", "equal updates", "equal counted images"):
        assert text in page
    write_trials(Folder.at(tmp_path), rows[5:])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        search_section(tmp_path)


def test_search_of_an_older_format_is_refused_whatever_its_fields(tmp_path: Path) -> None:
    write_json(tmp_path / "search.json", {"format_version": 1, "kind": "search", "run_id": "0"})
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as refused:
        search_section(tmp_path)
    assert "SearchCard" not in str(refused.value)  # the format is the problem, not a field


def test_a_failed_repeat_leaves_a_setting_out_of_the_test() -> None:
    """p 1 has the lower mean, but one of its trainings failed; p 0.5 leads p 0.25 by .02 with an error of .001."""
    losses = [(0.5, [0.300, 0.301, 0.299]), (0.25, [0.320, 0.321, 0.319]), (1.0, [0.250, 0.251])]
    trials = [
        trial(f"{p}-{repeat}", {"patches.p": p}, loss, repeat)
        for p, values in losses
        for repeat, loss in enumerate(values)
    ]
    trials.append(trials[-1].model_copy(update={"name": "failed", "repeat": 2, "status": "failed"}))
    facts = {fact.name: fact.value for fact in summary(trials).facts}
    assert "3 settings" in facts["compared"]
    assert facts["lowest mean"].startswith("p 0.5: held-out loss 0.3000 ± 0.0010 (n = 3), 0.0200 below p 0.25")
    assert "p 0.5 is the best" in facts["decided"] and "p 1 (0.2505" in facts["not decided"]


def test_only_trials_of_the_whole_budget_are_compared() -> None:
    trials = [
        trial(f"{p}-{share}-{repeat}", {"patches.p": p, "budget.share": share}, loss / share + repeat / 1000, repeat)
        for p, loss in ((0.5, 0.2), (1.0, 0.21))
        for share in (0.5, 1)
        for repeat in (0, 1)
    ]
    facts = {fact.name: fact.value for fact in summary(trials).facts}
    assert "up to 1 TFLOP" in facts["compared"]
    assert "0.0100 below p 1, share 1" in facts["lowest mean"]
    # the same seeds, and equal differences: no error is left
    assert "p 0.5, share 1 is the best" in facts["decided"]


def test_values_of_a_key_are_listed_in_order_and_as_they_are() -> None:
    def compared(key: str, values: list[Any]) -> str:
        trials = [trial(f"{n:03d}", {key: value}, 0.1 + n) for n, value in enumerate(values)]
        return next(fact.value for fact in summary(trials).facts if fact.name == "compared")

    assert "(False, True)" in compared("model.class_conditional", [True, False])
    assert "(200, 1000, 20000, all)" in compared("data.images", [20000, None, 1000, 200])
    assert "(12345, 300000)" in compared("train.images", [300000, 12345])
