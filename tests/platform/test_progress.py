"""Progress: durations, rates, and the lines that are printed."""

import re
import time

import pytest
from rich.console import Console

from patchloom.platform import progress
from patchloom.platform.progress import Meter, aligned, clock, fitted, say, with_descriptions, without_results
from patchloom.platform.progress import progress as show_progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (125, "2m05s"),
        (3599.6, "1h00m"),
        (3720, "1h02m"),
        (36_000, "10h00m"),
    ],
)
def test_durations_are_short_and_rounded_minutes_are_minutes(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_columns_of_a_table_are_as_wide_as_their_longest_cell() -> None:
    assert aligned([("JOB", "STATE"), ("a", "running"), ("longer", "")]) == "JOB     STATE\na       running\nlonger"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 20 columns."""
    monkeypatch.setattr(progress, "console", Console(force_terminal=True, width=20))


def test_tables_fit_a_narrow_terminal(narrow: None) -> None:
    rows = [("NAME", "SIDE", "QUALITY"), ("first", "64", "a value of 12"), ("second", "64", "")]
    assert fitted(rows, ("SIDE",)) == "NAME    QUALITY\nfirst   a value of 12\nsecond"
    assert fitted(rows) == aligned(rows)
    described = with_descriptions([("first", "1 GPU", "words of a title"), ("second", "2 GPU", "more")])
    assert described == "first   1 GPU\n      words of a\n      title\nsecond  2 GPU\n      more"


def test_the_least_important_parts_of_progress_are_left_out_first() -> None:
    meter = Meter(1000, "images")
    meter.update(500, "loss 0.5", "", "16px 0.4")
    assert meter.describe() == "500/1,000 images  loss 0.5  16px 0.4"
    assert meter.describe(30) == "500/1,000 images  loss 0.5"
    assert meter.describe(5) == "500/1,000 images"


def test_the_rate_counts_only_the_work_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter(1000, "images")
    meter.begin(400)  # done by an earlier call
    now[0] = 130.0  # the start took 30 s
    meter.update(500)
    assert meter.describe() == "500/1,000 images"
    now[0] = 140.0
    meter.update(700, "loss 0.5")
    assert meter.describe() == "700/1,000 images  20.0/s  ETA 15s  loss 0.5"
    now[0] = 155.0
    meter.update(1000)
    assert meter.describe() == "1,000/1,000 images  20.0/s"


def test_the_rate_is_work_per_time() -> None:
    meter = Meter(1000, "images")
    assert meter.rate == 0
    before = time.monotonic()
    meter.update(100)
    after = time.monotonic()
    time.sleep(0.05)
    meter.update(150)
    shortest, rate, longest = time.monotonic() - after, meter.rate, time.monotonic() - before
    assert 50 / longest * 0.9 < rate <= 50 / shortest * 1.1


def test_a_job_ends_with_one_line_with_its_duration(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("training", 5000, "images") as meter:
        meter.update(2500)
        meter.update(5000, "loss 0.3")
    assert re.fullmatch(r"  training: 5,000 images in \ds\n", capsys.readouterr().out)


def test_brackets_are_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    say("[red]data[/red] \\[x] 3/4")
    assert capsys.readouterr().out == "[red]data[/red] \\[x] 3/4\n"


def test_results_of_a_part_are_not_printed_and_its_messages_are(capsys: pytest.CaptureFixture[str]) -> None:
    with without_results():
        say("a message")
        say("the result of a part", is_result=True)
    say("the result", is_result=True)
    assert capsys.readouterr().out.splitlines() == ["a message", "the result"]
