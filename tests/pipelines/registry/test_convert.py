"""Import of EDM snapshots and export as safetensors: both verify the model and overwrite nothing."""

import pickle
from pathlib import Path

import pytest
import torch
from helpers import SHARED_DATA
from safetensors.torch import load_file

from patchloom.errors import UserError
from patchloom.models.checkpoints import CheckpointError, load_edm_snapshot, load_model, load_sampling_model, read_card
from patchloom.models.generate import Sampling, generate
from patchloom.pipelines.registry.convert import export_model, import_model
from patchloom.pipelines.registry.registering import register
from patchloom.platform.tracking.registry import fetch_model

SHARED = SHARED_DATA.parent
SNAPSHOT = SHARED / "golden" / "edm_adm.pkl"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SNAPSHOT.is_file():
        pytest.skip(f"no reference snapshot at {SNAPSHOT}")
    return import_model(str(SNAPSHOT), str(tmp_path_factory.mktemp("imported") / "model"))


def test_imported_snapshot_can_be_loaded_and_sampled(imported: Path) -> None:
    snapshot, model = load_edm_snapshot(SNAPSHOT), load_model(imported)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(snapshot(x, 0.7), model(x, 0.7))
    made = generate(load_sampling_model(imported), [0, 1], [0, 4], Sampling(steps=2))
    assert made.shape == (2, 3, 32, 32) and made.dtype == torch.uint8


@pytest.mark.ray
def test_imported_model_can_be_registered_and_exported_unchanged(imported: Path, tmp_path: Path) -> None:
    reference = register(str(imported), "imported", alias="champion")
    assert register(str(imported), "imported") == reference  # the same weights are the same version
    folder = export_model("models:/imported@champion", str(tmp_path / "out"))
    before, after = (load_file(place / "model.safetensors") for place in (imported, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (folder / "model.json").read_bytes() == (imported / "model.json").read_bytes()
    assert fetch_model(reference).run_id


def test_import_and_export_do_not_write_into_a_folder_with_files(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for write in (lambda out: export_model(str(imported), out), lambda out: import_model(str(SNAPSHOT), out)):
        with pytest.raises(UserError, match=str(tmp_path / "mine")):
            write(str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_exported_model_can_be_imported(imported: Path, tmp_path: Path) -> None:
    exported = export_model(str(imported), str(tmp_path / "out"))
    again = import_model(str(exported), str(tmp_path / "in"))
    assert (again / "model.safetensors").read_bytes() == (imported / "model.safetensors").read_bytes()
    assert read_card(again) == read_card(imported)


def test_damaged_model_is_not_exported(imported: Path, tmp_path: Path) -> None:
    folder = export_model(str(imported), str(tmp_path / "copy"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="sha256"):
        export_model(str(folder), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_failed_import_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ema": eval}))
    with pytest.raises(CheckpointError, match=r"builtins\.eval"):
        import_model(str(tmp_path / "evil.pkl"), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"nowhere\.pkl"):
        import_model(str(tmp_path / "nowhere.pkl"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pkl"]
