"""Progress reads well at the edges of its units, and every job ends with one line of what it took."""

import re
import time

import pytest

from patchloom.platform.progress import Meter, clock, progress


@pytest.mark.parametrize(("seconds", "words"), [(59.6, "1m00s"), (60, "1m00s"), (3599.6, "1h00m"), (36_000, "10h00m")])
def test_a_rounded_minute_is_a_minute(seconds: float, words: str) -> None:
    assert clock(seconds) == words


def test_a_rate_is_the_work_over_the_time_it_took() -> None:
    meter = Meter(1000, "images")
    assert meter.rate == 0
    before = time.monotonic()
    meter.update(100)
    after = time.monotonic()
    time.sleep(0.05)
    meter.update(150)
    shortest, rate, longest = time.monotonic() - after, meter.rate, time.monotonic() - before
    assert 50 / longest * 0.9 < rate <= 50 / shortest * 1.1


def test_a_job_ends_with_one_line_of_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 5000, "images") as meter:
        meter.update(2500)
        meter.update(5000, "loss 0.3")
    assert re.fullmatch(r"  training: 5,000 images in \ds\n", capsys.readouterr().out)


def test_brackets_in_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from patchloom.platform.progress import say

    say("[red]data[/red] \\[x] 3/4")
    assert capsys.readouterr().out == "[red]data[/red] \\[x] 3/4\n"
