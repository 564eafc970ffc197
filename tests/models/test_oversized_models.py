"""Models that ask for too much: cards, safetensors and pickles of a few bytes that would take gigabytes or hours."""

import hashlib
import io
import json
import pickle
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_bounded

from patchloom.models import snapshots
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import (
    CheckpointError,
    is_pickle,
    load_edm_snapshot,
    load_model,
    load_sampling_model,
    read_card,
    sampling_skeleton,
    save_model,
    stored_shapes,
)
from patchloom.models.denoiser import Denoiser
from patchloom.models.normalisation import pixel_normalisation
from patchloom.pickles import scan_pickle

LOAD = "from patchloom.models.checkpoints import CheckpointError, load_edm_snapshot, load_model"
BILLION = 10**9


@pytest.fixture
def folder(tiny_denoiser: Callable[..., Denoiser], tiny_config: Callable[..., DenoiserConfig], tmp_path: Path) -> Path:
    save_model(tmp_path, tiny_denoiser(), ModelCard(denoiser=tiny_config(), normalisation=pixel_normalisation()))
    (tmp_path / "files.json").unlink()  # whoever changes the other files can change it too
    return tmp_path


def change(folder: Path, part: dict[str, Any] | None = None, **options: Any) -> None:
    card = json.loads((folder / "model.json").read_text())
    card["denoiser"] |= part or {}
    card["denoiser"]["network_options"] |= options
    (folder / "model.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("part", "options", "named"),
    [
        ({}, {"blocks": BILLION}, "blocks"),
        ({}, {"width": BILLION}, "width"),
        ({}, {"width_multipliers": [1] * 1000}, "width_multipliers"),
        ({}, {"width_multipliers": [BILLION, 1]}, "width_multipliers"),
        ({}, {"stem": [BILLION]}, "stem"),
        ({}, {"filter_taps": [1] * 1000}, "filter_taps"),
        ({}, {"augmentation": BILLION}, "augmentation"),
        ({}, {"noise_width_multiplier": BILLION}, "noise_width_multiplier"),
        ({}, {"blocks": "many"}, "blocks"),
        ({}, {"blocks": True}, "blocks"),
        ({}, {"attention": {"a": 1}}, "attention"),
        ({"resolution": BILLION}, {}, "resolution"),
        ({"resolution": -16}, {}, "resolution"),
        ({"channels": BILLION}, {}, "channels"),
        ({"classes": BILLION}, {}, "classes"),
        ({"sigma_data": float("nan")}, {}, "sigma_data"),
        ({"network_options": [1]}, {}, "model.json"),
    ],
)
def test_numbers_of_a_card_are_bounded(folder: Path, part: dict[str, Any], options: Any, named: str) -> None:
    change(folder, {**part} if "network_options" not in part else None, **options)
    if "network_options" in part:
        card = json.loads((folder / "model.json").read_text())
        card["denoiser"] |= part
        (folder / "model.json").write_text(json.dumps(card))
    started = time.monotonic()
    for load in (load_model, load_sampling_model, read_card, sampling_skeleton):
        with pytest.raises(CheckpointError, match=named) as refused:
            load(folder)
        assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("options", [{"width": 16}, {"blocks": 2}, {"width_multipliers": [1, 4]}, {"unknown": 1}])
def test_card_of_another_network_is_refused_before_it_is_built(folder: Path, options: Any) -> None:
    change(folder, **options)
    with pytest.raises(CheckpointError, match=r"the network needs|unknown"):
        load_model(folder)


def test_large_network_of_a_small_file_takes_no_memory(folder: Path) -> None:
    change(folder, width=8192, width_multipliers=[1, 4])  # 80 GiB
    code = f"""
try:
    load_model({str(folder)!r})
except CheckpointError as error:
    print(error)
"""
    assert "the network needs" in run_bounded(LOAD, code, 512).stdout


def test_damaged_safetensors_are_one_line(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    for content in (
        b"", whole[:5], whole[:100], struct.pack("<Q", 2**62) + whole[8:], whole[:8] + b"[" * size + whole[8 + size :],
        struct.pack("<Q", 2) + b"{}", whole[:-4], whole + b"1234", whole[:8] + b"\xff" * size + whole[8 + size :],
    ):  # fmt: skip
        (folder / "model.safetensors").write_bytes(content)
        card = json.loads((folder / "model.json").read_text())
        card["weights_sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "model.json").write_text(json.dumps(card))
        for load in (load_model, lambda folder: stored_shapes(folder / "model.safetensors")):
            try:
                load(folder)
            except CheckpointError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                assert content.endswith(b"{}") and load is not load_model  # valid, and without tensors


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{" * 50, b'{"format_version": 1e999}', b"\xff", b"null", b"1" * 9000]
)
def test_card_that_is_no_json_is_one_line(folder: Path, content: bytes) -> None:
    (folder / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_model(folder)


def nested_tuples(levels: int) -> bytes:
    """The key of a dictionary: a tuple of twice the same tuple, and so on. Its hash takes 2^levels steps."""
    return pickle.PROTO + b"\x02}(N" + b"2\x86" * levels + b"Nu."


def loaded(path: Path, content: bytes, mib: int = 256) -> str:
    path.write_bytes(content)
    code = f"""
import time
started = time.monotonic()
try:
    load_edm_snapshot({str(path)!r})
except CheckpointError as error:
    print(error)
assert time.monotonic() - started < 20
"""
    done = run_bounded(LOAD, code, mib)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo"),
        (b"\x80\x02Nr\xff\xff\xff\x0f.", "memo"),
        (b"Np2000000000\n.", "memo"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b"x.", "remain"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"x.", "remain"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**34) + b"N.", ""),
        (b"\x80\x02" + b"}" * 3_000_000 + b".", "instructions"),
        (nested_tuples(100), "tuple of more than"),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.", ""),
        (b"\x80\x02j\x05\x00\x00\x00.", "memo"),
        (b"\x80\x020.", "stack"),
        (b"(.", "stack"),
    ],
    ids=["memo", "memo of 2 GiB", "text memo", "bytes", "bytearray", "frame", "objects", "hash", "integer",
         "unset memo", "empty stack", "mark"],
)  # fmt: skip
def test_small_pickle_takes_neither_memory_nor_time(tmp_path: Path, content: bytes, named: str) -> None:
    found = loaded(tmp_path / "a.pkl", content)
    assert str(tmp_path) in found and named in found and found.count("\n") == 1


def test_scan_counts_the_instructions_of_ordinary_pickles(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, (1, (2, "x")), None], "b": {"c": b"y", "d": {1, 2}, "e": frozenset([3])}, "f": range(3)}
    values["g"] = [values["a"]] * 3
    for protocol in range(6):
        (tmp_path / "a").write_bytes(pickle.dumps(values, protocol))
        with (tmp_path / "a").open("rb") as file:
            assert scan_pickle(file) > 20


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_all_protocols_are_recognised(tmp_path: Path, protocol: int) -> None:
    for number, value in enumerate(({"a": [1, 2]}, [print], torch.zeros(2), list(range(500_000)))):
        (tmp_path / f"{number}.dat").write_bytes(pickle.dumps(value, protocol))
        assert is_pickle(tmp_path / f"{number}.dat")
    (tmp_path / "system").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert is_pickle(tmp_path / "system")


@pytest.mark.parametrize(
    "content",
    [b"", b".", b"N.", b'{"a": 1}', b"name: tiny\nseed: 3\n", b"A text.\nIt has two lines.\n", b"0.5\n", b"\x89PNG\r\n",
     b"(see above).", b"PK\3\4", b"x" * 2_000_000, b"00.000." * 9, b"]["],
)  # fmt: skip
def test_other_files_are_no_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not is_pickle(tmp_path / "file")


def test_model_folder_with_a_pickle_of_protocol_0_is_refused(folder: Path) -> None:
    (folder / "notes.txt").write_bytes(pickle.dumps([print], 0))
    with pytest.raises(CheckpointError, match=r"notes\.txt is a pickle"):
        load_model(folder)


def snapshot_with(tensor: bytes, path: Path) -> Path:
    """A snapshot whose only weight is made by some opcodes."""
    start = b"\x80\x02}(X\x03\x00\x00\x00emactorch_utils.persistence\n_reconstruct_persistent_obj\n}("
    name = (
        b"X\x0a\x00\x00\x00class_nameX\x0a\x00\x00\x00EDMPrecondX\x05\x00\x00\x00state}(X\x0b\x00\x00\x00_parameters}("
    )
    end = b"uuu\x85Ru."
    path.write_bytes(start + name + b"X\x01\x00\x00\x00w" + tensor + end)
    return path


def rebuilt(size: int, stride: int, storage: bytes) -> bytes:
    whole = b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(storage))
    numbers = b"".join(b"\x8a\x08" + struct.pack("<q", number) for number in (size, stride))
    return whole + storage + b"\x85RK\x00" + numbers[:10] + b"\x85" + numbers[10:] + b"\x85tR"


@pytest.mark.parametrize(("size", "stride"), [(10**10, 0), (-1, 1), (2**62, 0), (5, 1)])
def test_tensor_of_more_values_than_it_stores_is_refused(tmp_path: Path, size: int, stride: int) -> None:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of what EDM pickles
        torch.save(torch.zeros(4).storage(), file, _use_new_zipfile_serialization=False)
    path = snapshot_with(rebuilt(size, stride, file.getvalue()), tmp_path / "a.pkl")
    with pytest.raises(CheckpointError, match=r"a\.pkl"):
        load_edm_snapshot(path)


def test_module_graph_that_grows_without_end_is_refused() -> None:
    deep = snapshots._Record()
    module = deep
    for _ in range(60):
        module["_modules"] = {"a": snapshots._Record()}
        module = module["_modules"]["a"]
    wide = snapshots._Record()
    for _ in range(40):  # 2^40 modules
        outer = snapshots._Record()
        outer["_modules"] = {"a": wide, "b": wide}
        wide = outer
    own = snapshots._Record()
    own["_modules"] = {"a": own}
    for record in (deep, wide, own):
        with pytest.raises(ValueError, match="modules"):
            snapshots._tensors(record)
