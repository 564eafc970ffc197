"""Devices: one per process, with its index, in every thread that computes."""

import json
import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import run_python

from patchloom.platform.compute.devices import DEVICE_VARIABLE, device_thread, own_device
from patchloom.platform.compute.interfaces import torch_config


@pytest.fixture(autouse=True)
def not_asked_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    own_device.cache_clear()
    yield
    own_device.cache_clear()


def test_without_ray_the_first_visible_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own_device.cache_clear()
    assert own_device() == torch.device("cpu")


def test_the_environment_overrides_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_config(30).backend is None  # NCCL if Ray reserves GPUs
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert own_device() == torch.device("cpu")
    assert torch_config(30).backend == "gloo"


def test_a_thread_begins_with_the_device_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    current: dict[str, torch.device] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: current.setdefault(threading.current_thread().name, to))
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda:3")
    with device_thread("rows") as executor:
        executor.submit(int).result()
    assert current == {"rows_0": torch.device("cuda", 3)}


@pytest.mark.ray
def test_a_process_of_ray_without_a_gpu_uses_the_cpu() -> None:
    import ray

    @ray.remote(num_cpus=0)
    def device_of_process() -> str:
        torch.cuda.is_available = lambda: True
        return str(own_device())

    assert ray.get(device_of_process.remote()) == "cpu"


FAKE_GPUS = """
import json, sys
from contextlib import nullcontext
from types import SimpleNamespace

def loop(config):
    import threading, ray.train, torch
    from patchloom.errors import UserError
    from patchloom.pipelines.train.loop import Prefetcher
    from patchloom.platform.compute.devices import own_device, use_device
    from patchloom.platform.compute.workers import Worker
    try:
        own_device()
        refused = ""
    except UserError as error:  # this build of torch has no CUDA
        refused = str(error)
    current = threading.local()
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = lambda device: setattr(current, "device", device.index)
    streams = []  # the devices of the streams that are made or waited for
    stream = SimpleNamespace(record_event=lambda: "mark", wait_event=lambda mark: None)
    torch.cuda.Stream = torch.cuda.current_stream = lambda device: streams.append(device.index) or stream
    torch.cuda.stream = lambda stream: nullcontext()
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size())
    use_device(worker.device)

    def rows_of(crops):
        where = {"thread": threading.current_thread().name, "rows": current.device}
        return SimpleNamespace(image=None, label=None, std=None, where=where)

    run = SimpleNamespace(
        worker=worker, device=worker.device, settings=SimpleNamespace(updates=1), job=SimpleNamespace(microbatch=None),
        timer=SimpleNamespace(timed=lambda name, function: function),
        reader=SimpleNamespace(rows=rows_of),
    )
    group = SimpleNamespace(crops=range(8))
    plan = SimpleNamespace(step=0, share=lambda rank, count, microbatch: [group])
    with Prefetcher(run) as prefetcher:
        ((_, rows),) = prefetcher.fetch(plan)
    record = {"rank": worker.rank, "device": str(worker.device), "loop": current.device, "streams": streams}
    return worker.gather(record | rows.where | {"refused": refused})

if __name__ == "__main__":
    from patchloom.platform.compute.session import ray_session
    with ray_session(cpus=2):
        import ray.train
        from ray.train.torch import TorchTrainer
        from patchloom.platform.compute.interfaces import BoundTorchConfig
        scaling = ray.train.ScalingConfig(num_workers=2, use_gpu=True)
        trainer = TorchTrainer(loop, train_loop_config={}, torch_config=BoundTorchConfig(backend="gloo"),
            scaling_config=scaling, run_config=ray.train.RunConfig(storage_path=sys.argv[1]))
        print(json.dumps(trainer.fit().return_value))
"""


@pytest.mark.slow
def test_workers_of_a_node_use_their_own_gpus_in_all_threads(tmp_path: object) -> None:
    """Ray shows both workers both GPUs, which exist for Ray only; torch is told that it finds them."""
    code = f"import sys; sys.argv.append({str(tmp_path)!r})\n{FAKE_GPUS}"
    fake = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2, "GPU": 2}', "RAY_ADDRESS": "local"}
    done = run_python(code, **fake)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert sorted(record["device"] for record in records) == ["cuda:0", "cuda:1"]
    for record in records:
        index = int(record["device"].removeprefix("cuda:"))
        assert (record["loop"], record["rows"], record["thread"]) == (index, index, "rows_0")
        assert record["streams"] == [index, index]  # of the copies, and of the steps that wait for them
        assert f"GPU {index}" in record["refused"] and DEVICE_VARIABLE in record["refused"]


def test_the_limit_of_collective_operations_is_set() -> None:
    assert torch_config(0.05).timeout_s == 3
    assert torch_config(30).timeout_s == 1800
