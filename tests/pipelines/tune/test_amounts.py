"""Amounts of data: what the seeds decide at each number of images, and what the page of a search shows of it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchloom.pipelines.tune.amounts import AmountsOfData, amounts_of_data, chance_by_amount, decided_by_amount
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.ranking import setting_title
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import write_json
from patchloom.platform.records.run import ProgressLine, write_progress
from patchloom.platform.records.search import TrialRow, read_trials, write_trials

# the seeds of 10 images differ by 1 and .9: mean .95, standard error .05, so t is 19, and 12.706 decides; those of 40
# images by .1 and 0
LOSSES = {(10, 0.5): (1.0, 1.1), (10, 1): (2.0, 2.0), (40, 0.5): (1.1, 1.1), (40, 1): (1.0, 1.1)}


def rows_of(losses: dict[tuple[int | None, float], tuple[float, ...]], **more: Any) -> list[TrialRow]:
    found = []
    for (images, p), values in losses.items():
        settings = {"data.images": images, "patches.p": p}
        for repeat, loss in enumerate(values):
            found.append(
                TrialRow(name=f"{len(found):03d}", settings=settings, repeat=repeat, status="finished",
                         held_out_loss=loss, images_seen=100, updates=4, flops=1e9, **more)
            )  # fmt: skip
    return found


def test_each_number_of_images_is_decided_with_its_own_error() -> None:
    amounts = amounts_of_data(rows_of(LOSSES))
    assert amounts is not None and amounts.images == [10, 40] and list(amounts.lines) == ["p 0.5", "p 1"]
    assert amounts.winners("held_out_loss") == {10: "p 0.5", 40: None}
    sentence = decided_by_amount(amounts, "held_out_loss")
    assert sentence.count("undecided") == 1 and sentence.count("(decided)") == 1
    for gap, winner in ((0.63, None), (0.64, "p 1")):  # 12.706 * .05 = .635
        other = amounts_of_data(rows_of({**LOSSES, (40, 0.5): (1.05 + gap, 1.05 + gap)}))
        assert other is not None and other.winners("held_out_loss") == {10: "p 0.5", 40: winner}


def test_equal_lines_seldom_have_a_winner_however_much_each_number_of_images_varies() -> None:
    generator, searches, found = np.random.default_rng(0), 1000, {10: 0, 40: 0, 160: 0}
    spreads = {10: 3.0, 40: 1.0, 160: 0.3}
    for _ in range(searches):
        lines = {p: {images: [TrialRow.model_construct(repeat=seed, held_out_loss=generator.normal(0, spread))
                              for seed in range(3)] for images, spread in spreads.items()} for p in "ab"}  # fmt: skip
        for images, winner in AmountsOfData(lines).winners("held_out_loss").items():
            found[images] += winner is not None
    most = 0.05 + 3 * (0.05 * 0.95 / searches) ** 0.5
    assert all(0 < count / searches < most for count in found.values())


def test_one_seed_decides_nothing_at_any_number_of_images() -> None:
    amounts = amounts_of_data(rows_of({key: values[:1] for key, values in LOSSES.items()}))
    assert amounts is not None and amounts.winners("held_out_loss") == {10: None, 40: None}
    assert "(decided)" not in decided_by_amount(amounts, "held_out_loss")


def test_all_images_are_as_many_as_the_trial_had() -> None:
    rows = [row.model_copy(update={"training_images": 700}) for row in rows_of({(None, 0.5): (1.0,)})]
    amounts = amounts_of_data([*rows_of({(10, 0.5): (1.0,)}), *rows])
    assert amounts is not None and amounts.images == [10, 700] and amounts.winners("held_out_loss") == {}
    assert amounts_of_data(rows) is None and setting_title(rows[0].settings) == "images all, p 0.5"


def test_chance_is_the_mean_share_of_held_out_images() -> None:
    few, many = rows_of({(10, 0.5): (1.0, 1.0)}), rows_of({(40, 0.5): (1.0, 1.0)}, memorised_by_chance=0.25)
    few = [row.model_copy(update={"memorised_by_chance": share}) for row, share in zip(few, (0.5, 0.25), strict=True)]
    amounts = amounts_of_data(few + many)
    assert amounts is not None and chance_by_amount(amounts) == {10: 0.375, 40: 0.25}


@pytest.mark.parametrize("is_measured", [False, True])
def test_page_plots_what_was_measured_over_the_number_of_images(tmp_path: Path, is_measured: bool) -> None:
    search = {"space": {"data.images": {"grid": [10, 40]}, "patches.p": {"grid": [0.5, 1]}}, "budget": {"images": 100},
              "name": "amounts", "recipe": "base.yaml", "repeats": 2, "final": {"features": "colours"}}  # fmt: skip
    write_json(tmp_path / "search.json", {"format_version": 2, "kind": "search", "run_id": "0", "images": [],
                                          "search": search, "dataset_fingerprint": "a"})  # fmt: skip
    measured = {"final_distance": 0.5, "memorised_share": 0.3, "memorised_by_chance": 0.4} if is_measured else {}
    write_trials(Folder.at(tmp_path), rows_of(LOSSES, **measured))
    assert ("memorised_share" in (tmp_path / "trials.jsonl").read_text()) == is_measured
    for row in read_trials(Folder.at(tmp_path)):
        (tmp_path / "trials" / row.name).mkdir(parents=True)
        point = {"step": 4, "updates": 4, "images_seen": 100, "flops": 1e9, "held_out_loss": row.held_out_loss}
        write_progress(tmp_path / "trials" / row.name, [ProgressLine.model_validate(point)])
    page = str(search_section(tmp_path))
    headings = re.findall("<h3>(.*?)</h3>", page)
    assert headings[0] == "Quality over the number of images" and page.count("<figure>") >= 2 + 2 * is_measured
    assert ("Memorised samples" in headings) == is_measured
    assert page.count("<td>30.0%</td>") == page.count("<td>40.0%</td>") == 4 * is_measured  # of each setting
