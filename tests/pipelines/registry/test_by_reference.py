"""Versions that refer to a model in an object store: nothing is uploaded, and what is fetched is checked."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
from helpers import environment

import patchloom
from patchloom.errors import UserError
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample.sampler import Sampler
from patchloom.platform.files.folder import Folder
from patchloom.platform.tracking.registry import fetch_model
from patchloom.platform.tracking.versions import list_versions


@pytest.fixture
def remote_run(trained: Path, s3: str, request: pytest.FixtureRequest) -> str:
    """A copy of the tiny run in the object store."""
    address = f"{s3}/{request.node.name}/run"
    there = Folder.at(address)
    for name in ("run.json", "recipe.yaml", "progress.jsonl"):
        there.put(trained / name, name)
    for name in Folder(str(trained / "model")).files():
        there.put(trained / "model" / name, f"model/{name}")
    return address


def test_version_by_reference_samples_as_the_model(remote_run: str, trained: Path, tmp_path: Path) -> None:
    reference = register(remote_run, "far", by_reference=True)
    (version,) = list_versions("far")
    assert version.tags["address"] == f"{remote_run}/model" and remote_run in version.description
    artifacts = Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=str(tmp_path / "copy")))
    assert not list(artifacts.rglob("*.safetensors"))
    expected = Sampler(str(trained / "model"), steps=2)({"seed": np.array([0, 1])})["image"]
    with environment(PATCHLOOM_CACHE=str(tmp_path / "cache")):  # of another node
        assert np.array_equal(Sampler(reference, steps=2)({"seed": np.array([0, 1])})["image"], expected)
    assert patchloom.load_model(reference).resolution == 16
    table = mlflow.pyfunc.load_model(reference).predict(pandas.DataFrame({"seed": [0, 1]}), params={"steps": 2})
    assert list(table["seed"]) == [0, 1]


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_file_that_is_gone_or_changed_is_named(remote_run: str, change: str, tmp_path: Path) -> None:
    reference = register(remote_run, f"far-{change}", by_reference=True)
    there = Folder.at(f"{remote_run}/model")
    if change == "gone":
        there.remove("recipe.yaml")
    else:
        there.write("model.json", json.dumps(there.read_json("model.json") | {"name": "other"}).encode())
    # another node: this one has a copy, because MLflow tries the model when it is registered
    with environment(PATCHLOOM_CACHE=str(tmp_path)), pytest.raises(UserError, match=change) as refused:
        fetch_model(reference)
    assert f"{remote_run}/model/{'recipe.yaml' if change == 'gone' else 'model.json'}" in str(refused.value)


def test_local_folder_is_not_registered_by_reference(trained: Path) -> None:
    with pytest.raises(UserError, match="s3://"):
        register(str(trained), "near", by_reference=True)
