"""Names and aliases that MLflow or a model reference cannot hold are refused before any work."""

from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.pipelines.registry.deleting import delete_model
from patchloom.pipelines.registry.promoting import promote_model
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.train.autoencoder import train_autoencoder
from patchloom.pipelines.tune.tuning import tune
from patchloom.platform.tracking.client import connect
from patchloom.platform.tracking.names import check_alias, check_name
from patchloom.platform.tracking.versions import list_versions

BAD_NAMES = ("bob's", 'a"b', "a/b", "x:y", "a@b", "a%2Fb", "", " a", "..", "a\nb", "n" * 256)
BAD_ALIASES = ("latest", "LATEST", "v3", "V12", "a b", "", "a.b", "a@b", "n" * 256)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name_is_refused_before_the_source_is_read(name: str) -> None:
    for work in (
        lambda: register("no such folder", name),
        lambda: train_autoencoder("no such dataset", "ae", register=name),
        lambda: tune("no such search", "no such dataset", "search", register_best=name),
    ):
        with pytest.raises(UserError) as refused:
            work()
        assert "no such" not in str(refused.value) and "\n" not in str(refused.value)
        assert repr(name[:80]) in str(refused.value)


@pytest.mark.parametrize("alias", BAD_ALIASES)
def test_bad_alias_is_refused_before_a_version_exists(champion: str, trained: Path, alias: str) -> None:
    with pytest.raises(UserError) as refused:
        register(str(trained), "unseen", alias=alias)
    assert repr(alias[:80]) in str(refused.value)
    assert list_versions("unseen") == []
    with pytest.raises(UserError):
        promote_model("tiny", "1", alias)


def test_plain_names_and_aliases_are_accepted() -> None:
    for name in ("my-model", "my model", "ffhq_64.v2", "größe", "模型"):
        assert check_name(name) == name
    for alias in ("champion", "candidate_2", "v3x", "best-so-far"):
        assert check_alias(alias) == alias


def test_registry_with_a_quote_in_a_name_stays_usable(champion: str, trained: Path) -> None:
    """Other programs and older versions can have written such names."""
    client = connect()
    client.create_registered_model("bob's")
    run_id = next(version.run_id for version in list_versions("tiny"))
    for _ in range(2):
        client.create_model_version("bob's", str(trained / "model"), run_id)
    assert [version.version for version in list_versions("bob's")] == ["2", "1"]
    assert {version.name for version in list_versions()} >= {"bob's", "tiny"}
    delete_model("bob's", "2", yes=True)
    delete_model("bob's", "1", yes=True)
    assert list_versions("bob's") == []
    assert "bob's" not in {model.name for model in client.search_registered_models()}
