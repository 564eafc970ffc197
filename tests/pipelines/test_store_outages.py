"""Remote runs while the store fails, and two commands on one remote run."""

from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from helpers import assert_equal_models, start_cli, tiny_recipe, wait_until

from patchloom.pipelines.train.checkpointer import whole_checkpoints
from patchloom.platform.files.cache import cache_entries
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml

pytestmark = pytest.mark.slow  # test_copies.py and test_fence.py have faster tests of the parts


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with a cache of its own and the recipe, whose fences expire soon."""
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHLOOM_FENCE_EXPIRES_S", "4")
    monkeypatch.setenv("PATCHLOOM_STORE_WAIT_S", "2")
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe()))
    return tmp_path


def test_a_run_that_ends_during_an_outage_is_sent_by_resume(
    s3: str, s3_environment: str, trained: Path, pixels: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Folder.at(f"{s3}/runs/outage")
    with FaultyProxy(s3_environment) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        command = ["train", "recipe.yaml", "--data", str(pixels), "--out", str(run), "--workers", "0"]
        process = start_cli(*command, cwd=node)
        copy = next((node / "cache" / "runs").glob("outage-*-worker"), None)
        wait_until(lambda: list((node / "cache" / "runs").glob("outage-*-worker/checkpoints/step-*/*.json")), process)
        proxy.set("503")
        said = process.communicate(timeout=200)[0]
        copy = next((node / "cache" / "runs").glob("outage-*-worker"))
        assert process.returncode == 2, said
        last = said.strip().splitlines()[-1]
        assert str(run) in last and str(copy) in last and "--resume" in last
        assert [entry.is_unsent for entry in cache_entries("runs") if entry.path == copy] == [True]
        written = (copy / "model" / "model.safetensors").stat().st_mtime_ns
        proxy.set("ok")
        again = start_cli(*command, "--resume", cwd=node)
        said = again.communicate(timeout=200)[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment)
    assert again.returncode == 0, said
    assert (copy / "model" / "model.safetensors").stat().st_mtime_ns == written  # sent, not trained again
    run.fetch("model/model.safetensors", node / "sent" / "model" / "model.safetensors")
    assert_equal_models(node / "sent", trained)
    assert not {".writer.json", ".fence.json"} & run.files().keys()
    assert f"model: {run}/model" in said


def test_a_second_driver_is_refused_and_a_retry_of_a_killed_one_resumes(
    s3: str, trained: Path, pixels: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Folder.at(f"{s3}/runs/fenced")
    command = ["train", "recipe.yaml", "--data", str(pixels), "--out", str(run), "--workers", "0"]
    first = start_cli(*command, cwd=node)
    wait_until(lambda: whole_checkpoints(run), first)
    monkeypatch.setenv("PATCHLOOM_CACHE", str(node / "second"))
    second = start_cli(*command, "--resume", cwd=node)
    said = second.communicate(timeout=100)[0]
    if first.poll() is None:
        assert second.returncode == 2 and str(first.pid) in said.splitlines()[-1], said
    first.kill()
    first.communicate()
    monkeypatch.setenv("PATCHLOOM_CACHE", str(node / "third"))
    third = start_cli(*command, "--resume", cwd=node)
    said = third.communicate(timeout=200)[0]
    assert third.returncode == 0, said
    run.fetch("model/model.safetensors", node / "sent" / "model" / "model.safetensors")
    assert_equal_models(node / "sent", trained)
