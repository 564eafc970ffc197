"""Ranking: means over repeats, with their spread; what failed comes last."""

from patchloom.pipelines.tune.ranking import ranked
from patchloom.platform.records.search import TrialRow


def trial(number: int, p: float, loss: float | None) -> TrialRow:
    status = "finished" if loss is not None else "failed"
    row = {"name": f"{number:03d}", "settings": {"patches.p": p}, "status": status, "held_out_loss": loss}
    return TrialRow.model_validate(row)


def test_the_mean_decides_and_not_the_luckiest_repeat() -> None:
    lucky = [trial(0, 0.5, 0.1), trial(1, 0.5, 0.9)]
    steady = [trial(2, 1.0, 0.3), trial(3, 1.0, 0.5)]
    first, second = ranked([*lucky, *steady])
    assert first.settings == {"patches.p": 1.0} and abs(first.mean - 0.4) < 1e-12
    assert second.spread is not None and abs(second.spread - 0.8 / 2**0.5) < 1e-12  # of .1 and .9, n - 1
    assert first.value_of_n() == "0.4000 ± 0.1414 (n = 2)" and first.title == "p 1"


def test_a_setting_with_a_failed_repeat_comes_after_whole_ones() -> None:
    found = ranked([trial(0, 0.25, 0.1), trial(1, 0.25, None), trial(2, 0.5, 0.7), trial(3, 1.0, None)])
    assert [setting.settings["patches.p"] for setting in found] == [0.5, 0.25]
    assert found[0].spread is None and found[0].value() == "0.7000"
