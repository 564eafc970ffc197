"""Snapshots: the reference's pickles give the reference's numbers, and hostile ones are refused unrun."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchloom.models.checkpoints import CheckpointError, load_edm_snapshot

SHARED = Path(os.environ.get("PATCHLOOM_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data")).parent


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
def test_a_snapshot_denoises_as_the_reference(name: str) -> None:
    path = SHARED / "golden" / f"{name}.pkl"
    if not path.is_file():
        pytest.skip(f"no reference snapshot at {path}")
    denoiser = load_edm_snapshot(path)
    with np.load(path.with_suffix(".npz")) as archive:
        values = {key: torch.from_numpy(archive[key]) for key in archive.files if "/" in key or key == "labels"}
    for size in (32, 16, 8):
        noisy = values[f"s{size}/clean"] + values[f"s{size}/noise"]
        labels = values.get("labels")
        ours = denoiser(noisy, values[f"s{size}/sigma"], values[f"s{size}/coordinates"], labels)
        theirs = values[f"s{size}/denoised"]
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-5


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def storage_bytes(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "builtins.eval"), (exec, "builtins.exec"), (getattr, "builtins.getattr")],
)
@pytest.mark.parametrize("where", ["top", "nested", "tensor", "tensor as a raw pickle"])
def test_a_name_that_no_snapshot_needs_is_refused_and_not_run(
    function: Any, name: str, where: str, tmp_path: Path
) -> None:
    witness = tmp_path / "ran"
    arguments: dict[str, tuple[Any, ...]] = {
        "system": (f"touch {witness}",),
        "builtins.eval": (f"open({str(witness)!r}, 'w')",),
        "builtins.exec": (f"open({str(witness)!r}, 'w')",),
        "builtins.getattr": (witness, "touch"),
    }
    call = Call(function, *arguments[name])
    payload: Any = {"ema": call}
    if where == "nested":
        payload = {"ema": {"state": [{"deep": call}]}}
    elif where == "tensor":
        payload = {"ema": Call(torch.storage._load_from_bytes, storage_bytes(call))}
    elif where == "tensor as a raw pickle":
        payload = {"ema": Call(torch.storage._load_from_bytes, pickle.dumps(call))}
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match=name.rpartition(".")[2]):  # torch leaves `builtins` out
        load_edm_snapshot(tmp_path / "bad.pkl")
    assert not witness.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({"ema": 1, "other": list(range(1000))})
    for content, words in (
        (b"", "pickle"),
        (b"GIF89a, not a pickle", "pickle"),
        (whole[: len(whole) // 2], "pickle"),
        (whole, "ema"),
        (pickle.dumps([1, 2]), "ema"),
    ):
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            load_edm_snapshot(tmp_path / "bad.pkl")
    with pytest.raises(CheckpointError, match=r"none\.pkl"):
        load_edm_snapshot(tmp_path / "none.pkl")


def test_a_snapshot_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = SHARED / "golden" / "edm_ddpmpp.pkl"
    if not path.is_file():
        pytest.skip(f"no reference snapshot at {path}")
    (tmp_path / "cut.pkl").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="pickle"):
        load_edm_snapshot(tmp_path / "cut.pkl")
