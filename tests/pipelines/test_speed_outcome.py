"""The comparison of training speeds: its record, and what its page says of numbers that are known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchloom.errors import UserError
from patchloom.pipelines.pages.html import Picture
from patchloom.pipelines.reproduce.speed import gathered
from patchloom.pipelines.reproduce.speed_outcome import Cell, answer, measures, outcome_of
from patchloom.pipelines.tune.ranking import with_spread
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.evaluation import EvaluationIdentity, EvaluationResult
from patchloom.platform.records.run import ProgressLine, training_seconds, write_progress
from patchloom.platform.records.search import TrialRow
from patchloom.platform.records.speed import MeasuredSamples, SpeedResults, SpeedTrial

ORIGIN: dict[str, Any] = {
    "date": "2026-01-01", "code_version": "0.2.0", "code_commit": "a" * 40, "machine": "two cores", "small": True,
    "recipe": "demo_pixels", "data": "100 images", "held_out_images": 10, "sampler": "heun, 12 steps",
}  # fmt: skip
FULL_LOSSES, WHOLE_LOSSES = [0.399, 0.4, 0.401], [0.25, 0.251, 0.249]


def trained(setting: str, share: float, losses: list[float]) -> list[SpeedTrial]:
    """Trainings of one setting, of which all metrics are the loss."""

    def metrics(loss: float, count: int) -> MeasuredSamples:
        return MeasuredSamples(count=count, features="inception", metrics={"kid": loss, "fid": 100 * loss})

    return [
        SpeedTrial(
            name=f"{setting}-{share}-{repeat}", setting=setting, share=share, repeat=repeat, images=1000, flops=1e12,
            seconds=600 * share, trial_seconds=620 * share, held_out_loss=loss, samples=metrics(loss, 1000),
            end=metrics(loss, 5000) if share == 1 else None,
        )
        for repeat, loss in enumerate(losses)
    ]  # fmt: skip


def half_and_whole(half: list[float]) -> list[SpeedTrial]:
    return [*trained("p 0.5", 0.5, half), *trained("p 0.5", 1, WHOLE_LOSSES), *trained("p 1", 1, FULL_LOSSES)]


@pytest.mark.parametrize(
    ("half", "verdict", "short"),
    [
        ([0.299, 0.3, 0.301], "better", "yes"),
        ([0.401, 0.4, 0.399], "undecided", "undecided"),
        ([0.5] * 3, "worse", "no"),
    ],
)
def test_twice_as_fast_compares_half_of_the_time_with_all_of_it(half: list[float], verdict: str, short: str) -> None:
    """Differences of .1 and of 0, with values that deviate by .001."""
    timed = measures(half_and_whole(half))
    measured = timed[0]
    at: dict[tuple[str, float], Cell] = {(cell.setting, cell.share): cell for cell in measured.cells}
    assert measured.verdict(at["p 0.5", 0.5], at["p 1", 1])[0] == verdict
    assert measured.table().header[1:] == ["5m00s", "10m00s"]
    assert measured.table().rows[1] == ["p 1", "", "0.4000 ± 0.0010"]
    assert len(measured.winners()) == 2 and "p 0.5 (decided)" in measured.winners()[1]
    assert short in answer(timed)[0] and len(answer(timed)) == 3


def test_a_time_that_was_not_half_is_not_called_so() -> None:
    half = [trial.model_copy(update={"seconds": 570.0}) for trial in trained("p 0.5", 0.5, [0.299, 0.3, 0.301])]
    timed = measures([*half, *trained("p 0.5", 1, WHOLE_LOSSES), *trained("p 1", 1, FULL_LOSSES)])
    assert "1.05 times" in answer(timed)[0] and "twice" not in answer(timed)[0]


def test_equal_settings_are_rarely_decided_though_losses_spread_less_after_more_time() -> None:
    """Four settings, three seeds, and spreads of 3, 1.5 and 1 after a quarter, half and all of the time."""
    generator, count = np.random.default_rng(0), 1000
    winners, verdicts = np.zeros(3), 0
    for _ in range(count):
        trials = [
            trial
            for share, spread in ((0.25, 3.0), (0.5, 1.5), (1.0, 1.0))
            for setting in ("p 1", "p 0.5", "p 0.25", "p 0.5, schedule progressive")
            for trial in trained(setting, share, list(10 + spread * generator.normal(size=3)))
        ]
        measured = measures(trials)[0]
        winners += ["(decided)" in text for text in measured.winners()]
        at = {(cell.setting, cell.share): cell for cell in measured.cells}
        verdicts += measured.verdict(at["p 0.5", 0.5], at["p 1", 1])[0] != "undecided"
    noise = 3 * math.sqrt(0.05 * 0.95 / count)
    assert max(winners) / count < 0.05 + noise and verdicts / count < 0.05 + noise
    assert verdicts / count > 0.05 - noise  # the test uses what it may


def test_trainings_without_a_common_distance_are_refused() -> None:
    other = trained("p 1", 1, FULL_LOSSES)
    other[0] = other[0].model_copy(update={"samples": MeasuredSamples(count=9, features="colours", metrics={})})
    for trials in ([], other):
        with pytest.raises(UserError):
            measures(trials)


def test_the_spread_has_two_digits() -> None:
    assert with_spread([0.00028, 0.00031, 0.00034]) == "0.000310 ± 0.000030"
    assert with_spread([10.0, 20.0, 30.0]) == "20 ± 10" and with_spread([0.5]) == "0.5"
    assert with_spread([0.301, 0.303, 0.305], 1) == "0.303 ± 0.002"


def test_no_answer_without_the_trainings_that_it_compares() -> None:
    assert answer(measures(trained("p 0.25", 1, WHOLE_LOSSES))) == []


def test_a_page_is_made_from_the_record_alone(tmp_path: Path) -> None:
    results = SpeedResults(**ORIGIN, by_time=half_and_whole([0.3, 0.3, 0.3]), by_images=trained("p 1", 1, FULL_LOSSES))
    results.write(Folder.at(tmp_path))
    assert SpeedResults.read(Folder.at(tmp_path)) == results
    outcome = outcome_of(results, Picture(tmp_path / "speed.png", "samples"))
    assert [number.value for number in outcome.numbers] == ["12", "12", "1h48m", "1,000"]  # 12 trainings: 6510 s
    ends = next(one for one in outcome.findings if one.title.startswith("5,000"))
    assert ends.table.rows == [["p 0.5", "25.00 ± 0.10", "0.2500 ± 0.0010"], ["p 1", "40.00 ± 0.10", "0.4000 ± 0.0010"]]
    assert "<svg" in outcome.figures[0][0]


def test_the_time_of_steps_is_that_between_lines() -> None:
    def line(images: int, rate: float) -> ProgressLine:
        return ProgressLine(step=images, images_seen=images, images_per_second=rate)

    lines = [line(100, 10), line(200, 100), line(400, 100)]  # 10 s, 1 s and 2 s
    assert training_seconds(lines) == pytest.approx([10, 11, 13])
    assert training_seconds([]) == []


def test_a_training_is_read_from_its_folder_and_its_samples(tmp_path: Path) -> None:
    run = tmp_path / "trials" / "004"
    (run / "samples").mkdir(parents=True)
    write_progress(
        run,
        [
            ProgressLine(step=1, images_seen=100, images_per_second=50, held_out_loss=0.9),
            ProgressLine(step=2, images_seen=200, images_per_second=25),
            ProgressLine(step=3, images_seen=300, images_per_second=100, held_out_loss=0.3),
        ],
    )
    identity = EvaluationIdentity(features="inception", n_samples=1000, reference="b" * 64)
    result = EvaluationResult(metrics={"kid": 0.05, "kid_interval": [0.04, 0.06]}, identity=identity, digest="c" * 8)
    (run / "samples" / "metrics.json").write_text(result.to_json())
    settings = {"budget.share": 0.5, "patches.p": 0.25}
    row = TrialRow(name="004", settings=settings, repeat=1, status="finished", seconds=12, images_seen=300, flops=7e9)
    found = gathered(run, row, tmp_path / "samples" / "004")
    assert (found.setting, found.share, found.repeat, found.images, found.flops) == ("p 0.25", 0.5, 1, 300, 7e9)
    assert (found.seconds, found.trial_seconds, found.held_out_loss) == (pytest.approx(7), 12, 0.3)
    assert [(point.seconds, point.images, point.loss) for point in found.held_out] == [(2, 100, 0.9), (7, 300, 0.3)]
    assert found.samples.metrics == {"kid": 0.05} and found.end is None
