"""Metrics: off without a session of Ray, and without cost there."""

import time

from patchloom.platform.compute.metrics import LOSS, SWITCH, MetricRecorder, metrics_are_on


def test_metrics_are_off_in_a_session_on_this_machine(ray_cluster: None) -> None:
    import os

    assert os.environ[SWITCH] == "0" and not metrics_are_on()


def test_a_metric_that_is_off_costs_less_than_ten_microseconds() -> None:
    recorder = MetricRecorder("train", "tiny", "run", "0")
    start = time.perf_counter()
    for _ in range(1000):
        recorder.record(LOSS, 1.0)
    assert (time.perf_counter() - start) / 1000 < 1e-5
