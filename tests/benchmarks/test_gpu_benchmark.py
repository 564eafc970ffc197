"""The GPU benchmark: it runs with torch, numpy and safetensors only, counts launches, and survives a failure."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from patchloom.benchmarks.findings import Finding, exact
from patchloom.benchmarks.gpu_session import GpuSession
from patchloom.benchmarks.launches import RANGE, count_launches, kernels_of, launches_by_range
from patchloom.benchmarks.machine import describe_machine
from patchloom.benchmarks.result_file import GpuResults, read_plot_data

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
ONLY_TORCH = """
import sys
for name in ("ray", "mlflow", "pydantic", "yaml", "rich", "typer", "matplotlib", "pyarrow", "pandas", "diffusers",
             "psutil", "PIL", "skimage", "optuna", "fsspec", "scipy"):
    sys.modules[name] = None  # import fails as if it were not installed
"""
GPU_BENCHMARK = f"""{ONLY_TORCH}
sys.argv = ["gpu", "--tiny", *sys.argv[1:]]
from patchloom.benchmarks.gpu import main
sys.exit(main())
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # threads that wait for each other take minutes on a busy machine


@pytest.mark.slow
def test_the_gpu_benchmark_needs_only_torch_numpy_and_safetensors(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    command = [sys.executable, "-c", GPU_BENCHMARK, "--images", str(tmp_path / "images.npz"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=os.environ | ONE_THREAD)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    record = json.loads(path.read_text())
    assert list(record["subjects"]) == [
        "limits", "DDPM++ on 16 pixels, full size, batch 8",
        "DDPM++ on 16 pixels: gain of patches (bf16, channels last)",
        "DDPM++ on 16 pixels: sampling with 3 steps of Heun",
        "DDPM++ on 16 pixels, by crop size and precision, channels last",
        "ADM on latents of 16, full size, batch 2", "Fréchet distance of 64 samples at equal time",
        "DDPM++ on 16 pixels: operations",
    ]  # fmt: skip
    assert record["not_measured"] == {}
    check_curves(record["curves"])
    check_launches(record["subjects"]["DDPM++ on 16 pixels: operations"])
    assert "matplotlib" in done.stderr
    drawn = subprocess.run(
        [sys.executable, "-m", "patchloom.benchmarks.plots", str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert drawn.returncode == 0, drawn.stderr
    assert all(Path(name).read_text().startswith("<?xml") for name in drawn.stdout.split())
    kinds = [Path(name).stem.rpartition("-")[2] for name in drawn.stdout.split()]
    assert kinds == ["rates", "ratios", "flops", "quality"]  # kernels are counted on a GPU only


def check_curves(curves: dict[str, Any]) -> None:
    assert list(curves) == ["p = 0.25", "p = 0.5", "p = 1"]
    for curve in curves.values():
        assert [point["updates"] for point in curve] == sorted(point["updates"] for point in curve)
        assert len(curve) == 4 and all(point["distance"] >= 0 for point in curve)


def check_launches(findings: list[dict[str, Any]]) -> None:
    counts = {found["what"]: found["measured"]["median"] for found in findings if found["unit"] == "operations"}
    assert len(counts) == 6
    ours, plain = "bf16, channels last", "plain loop, fp32 without TF32"
    assert counts[f"step, batch 8, {ours}"] == counts[f"step, batch 64, {ours}"]
    assert counts[f"step, batch 8, {plain}"] < counts[f"step, batch 64, {plain}"]  # it cuts crops one by one


def test_the_gpu_tests_need_only_torch_numpy_safetensors_and_pytest() -> None:
    arguments = [
        "-q",
        "--confcutdir=tests/gpu",
        "-p",
        "no:xdist",
        "tests/gpu",
        "-m",
        "not gpu and not slow",
        "-k",
        "memory",
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"{ONLY_TORCH}import pytest\nsys.exit(pytest.main({arguments}))"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_the_gpu_benchmark_without_a_gpu_exits_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "patchloom.benchmarks.gpu", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and "CUDA" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- launches


def test_operations_are_counted_once_with_the_backward_pass() -> None:
    x = torch.ones(4, 4)
    weight = torch.ones(4, 4, requires_grad=True)

    def gradient() -> None:
        weight.grad = None
        weight.exp().backward(x)

    pieces = {
        "one": lambda: x + 1,
        "two": lambda: (x @ x).relu(),  # matmul calls mm
        "gradient": gradient,  # exp, the product of its backward pass, and detach of the new gradient
    }
    assert count_launches(pieces, CPU) == {"one": 1, "two": 2, "gradient": 3}


def test_work_that_launches_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no launches of nothing"):
        count_launches({"one": lambda: torch.ones(1) + 1, "nothing": lambda: None}, CPU)


def test_kernels_are_those_of_operations_that_start_in_the_range_on_any_thread() -> None:
    def event(name: str, thread: int, start: float, *kernels: str, **options: Any) -> FunctionEvent:
        made = FunctionEvent(0, name, thread, start, start + 1, **options)
        for kernel in kernels:
            made.append_kernel(kernel, 0, 1.0)
        return made

    step = FunctionEvent(0, f"{RANGE}step", 1, 10.0, 20.0, is_user_annotation=True)
    step.append_kernel("annotation", 0, 1.0)  # the range itself, as torch shows it on the GPU
    events = [
        step,
        event("aten::mm", 1, 5.0, "before"),
        event("aten::mm", 1, 11.0, "gemm", "Memcpy DtoD", "Memset (Device)"),
        event("aten::convolution_backward", 2, 12.0, "dgrad", "wgrad"),
        event("gemm", 7, 13.0, device_type=torch.autograd.DeviceType.CUDA),
        event("aten::mm", 1, 21.0, "after"),
    ]
    assert launches_by_range(events, kernels_of) == {"step": 3}


# -- the session


def session_at(folder: Path, seconds_left: float = math.inf, **options: Any) -> GpuSession:
    results = GpuResults("2026-01-01", describe_machine(), {})
    return GpuSession(CPU, time.monotonic() + seconds_left, False, results, folder / "gpu.json", **options)


def test_a_failed_measurement_is_recorded_and_the_others_continue(tmp_path: Path) -> None:
    session = session_at(tmp_path)

    def fail() -> None:
        raise RuntimeError("CUDA out of memory:\n  40 GiB")

    session.measure("first", 10, fail)
    session.measure("second", 10, lambda: session.keep("numbers", [Finding("speed", exact(2.0), "images/s")]))
    assert session.has_failed
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["not_measured"] == {"first": "failed: RuntimeError: CUDA out of memory: 40 GiB"}
    (found,) = read_plot_data(tmp_path / "gpu.json").findings["numbers"]
    assert found == Finding("speed", exact(2.0), "images/s")


def test_a_measurement_without_time_is_skipped_and_recorded(tmp_path: Path) -> None:
    session, done = session_at(tmp_path, seconds_left=30), list[str]()
    session.measure("long", 100, lambda: done.append("long"))
    session.measure("short", 10, lambda: done.append("short"))
    assert done == ["short"] and not session.has_failed
    assert list(session.results.not_measured) == ["long"] and "100 s" in session.results.not_measured["long"]


def test_flops_are_a_share_of_the_peak_of_the_precision(tmp_path: Path) -> None:
    session = session_at(tmp_path, _peaks={"fp32": (1e12, "measured"), "bf16": (4e12, "data sheet")})
    for precision, limit, share in (("fp32", 100.0, 20.0), ("bf16", 400.0, 5.0)):
        rate, flops = session.rate("steps", exact(20.0), 1e10, precision)
        assert (rate.measured.median, rate.limit) == (20.0, limit)
        assert (flops.measured.median, flops.unit) == (pytest.approx(share), "% of the peak")
