"""The rate of sampling that a call reports, and options that are refused before anything is loaded."""

import sys
from pathlib import Path

import pytest
from helpers import run_python

from patchloom.pipelines.sample.sampling import sample

REFUSED = """
import sys
from patchloom.pipelines.cli.app import main
sys.argv = ["patchloom", "sample", "no-model", "samples", "--sampler", "magic"]
try:
    main()
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("seeds", ["0", "0-3", "0-19"])
def test_rate_is_that_of_the_sampled_images(trained: Path, tmp_path: Path, seeds: str) -> None:
    made = sample(str(trained), str(tmp_path / "samples"), seeds, workers=0, steps=1)
    assert made.images_per_second >= made.made / made.seconds > 0


def test_unknown_sampler_is_refused_before_torch_is_loaded() -> None:
    done = run_python(REFUSED, PYTHONPATH=":".join(filter(None, sys.path)))
    assert (done.returncode, done.stdout.strip()) == (2, "False") and "magic" in done.stderr
