"""The MLflow store: addresses of files in odd folders, deleted experiments, copied projects, and the store of a run."""

import os
import shutil
import sys
from pathlib import Path

import mlflow
import pytest
from helpers import tiny_recipe

from patchloom.errors import UserError
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.train import train
from patchloom.platform.records.run import RunCard
from patchloom.platform.tracking.client import connect, experiment_id, is_reachable, require_reachable
from patchloom.platform.tracking.registry import fetch_model
from patchloom.platform.tracking.runs import begin_run, failed_on_error, log_artifacts, run_status
from patchloom.platform.tracking.store import database_path, relocate, shown_uri, tracking_uri
from patchloom.platform.tracking.versions import list_versions


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a store; the store is its `mlflow.db`."""
    enter(tmp_path, monkeypatch)
    return tmp_path


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder as a new process would: MLflow's client writes its address to the environment."""
    folder.mkdir(exist_ok=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)


def new_run(file: Path) -> str:
    run_id = begin_run("run", "train", {}, {})
    file.write_text("content")
    log_artifacts(run_id, file)
    return run_id


@pytest.mark.parametrize("name", ["50%20x", "j%2Fx", "q?r", "h#i", "a b", "ü&=;+x"])
def test_database_and_artifacts_are_in_the_working_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = project / name
    enter(folder, monkeypatch)
    run_id = new_run(folder / "f.txt")
    assert (folder / "mlflow.db").is_file() and database_path() == folder / "mlflow.db"
    assert (folder / "mlruns" / "patchloom" / run_id / "artifacts" / "f.txt").read_text() == "content"
    fetched = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="f.txt")
    assert Path(fetched).read_text() == "content"
    assert is_reachable()  # asks the file itself
    files = [path.relative_to(project) for path in project.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} == {name}


@pytest.mark.parametrize("name", ["/x/team", "../up", "..", "a/b", "c:d"])
def test_experiment_name_is_one_folder(project: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    location = connect().get_experiment(experiment_id(connect())).artifact_location
    folder = Path(location.removeprefix("file://"))
    assert folder.parent == project / "mlruns" and folder.name not in ("", ".", "..")


def test_relative_address_of_the_user_is_below_the_working_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(project / "50%20x", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my.db?timeout=9")
    assert database_path() == project / "50%20x" / "my.db" and tracking_uri().endswith("?timeout=9")


def test_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:secret@127.0.0.1:9/store")
    with pytest.raises(UserError) as refused:
        require_reachable()
    assert "127.0.0.1:9" in str(refused.value) and "secret" not in str(refused.value) + shown_uri()


def test_deleted_experiment_is_refused_with_its_id(
    project: Path, monkeypatch: pytest.MonkeyPatch, pixels: Path, trained: Path
) -> None:
    identity = experiment_id(connect())
    connect().delete_experiment(identity)
    for work in (
        require_reachable,
        lambda: train(tiny_recipe(), str(pixels), str(project / "run"), workers=0),
        lambda: register(str(trained), "model"),
    ):
        with pytest.raises(UserError) as refused:
            work()
        assert f"--experiment-id {identity}" in str(refused.value)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    require_reachable()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    connect().restore_experiment(identity)
    require_reachable()


def test_run_of_another_store_is_named_with_both_stores(trained: Path, project: Path) -> None:
    card = RunCard.read(trained)
    with pytest.raises(UserError) as refused:
        register(str(trained), "model")
    assert all(text in str(refused.value) for text in (str(card.run_id), str(card.tracking_uri), shown_uri()))
    assert list_versions() == []
    # the way out that the message offers
    assert register(str(trained / "model"), "model") == "models:/model/1"


def test_copied_project_is_refused_until_it_is_relocated(
    trained: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = project / "old", project / "new %20"
    enter(old, monkeypatch)
    register(str(trained / "model"), "model")
    run_id = new_run(old / "f.txt")
    before = sorted(path.relative_to(old) for path in old.rglob("*"))
    shutil.copytree(old, new)
    enter(new, monkeypatch)
    for work in (require_reachable, lambda: new_run(new / "g.txt"), lambda: register(str(trained / "model"), "other")):
        with pytest.raises(UserError) as refused:
            work()
        assert str(old / "mlruns") in str(refused.value) and "models relocate" in str(refused.value)
    assert sorted(path.relative_to(old) for path in old.rglob("*")) == before
    assert str(old / "mlruns") in relocate()
    shutil.rmtree(old)
    require_reachable()
    new_run(new / "g.txt")
    assert Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="f.txt")).read_text() == "content"
    assert (fetch_model("models:/model/1").folder / "model.safetensors").is_file()
    assert not old.exists()
    addresses = {
        connect().get_run(run_id).info.artifact_uri,
        connect().get_experiment(experiment_id(connect())).artifact_location,
    }
    assert all(address.startswith((new / "mlruns").as_uri() + "/") for address in addresses)
    assert str(old) not in relocate()


def test_artifacts_that_the_user_put_elsewhere_are_accepted(project: Path) -> None:
    connect().create_experiment("patchloom", artifact_location=(project.parent / "elsewhere").as_uri())
    require_reachable()
    assert experiment_id(connect())


def test_project_behind_a_link_is_the_same_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(project / "real", monkeypatch)
    experiment_id(connect())
    (project / "link").symlink_to(project / "real")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'link' / 'mlflow.db'}")
    require_reachable()
    assert os.environ["MLFLOW_TRACKING_URI"].endswith("link/mlflow.db")


def test_a_missing_package_for_the_artifacts_is_an_error_before_the_run(
    project: Path, pixels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reachable()
    connect().delete_experiment(experiment_id(connect()))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "away")
    connect().create_experiment("away", artifact_location="s3://key:secret@bucket/artifacts")
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"patchloom\[s3\]") as refused:
        train(tiny_recipe(), str(pixels), str(project / "run"), workers=0)
    assert "secret" not in str(refused.value)
    assert not (project / "run" / "run.json").exists()
    identity = connect().get_experiment_by_name("away").experiment_id
    assert not connect().search_runs([identity])


def test_a_run_that_fails_before_its_first_step_is_not_left_running(project: Path) -> None:
    run_id = begin_run("run", "train", {}, {})
    with pytest.raises(ZeroDivisionError), failed_on_error(run_id):
        _ = 1 / 0
    assert run_status(run_id) == "FAILED"
