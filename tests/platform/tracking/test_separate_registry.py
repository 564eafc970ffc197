"""Runs in one MLflow store and registered models in another (MLFLOW_REGISTRY_URI)."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from helpers import environment, free_port

from patchloom.errors import UserError
from patchloom.pipelines.registry.deleting import prune_model
from patchloom.pipelines.registry.history import alias_history
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample import sample
from patchloom.platform.tracking.client import connect, require_reachable
from patchloom.platform.tracking.registry import fetch_model
from patchloom.platform.tracking.runs import log_metrics
from patchloom.platform.tracking.store import registry_uri, store_environment
from patchloom.platform.tracking.versions import list_versions


@pytest.fixture
def registry(mlflow_store: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a second store; the tests' own store keeps the runs."""
    with environment(MLFLOW_REGISTRY_URI=f"sqlite:///{tmp_path}/registry.db"):
        yield f"sqlite:///{tmp_path}/registry.db"
    connect()  # the next test's client has one store again


def test_versions_are_in_the_registry_and_runs_are_in_the_tracking_store(registry: str, trained: Path) -> None:
    reference = register(str(trained), "apart", alias="champion")
    run_id = json.loads((trained / "run.json").read_text())["run_id"]
    log_metrics(run_id, {"fid": 12.0})
    (version,) = list_versions("apart", where=["fid < 13"])
    assert version.run_id == run_id and version.aliases == ["champion"]
    assert alias_history("apart").current == "1" and prune_model("apart", keep=1, yes=True).deleted == []
    elsewhere = mlflow.MlflowClient(registry_uri=store_environment()["MLFLOW_TRACKING_URI"])
    assert "apart" not in {model.name for model in elsewhere.search_registered_models()}
    assert mlflow.MlflowClient(tracking_uri=registry).search_runs(["0"]) == []
    assert fetch_model("models:/apart@champion").reference == reference


@pytest.mark.ray
@pytest.mark.slow
def test_workers_and_pyfunc_find_both_stores(registry: str, trained: Path, tmp_path: Path) -> None:
    reference = register(str(trained), "apart", alias="champion")
    # a worker of Ray has the environment of another time
    assert sample(reference, str(tmp_path / "samples"), "0-3", steps=2, workers=1).images == 4
    assert mlflow.pyfunc.load_model("models:/apart@champion") is not None


def test_registry_address_is_absolute_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with environment(MLFLOW_REGISTRY_URI="sqlite:///registry.db"):
        assert store_environment()["MLFLOW_REGISTRY_URI"] == registry_uri() == f"sqlite:///{tmp_path}/registry.db"
    assert registry_uri() == store_environment()["MLFLOW_TRACKING_URI"]


def test_registry_that_does_not_answer_is_named() -> None:
    address = f"http://user:secret@127.0.0.1:{free_port()}"
    with environment(MLFLOW_REGISTRY_URI=address):
        for work in (require_reachable, list_versions):
            with pytest.raises(UserError, match=address.replace("user:secret@", "")) as refused:
                work()
            assert "MLFLOW_REGISTRY_URI" in str(refused.value) and "secret" not in str(refused.value)
