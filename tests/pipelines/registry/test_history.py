"""The history of an alias, and the way back."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from evaluations import add_evaluation

from patchloom.errors import UserError
from patchloom.pipelines.registry.deleting import delete_model, prune_model
from patchloom.pipelines.registry.history import alias_history, rollback_alias
from patchloom.pipelines.registry.promoting import promote_model
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.aliases import KEPT_MOVES, move_alias
from patchloom.platform.tracking.client import connect, experiment_id
from patchloom.platform.tracking.versions import list_versions

MOVE = """
import sys
from patchloom.platform.tracking.aliases import move_alias
for number in range(6):
    move_alias("hurried", "champion", sys.argv[1 + number % 2], "promote")
"""


@pytest.fixture
def plain_versions() -> Callable[[str, int], str]:
    """Registers versions without files."""

    def make(name: str, count: int) -> str:
        client = connect()
        client.create_registered_model(name)
        for _ in range(count):
            client.create_model_version(name, "file:///nowhere", None)
        return name

    return make


def moves(name: str) -> list[tuple[str | None, str | None, str]]:
    return [(move.previous, move.version, move.action) for move in alias_history(name).moves]


def test_history_has_every_move_with_its_metric(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("told", 2)
    add_evaluation(name, "1", 12.0)
    add_evaluation(name, "2", 11.5)
    promote_model(name, "1")
    promote_model(name, "2", if_better="fid")
    promote_model(name, "2")  # does nothing
    assert moves(name) == [(None, "1", "promote"), ("1", "2", "promote")]
    history = alias_history(name)
    assert history.current == "2" and history.before == "1"
    assert "11.5" in history.moves[1].reason and "12" in history.moves[1].reason and "11.5" in history.text()
    assert alias_history(name, "candidate").moves == []


def test_rollback_goes_one_version_further_back_each_time(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("returned", 4)
    for version in "1243":
        promote_model(name, version)
    for version in ("4", "2", "1"):
        assert version in rollback_alias(name)
        assert alias_history(name).current == version
    with pytest.raises(UserError, match="models promote returned"):
        rollback_alias(name)
    promote_model(name, "3")
    assert alias_history(name).before == "1"
    assert moves(name)[3:7] == [
        ("4", "3", "promote"),
        ("3", "4", "rollback"),
        ("4", "2", "rollback"),
        ("2", "1", "rollback"),
    ]


def test_rollback_to_a_deleted_version_is_refused(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("lost", 3)
    for version in "123":
        promote_model(name, version)
    delete_model(name, "2", yes=True)
    with pytest.raises(UserError, match=r"version 2.*models promote lost"):
        rollback_alias(name)
    assert alias_history(name).current == "3"


def test_rollback_after_the_champion_was_deleted(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("widowed", 2)
    promote_model(name, "1")
    promote_model(name, "2")
    delete_model(name, "2", yes=True)
    assert moves(name)[-1] == ("2", None, "delete") and alias_history(name).current is None
    rollback_alias(name)
    assert alias_history(name).current == "1"


def test_alias_that_another_program_moved_can_be_rolled_back(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("foreign", 3)
    connect().set_registered_model_alias(name, "champion", "1")  # as older versions of Patchloom did
    promote_model(name, "2")
    assert alias_history(name).before == "1"
    connect().set_registered_model_alias(name, "champion", "3")
    assert alias_history(name).before == "2" and "version 3" in alias_history(name).text()


def test_history_is_bounded(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("restless", 2)
    for number in range(KEPT_MOVES + 3):
        move_alias(name, "champion", str(1 + number % 2), "promote")
    assert len(alias_history(name).moves) == KEPT_MOVES == len(connect().get_registered_model(name).tags)


def test_moves_that_earlier_versions_recorded_come_first(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("aged", 3)
    promote_model(name, "1")
    client = connect()
    for key, value in client.get_registered_model(name).tags.items():
        client.delete_registered_model_tag(name, key)
        client.set_registered_model_tag(name, key.replace("mlflow.patchloom.", "patchloom."), value)
    promote_model(name, "3")
    assert [move.version for move in alias_history(name).moves] == ["1", "3"] and alias_history(name).before == "1"


def test_moves_of_two_processes_are_both_kept(plain_versions: Callable[[str, int], str]) -> None:
    plain_versions("hurried", 4)
    processes = [subprocess.Popen([sys.executable, "-c", MOVE, *pair]) for pair in (("1", "2"), ("3", "4"))]
    assert [process.wait() for process in processes] == [0, 0]
    made = [move.version for move in alias_history("hurried").moves]
    assert len(made) == 12 and sorted(set(made)) == ["1", "2", "3", "4"]
    assert alias_history("hurried").current in made[-2:]


def test_history_of_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match="nonesuch"):
        alias_history("nonesuch")


def test_prune_keeps_new_versions_aliases_and_what_a_rollback_needs(plain_versions: Callable[[str, int], str]) -> None:
    name = plain_versions("crowded", 9)
    for version in "1357":
        promote_model(name, version)
    promote_model(name, "2", alias="candidate")
    dry = prune_model(name, keep=2, dry_run=True)
    assert not dry.is_done and [found.version for found in dry.deleted] == ["6", "4", "3", "1"]
    assert len(list_versions(name)) == 9
    with pytest.raises(UserError, match="--yes"):
        prune_model(name, keep=2)
    done = prune_model(name, keep=2, yes=True)
    assert done.deleted == dry.deleted and done.kept.keys() == {"7", "5", "2"}
    assert "models:/crowded/4" in done.text() and "mlflow gc" in done.text()
    assert [found.version for found in list_versions(name)] == ["9", "8", "7", "5", "2"]
    assert rollback_alias(name) and alias_history(name).current == "5"
    assert prune_model(name, keep=5, yes=True).deleted == []


def test_files_of_a_pruned_version_stay(trained: Path, changed_copy: Callable[[Path, float], Path]) -> None:
    for change in (0.5, 0.6):
        register(str(changed_copy(trained, change)), "emptied")
    run_id = list_versions("emptied", sort="version")[0].run_id
    found = connect().search_logged_models([experiment_id(connect())], filter_string=f"source_run_id = '{run_id}'")
    prune_model("emptied", keep=1, yes=True)
    assert [found.version for found in list_versions("emptied")] == ["2"]
    assert list(Path(unquote(found[0].artifact_location.removeprefix("file://"))).rglob("model.safetensors"))
