"""A search in an object store: the same results as a local one, its page and models, and a driver that is killed."""

import contextlib
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from helpers import start_cli, tiny_recipe, wait_until
from ray.tune import Tuner

from patchloom.errors import UserError
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.report import report
from patchloom.pipelines.train import train
from patchloom.pipelines.tune import tune
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.records.search import TrialRow, read_trials

pytestmark = pytest.mark.ray
BY_CHANCE = {"seconds", "run_id"}


def write_search(folder: Path, **changes: object) -> str:
    (folder / "base.yaml").write_text(recipe_yaml(tiny_recipe()))
    search = {
        "name": "remote",
        "recipe": "base.yaml",
        "space": {"patches.p": {"grid": [0.5, 1.0]}},
        "budget": {"updates": 5},
        **changes,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(search))
    return str(folder / "search.yaml")


def numbers(rows: list[TrialRow]) -> list[dict[str, Any]]:
    """The rows without what differs from run to run."""
    return [{key: value for key, value in row.to_dict().items() if key not in BY_CHANCE} for row in rows]


@pytest.mark.slow
def test_a_remote_search_gives_what_a_local_one_gives(ray_cluster: None, s3: str, pixels: Path, tmp_path: Path) -> None:
    path, there = write_search(tmp_path), Folder.at(f"{s3}/search")
    local = tune(path, str(pixels), str(tmp_path / "search"))
    remote = tune(path, str(pixels), str(there), register_best="remote-search")
    assert numbers(remote.trials) == numbers(local.trials) == numbers(read_trials(there))
    for name in ("best.yaml", "search.yaml"):
        assert there.read(name) == (tmp_path / "search" / name).read_bytes()
    best = f"trials/{local.trials[0].name}"
    for name in ("model/model.safetensors", "recipe.yaml", local.trials[0].preview):
        assert there.read(f"{best}/{name}") == (tmp_path / "search" / best / str(name)).read_bytes()
    assert not [name for name in there.files() if name.startswith(".")]  # no state of Ray Tune, no fence
    page = there.read("report.html").decode()
    assert page.count("data:image/png") == (tmp_path / "search" / "report.html").read_text().count("data:image/png") > 0
    version = mlflow.MlflowClient().get_model_version("remote-search", "1")
    assert version.run_id == remote.trials[0].run_id

    with pytest.raises(UserError, match="--restore"):
        tune(path, str(pixels), str(there))
    restored = tune(path, str(pixels), str(there), restore=True)
    assert restored.trials == remote.trials
    written = report(str(there), f"{s3}/pages/search.html")
    assert Folder.at(f"{s3}/pages").read("search.html") == written.read_bytes()
    assert page.count("data:image/png") == written.read_text().count("data:image/png")
    assert register(f"{there}/{best}", "of-a-trial").startswith("models:/of-a-trial/")
    trial = train(None, None, f"{there}/{best}", resume=True, workers=0)
    assert trial.run_id == remote.trials[0].run_id and trial.last.step == 5


@pytest.mark.slow
def test_a_remote_search_whose_driver_was_killed_continues_on_another_node(
    s3: str, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search with Optuna and ASHA, whose state is that of Ray Tune."""
    monkeypatch.setenv("PATCHLOOM_FENCE_EXPIRES_S", "5")
    changes: dict[str, Any] = {
        "space": {"patches.p": {"uniform": [0, 1]}},
        "set": {"preview.every_images": 0},
        "searcher": "tpe",
        "trials": 4,
        "scheduler": {"kind": "asha", "grace": 0.9, "reduction": 2},
        "of_budget": {"train.held_out_every_images": 0.5},
        "budget": {"updates": 200},
    }
    path, there = write_search(tmp_path, **changes), Folder.at(f"{s3}/killed")
    command = ["tune", path, "--data", str(pixels), "--out", str(there), "--concurrent", "1"]
    process = start_cli(*command, cwd=tmp_path)
    wait_until(lambda: has_state_of(there, "000"), process)
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.communicate()
    before = {name: there.read(name) for name in there.files() if name.endswith("/trial.json")}
    assert 1 <= len(before) < 4
    system, state = there.folder(".ray/tune").system()
    assert Tuner.can_restore(state, system)
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "another node"))
    ended = start_cli(*command, "--restore", cwd=tmp_path)
    output, _ = ended.communicate(timeout=600)
    assert ended.returncode == 0, output
    rows = read_trials(there)
    assert sorted(row.name for row in rows) == ["000", "001", "002", "003"]
    assert before == {name: there.read(name) for name in before}
    for name, content in before.items():
        assert TrialRow.parse(content, name) in rows
    assert not [name for name in there.files() if name.startswith(".")]
    assert f"{there}/report.html" in output


def has_state_of(search: Folder, finished: str) -> bool:
    """Whether a trial has finished and the state of Ray Tune is in the store."""
    names = search.files()
    is_stored = any(name.startswith(".ray/") and "experiment_state" in name for name in names)
    return is_stored and f"trials/{finished}/trial.json" in names
