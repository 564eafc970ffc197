"""The suite: what is chosen, what is kept, what a mistake gets; and that its training parts run and count right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchloom.benchmarks.suite import SUBJECTS, benchmark, chosen_subjects, keep
from patchloom.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def test_a_group_is_all_its_parts_and_nothing_is_everything() -> None:
    assert chosen_subjects(["read", "train"]) == ["read", *(name for name in SUBJECTS if name.startswith("train."))]
    assert chosen_subjects(["train.sizes", "train.sizes"]) == ["train.sizes"]
    assert chosen_subjects([]) == list(SUBJECTS)
    with pytest.raises(UserError, match=r"benchmark trane is unknown: choose of .*train"):
        chosen_subjects(["trane"])
    for name, subject in SUBJECTS.items():
        assert callable(subject.load()), name


def test_numbers_are_kept_beside_those_of_the_day(tmp_path: Path) -> None:
    benchmark(["train.memory"], out=str(tmp_path), tiny=True)
    record = benchmark(["scaling"], out=str(tmp_path), tiny=True)
    (path,) = tmp_path.glob("benchmark-*.json")
    kept = json.loads(path.read_text())
    assert set(kept["subjects"]) == {"train.memory", "scaling"} and set(record["subjects"]) == {"scaling"}
    assert kept["subjects"]["scaling"] == record["subjects"]["scaling"]
    assert kept["machine"]["versions"]["torch"] and kept["machine"]["cpus"] >= 1
    names = os.uname().nodename, str(Path.home()), str(ROOT)
    assert not any(name in path.read_text() for name in names if len(name) > 1)  # nothing that names the host


def test_what_another_machine_found_that_day_stays(tmp_path: Path) -> None:
    record = benchmark(["scaling"], out=str(tmp_path), tiny=True)
    other = record | {"machine": record["machine"] | {"cpus": 10**6}}
    for _ in range(2):
        keep(other, tmp_path)
    kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("benchmark-*.json"), reverse=True)]
    assert [one["machine"] for one in kept] == [record["machine"], other["machine"]]


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        benchmark(["scaling"], out=str(tmp_path / "file" / "results"), tiny=True)


def test_a_smaller_crop_keeps_less_for_its_backward_pass() -> None:
    findings = benchmark(["train.memory"], tiny=True)["subjects"]["train.memory"]["findings"]
    crops = {found["what"]: found["measured"]["median"] for found in findings if "a crop of" in found["what"]}
    full, half, quarter = crops.values()
    assert full / half == pytest.approx(4, rel=0.05) and half / quarter == pytest.approx(4, rel=0.05)


def test_training_parts_run_and_count_right() -> None:
    found = benchmark(["train.plain", "train.sizes", "train.parts"], tiny=True)["subjects"]
    for subject in found.values():
        rates = [finding["measured"]["median"] for finding in subject["findings"] if "images/s" in finding["unit"]]
        assert all(rate > 0 for rate in rates)
        assert all(finding["is_met"] is None for finding in subject["findings"])  # smallest sizes are not judged
    gains = [each for each in found["train.sizes"]["findings"] if each["what"] == "p = 0.5 over p = 1, one worker"]
    assert [each["limit"] for each in gains] == pytest.approx([1.9 / 0.7, 1 / 0.7])
    assert gains[0]["measured"]["median"] / gains[1]["measured"]["median"] == pytest.approx(1.9)


def test_the_command_prints_one_object_and_a_mistake_is_one_line() -> None:
    command = [sys.executable, "-m", "patchloom.pipelines.cli", "benchmark"]
    done = subprocess.run([*command, "scaling", "--tiny", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["subjects"]) == ["scaling"]
    done = subprocess.run([*command, "trane"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


WITHOUT = """
import sys
for name in ("ray", "mlflow", "pydantic", "yaml", "rich", "typer", "matplotlib", "pyarrow", "pandas", "diffusers",
             "psutil", "PIL", "skimage", "optuna", "fsspec"):
    sys.modules[name] = None  # as if it were not installed
sys.argv = ["gpu", "--tiny", *sys.argv[1:]]
from patchloom.benchmarks.gpu import main
sys.exit(main())
"""


def test_the_gpu_benchmark_needs_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    command = [sys.executable, "-c", WITHOUT, "--images", str(tmp_path / "images.npz"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    record = json.loads(path.read_text())
    assert list(record["curves"]) == ["p = 0.25", "p = 0.5", "p = 1"]
    for curve in record["curves"].values():
        assert [point["updates"] for point in curve] == sorted(point["updates"] for point in curve)
        assert len(curve) == 4 and all(point["distance"] >= 0 for point in curve)
    assert "no plots: matplotlib is not here" in done.stderr
    drawn = subprocess.run(
        [sys.executable, "-m", "patchloom.benchmarks.plots", str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert drawn.returncode == 0, drawn.stderr
    assert all(Path(name).read_text().startswith("<?xml") for name in drawn.stdout.split())
    assert len(drawn.stdout.split()) == 3


def test_a_gpu_benchmark_without_a_gpu_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "patchloom.benchmarks.gpu", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
