"""Memory of the command that plans a preparation: it does not grow with the number of inputs."""

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from downloaded_datasets import idx
from helpers import run_python

from patchloom.pipelines.prepare.planning import default_shard_rows

PLAN = """
from pathlib import Path
from patchloom.pipelines.prepare.images import Transform
from patchloom.pipelines.prepare.planning import plan_images
planned = plan_images(SOURCE, LABELS, None, Transform(8), None, "fp32")
status = Path("/proc/self/status").read_text()  # ru_maxrss would be at least that of the process that started this one
print(len(planned.inputs), status.partition("VmHWM:")[2].split()[0])  # in KiB
"""
FEW, MANY, MOST = 20_000, 100_000, 2_000_000
GROWTH_KIB = {MANY: 60 << 10, MOST: 100 << 10}


def an_array(folder: Path, inputs: int) -> tuple[Path, None]:
    labels = np.arange(inputs) % 10
    np.savez(folder / f"{inputs}.npz", images=np.zeros((inputs, 4, 4, 3), np.uint8), labels=labels)
    return folder / f"{inputs}.npz", None


def edm_labels(inputs: int) -> bytes:
    """The content of EDM's dataset.json."""
    return json.dumps({"labels": [[f"{number:08d}.png", number % 10] for number in range(inputs)]}).encode()


def a_zip_with_labels(folder: Path, inputs: int) -> tuple[Path, Path]:
    """A zip, and a separate file of labels."""
    with zipfile.ZipFile(folder / f"{inputs}.zip", "w") as archive:
        for number in range(inputs):
            archive.writestr(zipfile.ZipInfo(f"{number:08d}.png"), b"")
    (folder / f"{inputs}.json").write_bytes(edm_labels(inputs))
    return folder / f"{inputs}.zip", folder / f"{inputs}.json"


def a_zip_of_edm(folder: Path, inputs: int) -> tuple[Path, None]:
    """A zip with a file of labels in it."""
    path, labels = a_zip_with_labels(folder, inputs)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.write(labels, "dataset.json")
    return path, None


def a_tar_of_edm(folder: Path, inputs: int) -> tuple[Path, None]:
    """A tar with a file of labels in it."""
    with (folder / f"{inputs}.tar").open("wb") as file:
        for number in range(inputs):
            file.write(tarfile.TarInfo(f"{number:08d}.png").tobuf(tarfile.USTAR_FORMAT))
        labels, member = edm_labels(inputs), tarfile.TarInfo("dataset.json")
        member.size = len(labels)
        file.write(member.tobuf(tarfile.USTAR_FORMAT) + labels + bytes(-len(labels) % 512) + bytes(10240))
    return folder / f"{inputs}.tar", None


def a_folder(folder: Path, inputs: int) -> tuple[Path, None]:
    """A folder of empty files, a thousand in each sub-folder."""
    for number in range(inputs):
        if number % 1000 == 0:
            parent = folder / str(inputs) / f"{number // 1000:05d}"
            parent.mkdir(parents=True)
        (parent / f"{number:08d}.png").touch()
    return folder / str(inputs), None


def a_flat_folder(folder: Path, inputs: int) -> tuple[Path, None]:
    """All files in one folder."""
    (folder / str(inputs)).mkdir()
    for number in range(inputs):
        (folder / str(inputs) / f"{number:08d}.png").touch()
    return folder / str(inputs), None


def a_webdataset(folder: Path, inputs: int) -> tuple[Path, None]:
    """A tar with a file of the class next to each image."""
    with (folder / f"{inputs}.tar").open("wb") as file:
        for number in range(inputs):
            for ending, content in ((".png", b""), (".cls", b"%d" % (number % 10))):
                member = tarfile.TarInfo(f"{number:08d}{ending}")
                member.size = len(content)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512 * len(content), b"\0"))
        file.write(bytes(10240))
    return folder / f"{inputs}.tar", None


def a_tar_of_tars(folder: Path, inputs: int) -> tuple[Path, None]:
    """A tar of a tar for each thousand images."""
    with (folder / f"{inputs}.tar").open("wb") as file:
        for first in range(0, inputs, 1000):
            numbers = range(first, first + 1000)
            inner = b"".join(tarfile.TarInfo(f"{number:08d}.png").tobuf(tarfile.USTAR_FORMAT) for number in numbers)
            member = tarfile.TarInfo(f"n{first:08d}.tar")
            member.size = len(inner) + 10240
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + inner + bytes(10240))
        file.write(bytes(10240))
    return folder / f"{inputs}.tar", None


def idx_files(folder: Path, inputs: int) -> tuple[Path, None]:
    """Images and labels as MNIST's."""
    (folder / f"{inputs}-images-idx3-ubyte").write_bytes(idx(np.zeros((inputs, 4, 4), np.uint8)))
    (folder / f"{inputs}-labels-idx1-ubyte").write_bytes(idx(np.arange(inputs, dtype=np.int64).astype(np.uint8)))
    return folder / f"{inputs}-images-idx3-ubyte", None


def an_lmdb(folder: Path, inputs: int) -> tuple[Path, None]:
    """A database of empty values."""
    import lmdb

    with lmdb.open(str(folder / f"{inputs}"), map_size=1 << 30) as database, database.begin(write=True) as transaction:
        for number in range(inputs):
            transaction.put(b"%040d" % number, b"")
    return folder / f"{inputs}", None


def peak_kib(source: Path, labels: Path | None, inputs: int) -> int:
    code = PLAN.replace("SOURCE", repr(str(source))).replace("LABELS", repr(labels and str(labels)))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    planned, peak = map(int, done.stdout.split()[-2:])
    assert planned == inputs
    return peak


@pytest.mark.parametrize(
    ("write", "inputs"),
    [
        (an_array, MANY),
        *(pytest.param(write, inputs, marks=pytest.mark.slow)
          for write in (a_zip_with_labels, a_zip_of_edm, a_tar_of_edm, a_webdataset, a_folder, a_flat_folder)
          for inputs in (MANY, MOST)),
        *(pytest.param(write, MANY, marks=pytest.mark.slow) for write in (a_tar_of_tars, idx_files, an_lmdb)),
        pytest.param(an_array, MOST, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_memory_of_planning_does_not_grow_with_the_inputs(write, inputs: int, tmp_path: Path) -> None:
    few, many = (peak_kib(*write(tmp_path, count), count) for count in (FEW, inputs))
    assert many - few < GROWTH_KIB[inputs]


def test_shards_of_small_datasets_stay_and_those_of_large_ones_grow_to_128_mib() -> None:
    pixels, latent = 64 * 64 * 3, 32 * 32 * 4 * 4
    assert default_shard_rows(48, 64, pixels) == default_shard_rows(256 * 512, 64, pixels) == 512
    assert default_shard_rows(5_000, 256, 256 * 256 * 3) == (64 << 20) // (256 * 256 * 3)
    assert default_shard_rows(256 * 513, 64, pixels) == 513
    of_16_gib = (16 << 30) // pixels
    assert default_shard_rows(of_16_gib, 64, pixels) * pixels == pytest.approx(64 << 20, rel=1e-3)
    assert default_shard_rows(100_000_000, 64, pixels) == (128 << 20) // pixels
    assert default_shard_rows(100_000_000, 256, latent) * latent == 128 << 20
