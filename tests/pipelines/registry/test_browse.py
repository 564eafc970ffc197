"""Browsing the registry: cards, comparisons of what may be compared, promotions that must be earned, deletions."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_python
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.generate import Sampling, generate_padded
from patchloom.pipelines.registry.browse import (
    compare_models,
    comparison_words,
    delete_model,
    model_card,
    models_table,
    promote_model,
    show_model,
)
from patchloom.pipelines.registry.quality import TAG, Evaluation
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.registry import list_versions, tag_version

IDENTITY = {"features": "inception-2015-12-05", "n_samples": 1000, "seeds": "0-999", "steps": 18, "reference": "a" * 64,
            "n_reference": 5000, "sampler": "heun", "network_evaluations": 35, "guidance": 1.0}  # fmt: skip


def give(name: str, version: str, fid: float, **identity: Any) -> None:
    """Keep a result with a version, as `patchloom evaluate` does."""
    found = Evaluation({"fid": fid, "precision": 0.5}, {**IDENTITY, **identity})
    value = json.dumps({"metrics": found.metrics, "identity": found.identity})
    tag_version(name, version, {TAG + found.digest: value})


@pytest.fixture(scope="module")
def versions(trained: Path, changed_copy: Callable[[Path, float], Path]) -> Callable[[str, int], str]:
    """Registers copies of the tiny model, each with weights of its own, under a name; returns the name."""

    def make(name: str, count: int) -> str:
        for number in range(count):
            register(str(changed_copy(trained, 1e-3 * (number + 1))), name)
        return name

    return make


def test_the_table_shows_every_version(champion: str) -> None:
    line = next(line for line in models_table().splitlines() if line.startswith("tiny/1 "))
    assert "champion" in line and "pixels" in line and "stochastic" in line


def test_a_card_tells_where_a_model_came_from(champion: str, trained: Path, pixels: Path, tmp_path: Path) -> None:
    card = model_card(champion)
    run = json.loads((trained / "run.json").read_text())
    assert card["lineage"]["run"] == run["run_id"]
    assert card["lineage"]["dataset_fingerprint"] == run["dataset_fingerprint"]
    assert card["recipe"]["patches"]["p"] == 0.5 and card["class_names"] == ["chelsea", "coffee"]
    words = show_model(champion, str(tmp_path / "preview.png"))
    assert card["sample"] in words and run["run_id"] in words
    previews = sorted((trained / "previews").glob("*.png"))
    with Image.open(tmp_path / "preview.png") as shown, Image.open(previews[-1]) as kept:
        assert np.array_equal(np.asarray(shown), np.asarray(kept))


def test_a_model_folder_has_a_card_too(trained: Path) -> None:
    card = model_card(str(trained))
    assert card["lineage"]["run"] is None and card["evaluations"] == []


def test_two_models_stand_side_by_side(versions: Callable[[str, int], str], tmp_path: Path) -> None:
    from patchloom.models.checkpoints import load_whole_model
    from patchloom.platform.tracking.registry import fetch_model

    name = versions("pair", 2)
    one, other = f"models:/{name}/1", f"models:/{name}/2"
    picture = tmp_path / "both.png"
    found = compare_models(one, other, picture=str(picture), seeds=3, steps=2)
    assert found["recipe"] == {} and found["metrics"] == []
    assert "neither has an evaluation" in comparison_words(found)
    models = [load_whole_model(fetch_model(reference).folder) for reference in (one, other)]
    images = [generate_padded(model, [0, 1, 2], [0, 1, 0], 8, Sampling(steps=2)) for model in models]
    with Image.open(picture) as opened:
        shown = np.asarray(opened)
    assert shown.shape[:2] == (2 * (2 * 16 + 2), 2 * (3 * 16 + 4))
    for row, made in enumerate(images):  # the same seeds as `patchloom sample`, twice as large
        corner = shown[36 * row : 36 * row + 32 : 2, 0:32:2]
        assert np.array_equal(corner, made[0].permute(1, 2, 0).numpy())
    give(name, "1", 12.0)
    give(name, "2", 11.0, n_samples=500)
    assert compare_models(one, other, picture=None)["not_comparable"] == ["n_samples is 1000 and 500"]
    give(name, "2", 11.5)
    (result,) = compare_models(one, other, picture=None)["metrics"]
    assert result["fid"] == [12.0, 11.5] and result["precision"] == [0.5, 0.5]


def test_a_recipe_that_differs_is_told_by_its_keys(
    champion: str, pixels: Path, tmp_path: Path, ray_cluster: None
) -> None:
    from helpers import tiny_recipe

    from patchloom.pipelines.train import train

    recipe = tiny_recipe(patches__p=1.0, train__images=40, preview__every_images=0)
    train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    found = compare_models(champion, str(tmp_path / "run"), picture=None)
    assert found["recipe"]["patches.p"] == [0.5, 1.0] and found["recipe"]["train.images"] == [600, 40]
    assert "seed" not in found["recipe"]


def test_a_promotion_must_be_earned(versions: Callable[[str, int], str]) -> None:
    name = versions("earned", 3)

    def holder() -> str:
        return next(row["version"] for row in list_versions(name) if "champion" in row["aliases"])

    assert promote_model(name, "1", if_better="fid") == "models:/earned@champion is version 1"  # nobody held it
    with pytest.raises(UserError, match="cannot be compared by fid: neither has an evaluation"):
        promote_model(name, "2", if_better="fid")
    give(name, "1", 12.0)
    give(name, "2", 11.0, steps=9)
    with pytest.raises(UserError, match="steps is 9 and 18"):
        promote_model(name, "2", if_better="fid")
    give(name, "2", 12.5)
    with pytest.raises(UserError, match=r"not better than version 1: FID 12\.5 against 12; not promoted"):
        promote_model(name, "2", if_better="fid")
    with pytest.raises(UserError, match="beauty is not a metric"):
        promote_model(name, "2", if_better="beauty")
    assert holder() == "1"
    give(name, "3", 11.75)
    assert "FID 11.75 against 12" in promote_model(name, "3", if_better="fid")
    assert holder() == "3"
    assert promote_model(name, "2") == "models:/earned@champion is version 2" and holder() == "2"


def test_a_deletion_is_asked_for(versions: Callable[[str, int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = versions("gone", 2)
    promote_model(name, "2")
    with pytest.raises(UserError, match="@champion points at would be deleted, and nobody can be asked: give --yes"):
        delete_model(name, "2")  # no terminal here
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: PTH123, SIM115
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda: "n")
    assert delete_model(name, "2") == "nothing was deleted"
    monkeypatch.setattr("builtins.input", lambda: "y")
    assert delete_model(name, "2") == "deleted models:/gone/2"
    assert [row["version"] for row in list_versions(name)] == ["1"]
    delete_model(name, "1", yes=True)
    assert list_versions(name) == []
    with pytest.raises(UserError, match="is not in the registry"):
        delete_model(name, "1", yes=True)


def test_programs_get_one_json_object(champion: str) -> None:
    code = "import sys; sys.argv = ['patchloom', 'models', 'list', '--json']; " \
           "from patchloom.pipelines.cli import main; main()"  # fmt: skip
    done = run_python(code, MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    assert "tiny" in {row["name"] for row in json.loads(done.stdout)}
