"""The default batch: by the memory of the device, recorded with the first image, and kept by later calls."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.checkpoints import sampling_skeleton
from patchloom.models.generate import Sampling
from patchloom.models.memory import sampling_bytes
from patchloom.pipelines.cli import main
from patchloom.pipelines.sample import sample, sampling
from patchloom.pipelines.sample.batches import default_batch
from patchloom.platform.compute import work_devices
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, WorkerShape
from patchloom.platform.compute.work_devices import WorkDevice, job_device

pytestmark = pytest.mark.ray
GUIDED = Sampling(steps=3, guidance=1.3)


def test_a_cpu_has_a_batch_of_8(trained: Path) -> None:
    assert default_batch(trained / "model", GUIDED, "cpu", 0) == 8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_has_the_largest_batch_that_needs_half_of_its_memory(trained: Path, precision: str) -> None:
    options = Sampling(steps=3, guidance=1.3, precision=precision)
    needed = sampling_bytes(sampling_skeleton(trained / "model"), options, 32, "cuda")
    batches = [
        default_batch(trained / "model", options, "cuda", memory)
        for memory in (0, 2 * needed - 2, 2 * needed, 100 * needed)
    ]
    assert batches == [8, 16, 32, 64]


def test_later_calls_use_the_batch_of_the_folder(
    champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_asked(*_: Any) -> WorkDevice:
        raise AssertionError("the folder has a batch")

    folder, options = tmp_path / "samples", {"steps": 2, "workers": 0}
    monkeypatch.setattr(sampling, "default_batch", lambda *_: 3)
    sample(champion, str(folder), "0-1", **options)
    card = json.loads((folder / "sampling.json").read_text())
    assert (card["batch"], card["device"]) == (3, "cpu")
    monkeypatch.setattr(sampling, "job_device", not_asked)
    assert sample(champion, str(folder), "0-4", **options).made == 3
    with pytest.raises(UserError, match=r"batch was 3 and is now 4"):
        sample(champion, str(folder), "0-5", batch=4, **options)
    monkeypatch.undo()
    sample(champion, str(tmp_path / "same"), "0-4", batch=3, **options)
    for seed in range(5):
        first, second = (
            np.asarray(Image.open(tmp_path / f"{name}/000000/00000{seed}.png")) for name in ("samples", "same")
        )
        assert np.array_equal(first, second)


def test_dry_run_estimates_the_memory_and_writes_nothing(
    champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", champion, str(tmp_path / "samples"), "--seeds", "0-99", "--batch", "32", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["patchloom", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr().out
    assert left.value.code == 0 and not (tmp_path / "samples").exists()
    assert all(words in printed for words in ("100 images", "35 network evaluations", "batches of 32", "fp32", "MiB"))


def test_images_of_two_kinds_of_devices_are_never_mixed(champion: str, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    sample(champion, str(folder), "0", steps=2, workers=0)
    card = json.loads((folder / "sampling.json").read_text())
    (folder / "sampling.json").write_text(json.dumps(card | {"device": "cuda"}))
    with pytest.raises(UserError, match=r"samples.*cuda.*cpu"):
        sample(champion, str(folder), "0-1", steps=2, workers=0)


def test_a_cluster_is_asked_for_its_device(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "in use")
    assert job_device(None, DEFAULT_RESOURCES) == WorkDevice()  # without GPUs, no worker is asked
    monkeypatch.setattr(work_devices, "actor_shape", lambda **_: WorkerShape({"CPU": 1, "GPU": 0}, {}))
    assert job_device(None, DEFAULT_RESOURCES) == WorkDevice("cpu", 0)  # the answer of a worker
