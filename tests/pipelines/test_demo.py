"""The demo: every step as a user runs it, its memory, and its results."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import start_cli
from PIL import Image

from patchloom.platform.dataset import open_dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("pixels", [False, True], ids=["latents", "pixels"])
def test_demo_from_photographs_to_report(pixels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv("OMP_NUM_THREADS")  # the other tests set it; a user has all cores
    started = time.monotonic()
    process = start_cli("demo", *(["--pixels"] if pixels else []), cwd=tmp_path)
    peak = PeakMemory(process.pid)
    output, _ = process.communicate(timeout=1500)
    print(f"{time.monotonic() - started:.0f} s, peak {peak.stop() / 2**30:.2f} GiB PSS")
    assert process.returncode == 0, output
    assert "Warning" not in output and "Traceback" not in output
    assert peak.bytes < 8 * 2**30
    demo = tmp_path / "demo"
    assert (demo / "report.html").stat().st_size > 100_000
    images = np.stack([np.asarray(Image.open(path)) for path in sorted((demo / "samples").glob("*/*.png"))])
    side = 32 if pixels else 64
    assert images.shape == (64, side, side, 3)
    assert len({image.tobytes() for image in images}) == 64
    assert_like_the_data(images, demo / "pixels")


def assert_like_the_data(images: np.ndarray, dataset: Path) -> None:
    """Mean colours are near the data's, and neighbouring pixels are similar, as in photographs and not as in noise."""
    data = open_dataset(dataset)
    real = data.rows(np.linspace(0, len(data) - 1, 512).astype(int))["image"].transpose(0, 2, 3, 1)
    assert np.abs(images.mean((0, 1, 2)) - real.mean((0, 1, 2))).max() < 40
    steps = np.abs(np.diff(images.astype(float), axis=2)).mean() / images.astype(float).std()
    assert steps < 0.35  # 1.13 for independent pixels


class PeakMemory:
    """The peak memory (proportional set size) of a process and everything it started, measured once per second."""

    def __init__(self, pid: int) -> None:
        self.bytes, self._group = 0, os.getpgid(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.bytes

    def _watch(self) -> None:
        known: set[int] = {self._group}
        while not self._stop.wait(1.0):
            total = 0
            for process in psutil.process_iter():
                try:
                    if process.pid in known or process.ppid() in known or os.getpgid(process.pid) == self._group:
                        known.add(process.pid)
                        total += process.memory_full_info().pss
                except (psutil.Error, ProcessLookupError, PermissionError):
                    continue
            self.bytes = max(self.bytes, total)
