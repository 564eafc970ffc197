"""Scaling: closed forms, and the steps of one, two and four workers that were measured."""

import json
from pathlib import Path

import pytest

from patchloom.models.cost import estimated_gain
from patchloom.models.patches import PatchSchedule, PatchSize, patch_schedule
from patchloom.models.scaling import Workers, expected_slowest, images_per_second, step_seconds, waiting_seconds
from patchloom.models.step_plan import StepSettings

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
FAST = 1e18  # bytes a second: gradients cost nothing


def test_a_ring_sends_the_gradients_once_each_way_between_two_and_twice_among_many() -> None:
    assert Workers(1, 1e9).reduce_seconds(1e9) == 0
    assert Workers(2, 1e9).reduce_seconds(1e9) == pytest.approx(1.0)
    assert Workers(1000, 1e9).reduce_seconds(1e9) == pytest.approx(2.0, rel=2e-3)


def test_messages_pass_a_tree_up_and_down_for_each_bucket() -> None:
    assert Workers(1, 1e9, latency_s=0.5).reduce_seconds(0, buckets=8) == 0
    assert Workers(8, 1e9, latency_s=0.5).reduce_seconds(0) == pytest.approx(3.0)
    assert Workers(5, 1e9, latency_s=0.5).reduce_seconds(0, buckets=4) == pytest.approx(12.0)


def test_a_step_waits_for_what_the_backward_pass_does_not_hide() -> None:
    assert waiting_seconds(6.0, 10.0, 1) == 6.0  # all after the backward pass
    assert waiting_seconds(6.0, 10.0, 3) == pytest.approx(2.0)  # the last of three buckets
    assert waiting_seconds(30.0, 9.0, 3) == pytest.approx(24.0)  # sending starts after the first third of 9 s
    for reduce_s, backward_s, buckets in ((1.0, 5.0, 4), (5.0, 5.0, 4), (9.0, 5.0, 8)):  # bucket by bucket
        end = 0.0
        for bucket in range(buckets):
            ready = (bucket + 1) * backward_s / buckets
            end = max(end, ready) + reduce_s / buckets
        assert waiting_seconds(reduce_s, backward_s, buckets) == pytest.approx(end - backward_s)


@pytest.mark.parametrize(
    ("draw", "waits"),
    [
        ("shared", (max(0.5, 4 - 16 / 3 * 7 / 8) + (4 - 8 / 3 * 7 / 8)) / 2),  # backward passes of 16/3 or 8/3 s
        ("stratified", 4 - 4 / 3 * 7 / 8),  # of the smallest size, with half of the blocks
        ("independent", max(0.5, 4 - 16 / 3 * 7 / 8) * 3 / 4 + (4 - 8 / 3 * 7 / 8) / 4),  # of the slower worker
    ],
)
def test_steps_overlap_the_sums_of_their_last_group(draw: str, waits: float) -> None:
    full, half = (PatchSize(pixels, 0.5, 1) for pixels in (64, 32))
    schedule = PatchSchedule((full, half))
    cost, workers = {64: 8.0, 32: 4.0}, Workers(2, 1.0)
    alone = step_seconds(schedule, draw, 1, cost, 0.0, workers)
    assert alone == pytest.approx(7.0 if draw == "independent" else 6.0)
    assert step_seconds(schedule, draw, 1, cost, 4.0, workers) == pytest.approx(alone + 4)
    assert step_seconds(schedule, draw, 1, cost, 4.0, workers, buckets=8) == pytest.approx(alone + waits)


def test_the_slowest_of_many_draws() -> None:
    die = {float(face): 1 / 6 for face in range(1, 7)}
    assert expected_slowest(die, 1) == pytest.approx(3.5)
    assert expected_slowest(die, 2) == pytest.approx(161 / 36)  # the larger of two dice
    assert expected_slowest({0.0: 0.5, 1.0: 0.5}, 10) == pytest.approx(1 - 2**-10)


def test_steps_of_cost_as_pixels_have_the_papers_gains() -> None:
    cost = {64: 1.0, 32: 1 / 4, 16: 1 / 16}
    half, full = patch_schedule(64, 0.5), patch_schedule(64, 1.0)
    for count in (1, 64):
        workers = Workers(count, FAST)
        seconds = {p: step_seconds(s, "shared", 8, cost, 1e9, workers) for p, s in ((0.5, half), (1.0, full))}
        rates = [images_per_second(schedule, 8, workers, seconds[p]) for p, schedule in ((0.5, half), (1.0, full))]
        assert seconds[1.0] / seconds[0.5] == pytest.approx(1 / 0.7, rel=1e-6)  # .5 + .3 / 2 + .2 / 4
        assert rates[0] / rates[1] == pytest.approx(1.9 / 0.7, rel=1e-6)  # 2.71
    many = Workers(1024, FAST)
    assert step_seconds(half, "independent", 8, cost, 0, many) == pytest.approx(8.0)  # somebody has a full image


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cost_of_independent_draws_agrees_with_planned_steps(ranks: int) -> None:
    schedule = patch_schedule(64, 0.25)
    method = StepSettings(
        seed=0, schedule=schedule, updates=10**6, batch_size=16, block_size=2, lr=1e-4, lr_rampup_images=0,
        draw="independent", emulated_ranks=ranks,
    )  # fmt: skip
    cost = {64: 1.0, 32: 0.3, 16: 0.1}
    seconds = step_seconds(schedule, "independent", 16 // ranks, cost, 0, Workers(ranks, FAST))
    full = step_seconds(patch_schedule(64, 1.0), "shared", 16 // ranks, cost, 0, Workers(ranks, FAST))
    assert full / seconds == pytest.approx(estimated_gain(method, cost, ranks).per_update, rel=0.05)  # of 4,000 steps


def measured_workers() -> dict[str, float]:
    """The newest kept measurement of 1, 2 and 4 workers, by name, with `cpus`."""
    for path in sorted(RESULTS.glob("benchmark-*.json"), reverse=True):
        record = json.loads(path.read_text())
        if "train.workers" in record["subjects"]:
            findings = record["subjects"]["train.workers"]["findings"]
            seconds = {
                found["what"]: found["measured"]["median"] for found in findings if found["unit"] in ("s", "bytes")
            }
            return seconds | {"cpus": record["machine"]["cpus"]}
    pytest.fail(f"no measurement of workers is kept in {RESULTS}: patchloom benchmark train.workers --out {RESULTS}")


MEASURED = ("1 worker, shared", "2 workers, p = 1", "2 workers, shared", "2 workers, stratified",
            "2 workers, independent", "4 workers, p = 1", "4 workers, shared")  # fmt: skip


@pytest.mark.parametrize("setting", MEASURED)
def test_measured_steps_agree_with_the_estimate(setting: str) -> None:
    measured = measured_workers()
    count = int(setting[0])
    draw = setting.partition(", ")[2]
    schedule = patch_schedule(64, 1.0 if draw == "p = 1" else 0.5)
    whose = "one worker" if count == 1 else "each of two workers"
    cost = {size: measured[f"a crop of {size} pixels, {whose}"] for size in (64, 32, 16)}
    gradients = measured["gradients"]
    workers = Workers(
        count, gradients / measured["an all-reduce of two workers"], processors=int(min(count, measured["cpus"]))
    )
    how = "shared" if draw == "p = 1" else draw
    estimated = step_seconds(schedule, how, 16 // count, cost, gradients, workers)
    assert estimated == pytest.approx(measured[f"a step of {setting}"], rel=0.2)
