"""Every parser of untrusted files refuses damaged ones with an error of Patchloom, in bounded memory and time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARSERS = (
    "image", "zip", "tar", "tar.gz", "nested.tar", "idx", "cifar", "lmdb", "parquet", "arrow", "npz",
    "labels.json", "labels.csv", "labels.jsonl",
    "recipe.yaml", "search.yaml", "model.json", "safetensors", "pickle", "dataset.json", "shards/part-00000.arrow",
    "manifest", "request",
)  # fmt: skip
MEBIBYTES = 3072  # a small image file may be 89 million pixels, of which several copies are needed
HERE = Path(__file__).parent


def fuzz(count: int, folder: Path, *names: str) -> None:
    path = os.pathsep.join(filter(None, (str(HERE / "models"), str(HERE / "support"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(HERE / "support" / "fuzzing.py"), str(count), str(folder), str(MEBIBYTES), *names],
        capture_output=True, text=True, timeout=60 + count * len(names), env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("names", [PARSERS[0::3], PARSERS[1::3], PARSERS[2::3]], ids="-".join)
def test_some_damaged_inputs_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    fuzz(25, tmp_path, *names)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_ten_thousand_damaged_inputs_are_refused(tmp_path: Path, name: str) -> None:
    fuzz(10_000 // len(PARSERS) + 1, tmp_path, name)
