"""Damaged inputs and full disks: one line and exit code 2, never a traceback."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import tiny_recipe
from sources_on_disk import ENCODED, write_files

from patchloom.errors import UserError
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample.folder import read_samples
from patchloom.pipelines.train import train
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import each_json_line, parse_json, parse_json_object, read_json
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.records.samples import ManifestEntry

DEEP = "[" * 100_000


def run_with_small_files(size_bytes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process whose files can have only so many bytes, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-m", "patchloom.pipelines.cli", *arguments], cwd=cwd, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes)), timeout=300,
    )  # fmt: skip


def assert_one_line(done: subprocess.CompletedProcess[str]) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("patchloom: ") and "disk cannot be written" in lines[-1], done.stderr


def test_full_disk_ends_prepare_in_one_line(images: Path, tmp_path: Path) -> None:
    assert_one_line(run_with_small_files(
        8_000, "prepare", str(images), "data", "--resolution", "16", "--workers", "0", cwd=tmp_path,
    ))  # fmt: skip
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_full_disk_ends_sample_in_one_line(trained: Path, tmp_path: Path) -> None:
    assert_one_line(run_with_small_files(
        900, "sample", str(trained / "model"), "out", "--seeds", "0-1", "--steps", "1", "--workers", "0",
        cwd=tmp_path,
    ))  # fmt: skip


def test_progress_line_that_cannot_be_written_is_one_line(pixels: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(train__log_every_images=8, train__images=100_000)))
    done = run_with_small_files(
        100_000, "train", "recipe.yaml", "--data", str(pixels), "--out", "run", "--workers", "0", cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr  # MLflow's own log of its store may be before it
    last = done.stderr.splitlines()[-1]
    assert last.startswith("patchloom: ") and ("disk cannot be written" in last or "disk I/O error" in last), last


@pytest.mark.parametrize("has_model", [True, False])
def test_empty_progress_of_a_run_at_its_last_step_is_one_line(
    trained: Path, pixels: Path, tmp_path: Path, has_model: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "progress.jsonl").write_text("")
    if not has_model:
        shutil.rmtree(run / "model")
    with pytest.raises(UserError, match=r"progress\.jsonl has no line"):
        train(tiny_recipe(), str(pixels), str(run), workers=0, resume=True)
    assert (run / "model" / "model.json").is_file()
    with pytest.raises(UserError, match=r"progress\.jsonl has no line"):
        register(str(run), "empty")


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"{",
        b"[]",
        b'{"info": []}',
        b'{"info": {"features": [1]}}',
        b'{"info": {"features": {"label": {"names": 5}}}}',
        DEEP.encode(),
        b"\xff",
    ],
)
def test_damaged_metadata_of_a_table_are_one_line(tmp_path: Path, metadata: bytes) -> None:
    table = pa.table({"image": ENCODED, "label": list(range(6))}).replace_schema_metadata({b"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    if not metadata:
        assert len(open_source(str(tmp_path / "a.parquet")).inputs) == 6
        return
    with pytest.raises(UserError, match="huggingface"):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["[]", DEEP, '{"_data_files": 5}', '{"_data_files": [5], "features": 5}', "\x00"])
def test_damaged_files_of_a_saved_dataset_are_one_line(tmp_path: Path, name: str, content: str) -> None:
    pyarrow.parquet.write_table(pa.table({"image": ENCODED}), tmp_path / "a.parquet")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.parquet"}]}')
    (tmp_path / name).write_text(content)
    try:
        source = open_source(str(tmp_path))
    except UserError as error:
        assert name in str(error) and "\n" not in str(error) and len(str(error)) < 500
    else:
        assert len(source.inputs) == 6  # without names of classes


@pytest.mark.parametrize(
    "labels",
    [DEEP, '{"labels": [5]}', '{"labels": [["a"]]}', '{"labels": [["a", "b", "c"]]}', '{"labels": ["ab", {}]}',
     '{"labels": 5}', '{"labels": {"a": {"b": 1}}}', '{"labels": [[{}, 1]', '{"labels": [], "classes": 5}', "\x00",
     '{"labels": [["a.png", 1e400]]}', '{"labels": [["a.png", NaN]], "classes": [[[]]]}', "{]"],
)  # fmt: skip
def test_damaged_labels_of_edm_are_one_line(tmp_path: Path, labels: str) -> None:
    photos = write_files(tmp_path / "photos", {"a.png": ENCODED[0], "dataset.json": labels.encode()})
    try:
        assert len(open_source(str(photos)).inputs) == 1
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


def reads_a_manifest(folder: Path) -> object:
    return [ManifestEntry.parse(line, "manifest.jsonl") for line in (folder / "file").read_bytes().splitlines()]


@pytest.mark.parametrize("read", [
    reads_a_manifest, lambda folder: Folder(str(folder)).read_json("file"), lambda folder: read_json(folder / "file"),
    lambda folder: list(each_json_line(folder / "file")),
], ids=["manifest", "remote JSON", "JSON", "JSON lines"])  # fmt: skip
@pytest.mark.parametrize(
    "content", [b"{\n", DEEP.encode() + b"\n", b"\xff\n", b'{"seed": "x"}{}\n', b"9" * 5000 + b"\n"]
)
def test_damaged_json_is_one_line(tmp_path: Path, read: Callable[[Path], object], content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_json_that_is_no_object_is_refused() -> None:
    assert parse_json("[1]") == [1] and parse_json_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="list"):
        parse_json_object("[1]")


def test_dataset_card_that_is_no_object_is_one_line(images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("[1]")
    with pytest.raises(UserError):
        prepare(str(images), str(tmp_path / "data"), resolution=16, workers=0)
    with pytest.raises(UserError):
        prepare(str(tmp_path / "data"), str(tmp_path / "other"), resolution=16, workers=0)


def test_damaged_array_is_one_line(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "good.npz", images=images)
    whole = (tmp_path / "good.npz").read_bytes()
    at = whole.index(b"{'descr'")
    for header in (b"{'descr': __import__", b"{'descr': '|u1', (((", b"\xff" * 30, b"{" * 60, b"[" * 60):
        (tmp_path / "bad.npz").write_bytes(whole[:at] + header + whole[at + len(header) :])
        with pytest.raises(UserError, match=r"bad\.npz"):
            open_source(str(tmp_path / "bad.npz"))


def test_samples_without_a_readable_file_are_one_line(tmp_path: Path) -> None:
    entry = ManifestEntry(seed=0, label=0, file="000000.npz", sha256="0" * 64)
    (tmp_path / "000000.npz").write_bytes(json.dumps({}).encode())
    with pytest.raises(UserError, match="seed 0"):
        read_samples(Folder(str(tmp_path)), [entry])
