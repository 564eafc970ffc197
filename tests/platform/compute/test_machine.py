"""The machine: its load, the straggler loss of workers, and the memory that a process keeps."""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from own_workers import Together

from patchloom.pipelines.train.hooks.speed import SpeedHook
from patchloom.pipelines.train.timer import WaitTimer
from patchloom.platform.compute.machine import LOAD_NAMES, system_load

OF_ALL = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
}
OF_A_GPU = r"gpu_\d+_(utilization_percentage|memory_usage_percentage|power_usage_watts)"


def test_the_load_equals_that_of_the_machine() -> None:
    before, load, after = psutil.net_io_counters(), system_load(), psutil.net_io_counters()
    assert load.keys() >= OF_ALL
    assert all(re.fullmatch(OF_A_GPU, name) for name in load.keys() - OF_ALL)
    assert all(0 <= value <= 100 for name, value in load.items() if name.endswith("percentage"))
    memory, disk = psutil.virtual_memory(), os.statvfs("/")
    assert 0 < load["system_memory_usage_megabytes"] < memory.total / 1e6
    assert load["system_memory_usage_percentage"] == pytest.approx(memory.percent, abs=5)
    assert load["disk_available_megabytes"] == pytest.approx(disk.f_bavail * disk.f_frsize / 1e6, rel=0.05)
    assert before.bytes_recv <= round(load["network_receive_megabytes"] * 1e6) <= after.bytes_recv
    assert before.bytes_sent <= round(load["network_transmit_megabytes"] * 1e6) <= after.bytes_sent


def test_values_that_the_machine_does_not_provide_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))  # as in a sandbox
    assert {name for name in system_load() if not re.fullmatch(OF_A_GPU, name)} == {
        "disk_usage_percentage",
        "disk_available_megabytes",
    }


def test_the_cpu_load_is_measured_since_the_last_call() -> None:
    system_load()
    until = time.process_time() + 0.4
    while time.process_time() < until:
        pass
    share = 100 / (psutil.cpu_count() or 1)
    assert system_load()["cpu_utilization_percentage"] > 0.3 * share


def waits_of(reduce_waits: list[list[float]], buckets: int) -> list[dict[str, float]]:
    """What the speed hooks of so many workers make of these seconds, asked twice. A step waits once for each bucket."""

    def work(rank: int, reduce: Any) -> list[dict[str, float]]:
        timer = WaitTimer(torch.device("cpu"))
        timer._waits["reduce"] = [(10.0, 10.0 + seconds) for seconds in reduce_waits[rank]]
        timer._waits["data"] = [(1.0, 1.25), (2.0, 2.5)]
        hook = SpeedHook.__new__(SpeedHook)
        worker: Any = SimpleNamespace(rank=rank, count=len(reduce_waits), reduce=reduce)
        state = SimpleNamespace(gradients=SimpleNamespace(buckets=[torch.zeros(1)] * buckets))
        run: Any = SimpleNamespace(device=timer.device, timer=timer, worker=worker, state=state)
        hook.run = run
        first, second = hook._waits(), hook._waits()
        assert second == {"data": 0.0, "reduce": 0.0, "straggler": 0.0}
        return [first]

    return [first for (first,) in Together(len(reduce_waits)).run(work)]


@pytest.mark.parametrize(
    ("waits", "buckets", "lost"),
    [
        ([[0.1, 0.3], [0.3, 0.1]], 1, 0.2),  # 0.1 a step: one of two waits 0.2 s for the other
        ([[0.1, 0.3], [0.3, 0.1]], 2, 0.0),  # as long for both in their only step
        ([[0.1, 0.1, 0.2, 0.0], [0.3, 0.3, 0.0, 0.2]], 2, 0.2),  # one waits 0.4 s in the first of two steps
        ([[0.2, 0.2], [0.2, 0.2]], 1, 0.0),  # as long for all: the all-reduce itself
        ([[0.0, 0.0], [0.4, 0.2], [0.2, 0.4]], 1, 0.4),  # the first is late twice
        ([[0.5, 0.7]], 1, 0.0),  # nobody to wait for
        ([[], []], 1, 0.0),
    ],
)
def test_straggler_loss_is_the_wait_beyond_that_of_the_slowest_worker(
    waits: list[list[float]], buckets: int, lost: float
) -> None:
    reported = waits_of(waits, buckets)
    for mine, said in zip(waits, reported, strict=True):
        assert said["straggler"] == pytest.approx(lost, abs=1e-6)
        assert said["reduce"] == pytest.approx(sum(mine)) and said["data"] == pytest.approx(0.75)


FAULTS = """
import resource, sys, torch
from patchloom.platform.compute.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
sizes = [1 << n for n in range(16, 25)]  # 256 KiB to 64 MiB of float32

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

rounds = []
for _ in range(11):
    before = faults()
    [torch.ones(size) for size in sizes]
    rounds.append(faults() - before)
print(sorted(rounds)[5])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_memory_of_freed_tensors_is_reused() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(*how: str) -> int:
        command = [sys.executable, "-c", FAULTS, *how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    kept, given_back = faults("keep"), faults("default")
    if given_back == 0:
        pytest.skip("this kernel counts no page faults")
    assert kept < given_back / 10  # of a usual round; its tensors have 32,000 pages of 4 KiB, or 64 huge ones


def test_every_load_has_a_place_among_those_of_all_nodes() -> None:
    assert set(system_load()) <= set(LOAD_NAMES)
