"""Damaged or unsafe models in the registry are refused, in one line, before anything of them is used."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from patchloom.models.checkpoints import CheckpointError, load_model
from patchloom.pipelines.cli import main
from patchloom.pipelines.registry.convert import export_model
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.aliases import move_alias
from patchloom.platform.tracking.client import connect
from patchloom.platform.tracking.registry import fetch_model

pytestmark = pytest.mark.ray
MODEL = "models:/tampered@champion"


@pytest.fixture(scope="module")
def kept(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in MLflow's store of a version that was registered from a folder named `my-weights`, not `model`."""
    folder = tmp_path_factory.mktemp("elsewhere") / "my-weights"
    shutil.copytree(trained / "model", folder)
    register(str(folder), "tampered", alias="champion")
    return fetch_model(MODEL).folder


@pytest.fixture
def stored(kept: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder, for a test to change; it is restored afterwards."""
    shutil.copytree(kept, tmp_path / "before")
    yield kept
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "before", kept)


@pytest.fixture
def refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs `patchloom sample`, which must fail with exit code 2 and write nothing; returns its one line of error."""

    def run(model: str) -> str:
        arguments = ["patchloom", "sample", model, str(tmp_path / "out"), "--seeds", "0", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        line = capsys.readouterr().err
        assert (left.value.code, line.count("\n")) == (2, 1), line
        assert line.startswith("patchloom: ")
        assert not (tmp_path / "out").exists()
        return line

    return run


def refused_by_mlflow(words: str) -> None:
    """`mlflow.pyfunc.load_model` raises an error with these words."""
    connect()
    with pytest.raises(CheckpointError, match=words):
        mlflow.pyfunc.load_model(MODEL)


def test_changed_byte_in_the_weights_is_refused(stored: Path, refusal: Callable[[str], str]) -> None:
    assert load_model(stored) is not None
    weights = bytearray((stored / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (stored / "model.safetensors").write_bytes(weights)
    for model in (MODEL, str(stored)):
        error = refusal(model)
        assert "model.safetensors" in error and "sha256" in error
    refused_by_mlflow("sha256")


PICKLES = {
    "extra.pkl": b"anything",
    "pytorch_model.bin": b"anything",
    "last.ckpt": b"",
    "deeper/weights.pt": b"anything",
    "notes.txt": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("name", PICKLES)
def test_model_folder_with_a_pickle_is_refused(name: str, stored: Path, refusal: Callable[[str], str]) -> None:
    (stored / name).parent.mkdir(exist_ok=True)
    (stored / name).write_bytes(PICKLES[name])
    error = refusal(MODEL)
    assert name in error and "pickle" in error
    refused_by_mlflow("pickle")


def test_edited_card_is_refused(stored: Path, refusal: Callable[[str], str]) -> None:
    card = json.loads((stored / "model.json").read_text())
    for change in ({"class_names": ["other", "names"]}, {"denoiser": card["denoiser"] | {"sigma_data": 0.25}}):
        (stored / "model.json").write_text(json.dumps(card | change))
        for model in (MODEL, str(stored)):
            assert "model.json was changed" in refusal(model)
        refused_by_mlflow("model.json was changed")


def test_weights_and_card_exchanged_together_are_refused(
    stored: Path, trained: Path, changed_copy: Callable[[Path, float], Path], refusal: Callable[[str], str]
) -> None:
    other = changed_copy(trained, 0.5)
    for name in ("model.safetensors", "model.json", "files.json"):
        shutil.copyfile(other / name, stored / name)
    assert load_model(stored) is not None
    assert "models:/tampered/1" in refusal(MODEL)
    (stored / "files.json").unlink()
    assert "files.json is missing" in refusal(MODEL)


def test_version_of_an_earlier_release_is_compared_with_the_sha256_of_its_weights(
    stored: Path, trained: Path, changed_copy: Callable[[Path, float], Path], refusal: Callable[[str], str]
) -> None:
    client, wanted = connect(), connect().get_model_version("tampered", "1").tags["files_sha256"]
    client.delete_model_version_tag("tampered", "1", "files_sha256")
    (stored / "files.json").unlink()
    assert fetch_model(MODEL).folder == stored
    other = changed_copy(trained, 0.5)
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(other / name, stored / name)
    assert "other weights" in refusal(MODEL)
    client.set_model_version_tag("tampered", "1", "files_sha256", wanted)


def test_link_out_of_a_model_folder_is_neither_exported_nor_registered(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "private").write_text("private")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match="link out of the model folder"):
        export_model(str(tmp_path / "model"), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="link out of the model folder"):
        register(str(tmp_path / "model"), "linked")
    assert not (tmp_path / "out").exists()
    (tmp_path / "model" / "notes.txt").unlink()
    (tmp_path / "model" / "notes.txt").write_text("my notes")  # a file of a user is no part of the model
    assert (export_model(str(tmp_path / "model"), str(tmp_path / "out")) / "notes.txt").is_file()


def test_model_of_a_newer_format_is_refused(stored: Path, refusal: Callable[[str], str]) -> None:
    card = json.loads((stored / "model.json").read_text())
    (stored / "model.json").write_text(json.dumps(card | {"format_version": 99}))
    assert "format 99" in refusal(MODEL)
    refused_by_mlflow("format 99")


def test_truncated_or_missing_card_is_refused(stored: Path, refusal: Callable[[str], str]) -> None:
    (stored / "model.json").write_text("{")
    assert "JSON" in refusal(MODEL)
    (stored / "model.json").unlink()
    assert "model.json" in refusal(MODEL)


def test_unknown_alias_version_and_name_are_refused(kept: Path, trained: Path, refusal: Callable[[str], str]) -> None:
    for wrong in ("tampered@chmpion", "tampered/99", "tempered@champion"):
        error = refusal(f"models:/{wrong}")
        assert f"models:/{wrong} " in error and "sqlite:" in error
    assert "models:/NAME@ALIAS" in refusal("models:/tampered")
    client = connect()
    source = client.get_model_version("tampered", "1").source
    version = client.create_model_version("tampered", source).version
    move_alias("tampered", "shortly", str(version), "promote")
    assert fetch_model("models:/tampered@shortly").version == str(version)
    client.delete_model_version("tampered", version)
    for gone in (f"tampered/{version}", "tampered@shortly"):
        assert f"models:/{gone} " in refusal(f"models:/{gone}")
    assert fetch_model(MODEL).folder == kept
