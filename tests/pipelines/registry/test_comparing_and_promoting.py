"""Listing, describing, comparing, promoting and deleting registered models."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluations import add_evaluation
from helpers import run_python
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.generate import Sampling, generate_padded
from patchloom.pipelines.registry.comparing import compare_models
from patchloom.pipelines.registry.deleting import delete_model
from patchloom.pipelines.registry.describing import describe_model, show_model
from patchloom.pipelines.registry.listing import models_table
from patchloom.pipelines.registry.promoting import promote_model
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.versions import list_versions


@pytest.fixture(scope="module")
def versions(trained: Path, changed_copy: Callable[[Path, float], Path]) -> Callable[[str, int], str]:
    """Registers copies of the tiny model with different weights under a name, and returns the name."""

    def make(name: str, count: int) -> str:
        for number in range(count):
            register(str(changed_copy(trained, 1e-3 * (number + 1))), name)
        return name

    return make


def test_table_shows_every_version(champion: str) -> None:
    line = next(line for line in models_table(list_versions()).splitlines() if line.startswith("tiny/1 "))
    assert "champion" in line and "pixels" in line and "stochastic" in line


def test_description_has_the_lineage_of_a_model(champion: str, trained: Path, pixels: Path, tmp_path: Path) -> None:
    card = describe_model(champion)
    run = json.loads((trained / "run.json").read_text())
    assert card.lineage.run == run["run_id"]
    assert card.lineage.dataset_fingerprint == run["dataset_fingerprint"]
    assert card.recipe is not None and card.recipe.patches.p == 0.5 and card.class_names == ["chelsea", "coffee"]
    words = show_model(champion, str(tmp_path / "preview.png"))
    assert card.sample in words and run["run_id"] in words
    previews = sorted((trained / "previews").glob("*.png"))
    with Image.open(tmp_path / "preview.png") as shown, Image.open(previews[-1]) as kept:
        assert np.array_equal(np.asarray(shown), np.asarray(kept))


def test_model_folder_has_a_description(trained: Path) -> None:
    card = describe_model(str(trained))
    assert card.lineage.run is None and card.evaluations == []


def test_compare_two_models(versions: Callable[[str, int], str], tmp_path: Path) -> None:
    from patchloom.models.checkpoints import load_sampling_model
    from patchloom.platform.tracking.registry import fetch_model

    name = versions("pair", 2)
    one, other = f"models:/{name}/1", f"models:/{name}/2"
    picture = tmp_path / "both.png"
    found = compare_models(one, other, picture=str(picture), seeds=3, steps=2)
    assert found.recipe == {} and found.metrics == [] and len(found.not_comparable) == 1
    assert "patchloom evaluate" in found.text()
    models = [load_sampling_model(fetch_model(reference).folder) for reference in (one, other)]
    images = [generate_padded(model, [0, 1, 2], [0, 1, 0], 8, Sampling(steps=2)) for model in models]
    with Image.open(picture) as opened:
        shown = np.asarray(opened)
    assert shown.shape[:2] == (2 * (2 * 16 + 2), 2 * (3 * 16 + 4))
    for row, made in enumerate(images):  # the same seeds as `patchloom sample`, twice as large
        corner = shown[36 * row : 36 * row + 32 : 2, 0:32:2]
        assert np.array_equal(corner, made[0].permute(1, 2, 0).numpy())
    add_evaluation(name, "1", 12.0)
    add_evaluation(name, "2", 11.0, n_samples=500)
    assert compare_models(one, other, picture=None).not_comparable == ["n_samples is 1000 and 500"]
    add_evaluation(name, "2", 11.5)
    (result,) = compare_models(one, other, picture=None).metrics
    assert result.values == {"fid": (12.0, 11.5), "precision": (0.5, 0.5)}


def test_compare_names_the_recipe_keys_that_differ(
    champion: str, pixels: Path, tmp_path: Path, ray_cluster: None
) -> None:
    from helpers import tiny_recipe

    from patchloom.pipelines.train import train

    recipe = tiny_recipe(patches__p=1.0, train__images=40, preview__every_images=0)
    train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    found = compare_models(champion, str(tmp_path / "run"), picture=None)
    assert found.recipe["patches.p"] == (0.5, 1.0) and found.recipe["train.images"] == (600, 40)
    assert "seed" not in found.recipe


def test_promote_if_better(versions: Callable[[str, int], str]) -> None:
    name = versions("earned", 3)

    def holder() -> str:
        return next(found.version for found in list_versions(name) if "champion" in found.aliases)

    assert promote_model(name, "1", if_better="fid") == "models:/earned@champion is version 1"  # there was no champion
    with pytest.raises(UserError, match=r"by fid: .*patchloom evaluate"):
        promote_model(name, "2", if_better="fid")
    add_evaluation(name, "1", 12.0)
    add_evaluation(name, "2", 11.0, steps=9)
    with pytest.raises(UserError, match="steps is 9 and 18"):
        promote_model(name, "2", if_better="fid")
    add_evaluation(name, "2", 12.5)
    with pytest.raises(UserError, match=r"version 1: FID 12\.5 .* 12; not promoted"):
        promote_model(name, "2", if_better="fid")
    with pytest.raises(UserError, match="beauty"):
        promote_model(name, "2", if_better="beauty")
    assert holder() == "1"
    add_evaluation(name, "3", 11.75)
    message = promote_model(name, "3", if_better="fid")
    assert "FID 11.75" in message and " 12)" in message
    assert holder() == "3"
    assert promote_model(name, "2") == "models:/earned@champion is version 2" and holder() == "2"


def test_delete_asks_for_confirmation(versions: Callable[[str, int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = versions("gone", 2)
    promote_model(name, "2")
    with pytest.raises(UserError, match=r"models:/gone/2 .*@champion.*--yes"):
        delete_model(name, "2")  # no terminal here
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: PTH123, SIM115
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda: "n")
    assert "models:/gone/2" not in delete_model(name, "2")
    monkeypatch.setattr("builtins.input", lambda: "y")
    assert "models:/gone/2" in delete_model(name, "2")
    assert [found.version for found in list_versions(name)] == ["1"]
    delete_model(name, "1", yes=True)
    assert list_versions(name) == []
    with pytest.raises(UserError, match="models:/gone/1"):
        delete_model(name, "1", yes=True)


def test_json_of_show_and_compare_has_the_same_keys_as_in_0_1(versions: Callable[[str, int], str]) -> None:
    reference = f"models:/{versions('json', 1)}/1"
    add_evaluation("json", "1", 12.0)
    shown = json.loads(describe_model(reference).to_json())
    assert list(shown) == ["reference", "aliases", "lineage", "kind", "resolution", "network", "images_seen",
                           "held_out_loss", "class_names", "evaluations", "recipe", "folder", "sample"]  # fmt: skip
    assert shown["recipe"]["patches"]["p"] == 0.5
    assert list(shown["lineage"]) == ["run", "dataset_fingerprint", "recipe_sha256", "code_version", "weights_sha256",
                                      "autoencoder_sha256"]  # fmt: skip
    assert list(shown["evaluations"][0]) == ["metrics", "identity", "digest"]
    compared = json.loads(compare_models(reference, reference, picture=None).to_json())
    assert list(compared) == ["models", "recipe", "metrics", "not_comparable", "picture"]
    assert compared["metrics"][0]["fid"] == [12.0, 12.0]
    assert list(compared["metrics"][0]) == ["digest", "circumstances", "fid", "precision"]


def test_models_list_prints_one_json_value(champion: str) -> None:
    code = "import sys; sys.argv = ['patchloom', 'models', 'list', '--json']; " \
           "from patchloom.pipelines.cli import main; main()"  # fmt: skip
    done = run_python(code, MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    rows = json.loads(done.stdout)
    assert "tiny" in {row["name"] for row in rows}
    assert list(rows[0]) == ["name", "version", "aliases", "run_id", "created_unix_s", "description", "tags"]
