"""Memory: preparing gigabytes of decoded images needs little memory."""

import io
import sys
import time
import zipfile
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import psutil
import pytest
from helpers import photograph, start_cli
from PIL import Image

from patchloom.platform.dataset import open_dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SIDE, IMAGES = 2900, 240  # 25 MB each when decoded: 6.05 GB
IDLE = """
from patchloom.platform.compute.session import ray_session
with ray_session():
    print("READY", flush=True)
    input()
"""


def proportional_bytes(process: psutil.Process) -> int:
    """Proportional set size of a process and its children."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def idle_ray_bytes(folder: Path) -> int:
    process = Popen([sys.executable, "-c", IDLE], stdin=PIPE, stdout=PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    while "READY" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(5)
    found = proportional_bytes(psutil.Process(process.pid))
    process.communicate("\n")
    return found


def test_six_gigabytes_of_images_need_less_than_two_gigabytes(tmp_path: Path) -> None:
    picture = Image.fromarray(photograph("coffee.png")).resize((SIDE, SIDE))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=90)
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        for number in range(IMAGES):
            archive.writestr(f"{number:04d}.jpg", jpeg.getvalue())
    assert IMAGES * SIDE * SIDE * 3 > 6e9
    idle = idle_ray_bytes(tmp_path)
    process = start_cli("prepare", "large.zip", "data", "--resolution", "256", "--autoencoder", "none", cwd=tmp_path)
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(psutil.Process(process.pid)))
        time.sleep(0.3)
    assert process.returncode == 0, process.communicate()[0]
    print(f"idle Ray {idle / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {(peak - idle) / 1e9:.2f} GB above")
    assert len(open_dataset(tmp_path / "data")) == IMAGES
    images = open_dataset(tmp_path / "data").rows([0, IMAGES - 1])["image"]
    assert np.array_equal(images[0], images[1])
    assert peak - idle < 2e9
