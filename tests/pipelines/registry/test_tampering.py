"""What a registry should not hand out is refused, in one clear line, before anything of it is used."""

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
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.registry import fetch_model, promote
from patchloom.platform.tracking.runs import connect

pytestmark = pytest.mark.ray
MODEL = "models:/tampered@champion"


@pytest.fixture(scope="module")
def kept(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in MLflow's store of a version that was registered from a folder of another name than `model`."""
    folder = tmp_path_factory.mktemp("elsewhere") / "my-weights"
    shutil.copytree(trained / "model", folder)
    register(str(folder), "tampered", alias="champion")
    return fetch_model(MODEL).folder


@pytest.fixture
def stored(kept: Path, tmp_path: Path) -> Iterator[Path]:
    """That folder, to be changed, and as it was afterwards."""
    shutil.copytree(kept, tmp_path / "before")
    yield kept
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "before", kept)


@pytest.fixture
def refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """The one line that `patchloom sample` says of a model, with exit code 2 and nothing written."""

    def refused(model: str) -> str:
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

    return refused


def refused_by_mlflow(words: str) -> None:
    """MLflow's own way refuses it too."""
    connect()
    with pytest.raises(CheckpointError, match=words):
        mlflow.pyfunc.load_model(MODEL)


def test_a_changed_byte_of_the_weights_is_refused_everywhere(stored: Path, refusal: Callable[[str], str]) -> None:
    assert load_model(stored) is not None  # as it was registered
    weights = bytearray((stored / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (stored / "model.safetensors").write_bytes(weights)
    assert "model.safetensors has sha256" in refusal(MODEL)
    assert "model.safetensors has sha256" in refusal(str(stored))
    refused_by_mlflow("has sha256")


PICKLES = {
    "extra.pkl": b"anything",
    "pytorch_model.bin": b"anything",
    "last.ckpt": b"",
    "deeper/weights.pt": b"anything",
    "notes.txt": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_model_folder_with_a_pickle_is_refused_everywhere(
    name: str, stored: Path, refusal: Callable[[str], str]
) -> None:
    (stored / name).parent.mkdir(exist_ok=True)
    (stored / name).write_bytes(PICKLES[name])
    assert f"{name} is a pickle, which could run anything" in refusal(MODEL)
    refused_by_mlflow("is a pickle")


def test_a_model_of_a_newer_format_is_refused_everywhere(stored: Path, refusal: Callable[[str], str]) -> None:
    card = json.loads((stored / "model.json").read_text())
    (stored / "model.json").write_text(json.dumps(card | {"format_version": 99}))
    assert "has format 99 and this version reads up to 1: update patchloom" in refusal(MODEL)
    refused_by_mlflow("update patchloom")


def test_a_card_that_is_cut_off_or_gone_is_refused(stored: Path, refusal: Callable[[str], str]) -> None:
    (stored / "model.json").write_text("{")
    assert "is not JSON" in refusal(MODEL)
    (stored / "model.json").unlink()
    assert "holds no model.json" in refusal(MODEL)


def test_an_alias_a_version_and_a_name_that_are_not_there(
    kept: Path, trained: Path, refusal: Callable[[str], str]
) -> None:
    for wrong in ("tampered@chmpion", "tampered/99", "tempered@champion"):
        assert f"models:/{wrong} is not in the registry at sqlite:" in refusal(f"models:/{wrong}")
    assert "is not of the form models:/NAME@ALIAS" in refusal("models:/tampered")
    client = connect()
    source = client.get_model_version("tampered", "1").source
    version = client.create_model_version("tampered", source).version
    promote("tampered", str(version), "shortly")
    assert fetch_model("models:/tampered@shortly").version == str(version)
    client.delete_model_version("tampered", version)
    for gone in (f"tampered/{version}", "tampered@shortly"):
        assert f"models:/{gone} is not in the registry" in refusal(f"models:/{gone}")
    assert fetch_model(MODEL).folder == kept
