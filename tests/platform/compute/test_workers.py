"""Workers that meet over gloo: what they agree on before a run, and what happens if one of them hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchloom.errors import WorkersFailed
from patchloom.pipelines.train.agreement import checksum
from patchloom.platform.compute.workers import Worker

SCRIPT = """
import json, sys, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed
from patchloom.errors import UserError, WorkersFailed
from patchloom.pipelines.train import agreement
from patchloom.platform.compute.workers import Worker
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=4)
)
worker, found = Worker(rank, 2, collective_minutes=4 / 60), {}
total = torch.tensor([1.0 + rank])
worker.reduce(total)
found["sum"], found["any"] = total.item(), [worker.any(rank == 1), worker.any(False)]
found["gathered"] = worker.gather(f"worker {rank}")

def begin(*steps):
    run = folder / f"run-{rank}-{len(steps)}"
    for step in steps:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step}" / "checkpoint.json").touch()
    try:
        return str(agreement.starting_checkpoint(worker, run).name)
    except WorkersFailed as error:
        return str(error)

agreement.SHARED_FOLDER_WAIT_S = 0
found["newer on worker 1"] = begin(*([1, 2], [1, 2, 3])[rank])
found["missing on worker 1"] = begin(*([1, 2, 3, 4], [1])[rank])
found["new run"] = agreement.starting_checkpoint(worker, folder / "nothing") is None

torch.manual_seed(rank)
network = torch.nn.BatchNorm2d(3)
with torch.no_grad():
    network.weight.normal_()
optimizer = torch.optim.Adam(network.parameters())
state = SimpleNamespace(denoiser=network, emas=[], optimizer=optimizer, step=0)
def check(settings="recipe"):
    try:
        return agreement.check_agreement(worker, settings, state) or "equal"
    except (UserError, WorkersFailed) as error:
        return f"{type(error).__name__}: {error}"
found["own weights"] = check()
agreement.share_initial_weights(worker, network)
found["shared weights"] = check()
found["other recipe"] = check(f"recipe {rank}")
network.running_mean[2] += rank * 1e-30
found["one bit"] = check()
print(json.dumps(found), flush=True)
if rank == 1:  # it hangs
    time.sleep(20)
try:
    worker.meet()
except WorkersFailed as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The lines that each of two workers printed."""
    folder = tmp_path_factory.mktemp("workers")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)], text=True, stdout=subprocess.PIPE,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]  # fmt: skip
    first, _ = workers[0].communicate(timeout=120)
    workers[1].kill()
    second, _ = workers[1].communicate(timeout=120)
    return [first.splitlines(), second.splitlines()]


@pytest.fixture
def found(outputs: list[list[str]]) -> list[dict[str, Any]]:
    return [json.loads(lines[0]) for lines in outputs]


def test_collective_operations(found: list[dict[str, Any]]) -> None:
    for values in found:
        assert (values["sum"], values["any"]) == (3.0, [True, False])
        assert values["gathered"] == ["worker 0", "worker 1"]


def test_workers_start_from_the_checkpoint_of_worker_0(found: list[dict[str, Any]]) -> None:
    for values in found:
        assert values["newer on worker 1"] == "step-2"
        assert values["new run"]
        assert "step-4" in values["missing on worker 1"] and "(worker 1)" in values["missing on worker 1"]
        assert "(worker 0)" not in values["missing on worker 1"]


def test_different_weights_end_the_run_and_the_workers_are_named(found: list[dict[str, Any]]) -> None:
    for values in found:
        assert values["shared weights"] == "equal"
        for key, kind in (
            ("own weights", "WorkersFailed"),
            ("one bit", "WorkersFailed"),
            ("other recipe", "UserError"),
        ):
            assert values[key].startswith(kind), values[key]
            assert "(worker 0)" in values[key] and "(worker 1)" in values[key]


def test_a_worker_that_hangs_ends_the_wait_of_the_others(outputs: list[list[str]]) -> None:
    (message,) = outputs[0][1:]
    assert "worker 0" in message and f"{4 / 60:g} minutes" in message and "collective_minutes" in message


def test_other_errors_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="out of memory") as caught, Worker(0, 2)._waiting():
        raise RuntimeError("out of memory")
    assert not isinstance(caught.value, WorkersFailed)


def test_checksum_is_a_sum_of_words_by_their_place(tmp_path: Path) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    words = [int(word) for word in values.numpy().view(np.int32).ravel()]
    assert checksum([values]) == f"{(sum(word * (2 * i + 1) for i, word in enumerate(words)) + 15) % 2**64:016x}"
    assert checksum([values]) == checksum([values.t().contiguous().t()])
    others = [values.flip(0), values.half(), values.double(), values + 1e-7, values[:4]]
    assert len({checksum([other]) for other in [values, *others]}) == 6
    assert checksum([values, values[0]]) != checksum([values[0], values])
    assert checksum([torch.tensor(True), torch.tensor(3.0, dtype=torch.float64)]) != checksum([])
