"""Progress: what a person reads of it."""

import pytest

from patchloom.platform import progress
from patchloom.platform.progress import Meter, clock


@pytest.mark.parametrize(("seconds", "words"), [(0, "0s"), (59.4, "59s"), (125, "2m05s"), (3720, "1h02m")])
def test_times_are_short(seconds: float, words: str) -> None:
    assert clock(seconds) == words


def test_a_rate_counts_the_work_of_this_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter(1000, "images")
    meter.begin(400)  # an earlier call did these
    now[0] = 130.0  # starting up took this long
    meter.update(500)
    assert meter.words() == "500/1,000 images"
    now[0] = 140.0
    meter.update(700, "loss 0.5")
    assert meter.words() == "700/1,000 images  20.0/s  ETA 15s  loss 0.5"
    now[0] = 155.0
    meter.update(1000)
    assert meter.words() == "1,000/1,000 images  20.0/s"
