"""Utilisation: a peak below the run's own rate is measured again, and not shown if it stays below."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patchloom.pipelines.train.hooks import speed
from patchloom.pipelines.train.page import run_section
from patchloom.platform.compute.workers import Worker
from patchloom.platform.records.run import ProgressLine, RunCard, write_progress


def hook_with_peaks(monkeypatch: pytest.MonkeyPatch, *peaks: float) -> Any:
    """A hook without a run, whose device has these peaks, one at each measurement."""
    measured = iter(peaks)
    monkeypatch.setattr(speed, "peak_flops", lambda device, precision: (next(measured), "measured"))
    hook: Any = speed.SpeedHook.__new__(speed.SpeedHook)
    hook.run = SimpleNamespace(worker=Worker(), device=torch.device("cpu"), settings=SimpleNamespace(precision="fp32"))
    hook._peak_flops, hook._peak_source = speed._peak_of_all_workers(hook.run)
    return hook


def test_peak_below_the_rate_of_the_run_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = hook_with_peaks(monkeypatch, 1e9, 1e10)
    found = hook._utilisation(4e9)
    assert found == {
        "model_flops_utilisation": pytest.approx(0.4), "peak_flops_per_second": pytest.approx(1e10),
        "peak_flops_source": "measured",
    }  # fmt: skip
    assert hook._utilisation(1e9)["model_flops_utilisation"] == pytest.approx(0.1)  # without a third measurement


def test_peak_that_stays_below_the_rate_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hook_with_peaks(monkeypatch, 1e9, 2e9)._utilisation(4e9) == {}


def test_page_shows_no_utilisation_above_1(tmp_path: Path) -> None:
    counts = {"updates": 1, "images_seen": 8, "straggler_loss": 0.0, "peak_flops_source": "measured"}
    wrong = ProgressLine(step=1, model_flops_utilisation=28.31, peak_flops_per_second=1e9, **counts)
    right = ProgressLine(step=2, model_flops_utilisation=0.25, peak_flops_per_second=8e10, **counts)
    RunCard(kind="autoencoder", dataset_fingerprint="a").write(tmp_path)  # a page needs no recipe of it
    write_progress(tmp_path, [wrong])
    assert "utilisation" not in run_section(tmp_path)
    write_progress(tmp_path, [wrong, right])
    page = str(run_section(tmp_path))
    assert "25.0%" in page and "0.08 TFLOP/s (measured)" in page and "2831" not in page.replace(",", "")
