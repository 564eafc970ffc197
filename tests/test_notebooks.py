"""Notebooks: they run from their first cell to the last, and find what is known about their results."""

import ast
import runpy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import environment
from PIL import Image
from search_folders import SPACE, write_search_folder

from patchloom.errors import UserError
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.tune.frame import load_trials

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
NAMES = ("method", "sampling", "search")


def run_notebook(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """Run a notebook in a folder, with a line changed; its variables at the end."""
    source = (NOTEBOOKS / f"{name}.py").read_text()
    assert change[0] in source
    (folder / f"{name}.py").write_text(source.replace(*change))
    monkeypatch.chdir(folder)
    plt.switch_backend("agg")
    try:
        return runpy.run_path(str(folder / f"{name}.py"))
    finally:
        plt.close("all")


def test_every_notebook_is_tested_and_in_the_percent_format() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.py")) == sorted(NAMES)
    for name in NAMES:
        text = (NOTEBOOKS / f"{name}.py").read_text()
        assert text.startswith("# ---\n# jupyter:\n") and "\n# %% [markdown]\n" in text
        code = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert len(code) <= 100  # what a notebook of the method promises
        ast.parse(text)


def test_the_method_runs_with_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_notebook("method", tmp_path, monkeypatch, ("STEPS, BATCH = 32, 300, 16", "STEPS, BATCH = 32, 30, 4"))
    # the weights make the loss about 1 for a network that estimates nothing, whatever the noise (EDM, Table 1)
    assert found["losses"][0] == pytest.approx(1, abs=0.5) and len(found["losses"]) == 30
    assert found["samples"].shape == (16, 3, 32, 32) and found["samples"].isfinite().all()


@pytest.mark.slow
def test_the_method_learns_to_denoise_a_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_notebook("method", tmp_path, monkeypatch)
    losses, samples, images = found["losses"], found["samples"], found["images"]
    assert losses[0] == pytest.approx(1, abs=0.3) and np.mean(losses[-20:]) < 0.6
    assert samples.shape == (16, 3, 32, 32) and samples.isfinite().all()
    roughness, of_images = ((x[..., 1:] - x[..., :-1]).abs().mean() / x.std() for x in (samples, images))
    assert of_images < roughness < 0.8  # 1.13 for noise: independent pixels
    assert [size.pixels for size in found["schedule"].sizes] == [32, 16, 8]


def test_a_search_is_read_as_a_data_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo-pixels").mkdir()
    write_search_folder(tmp_path / "demo-pixels" / "search")
    found = run_notebook("search", tmp_path, monkeypatch)
    trials, table = found["trials"], found["table"]
    assert len(trials) == 13 and list(found["keys"]) == list(SPACE)
    assert trials.loc["000-1", "held_out_loss"] == pytest.approx(0.2 + 0.05 * 0.25 + 10 * 1e-3 + 0.003)
    assert trials.loc["000-1", "held_out_loss_by_sigma.1"] == pytest.approx(2 * 0.2255)
    assert np.isnan(trials.loc["099-0", "held_out_loss"]) and trials.loc["099-0", "status"] == "failed"
    assert table.index[0] == (0.25, 1e-3) and set(table["count"]) == {2}
    with pytest.raises(UserError, match="demo"):
        load_trials(str(tmp_path / "demo-pixels"))


def test_a_registered_model_is_sampled_and_out_painted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a registry of its own, as another test may train the real demo
    with environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}"):
        register(str(trained / "model"), "patchloom-demo-pixels", alias="champion")
        found = run_notebook("sampling", tmp_path, monkeypatch)
    errors = found["errors"]  # with the most steps
    assert max(errors["midpoint"], errors["heun"]) < errors["euler"]  # of second and of first order
    assert len(found["pictures"]) == 4
    side = found["side"]
    for picture in found["pictures"]:
        assert picture.shape == (side, 2 * side, 3)
        assert np.abs(picture[:, side // 2 : -side // 2].astype(int) - found["center"]).max() <= 1
    assert len({picture.tobytes() for picture in found["pictures"]}) == 4
    with Image.open(tmp_path / "center.png") as image:
        assert np.array_equal(np.asarray(image), found["center"])
