"""docs/batch-sampling.md: its code, taken from the page, writes the images of `patchloom sample` to a store."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
import ray.data
from helpers import wait_until
from PIL import Image

from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample import sample
from patchloom.pipelines.sample.sampler import Sampler

pytestmark = pytest.mark.ray
PAGE = Path(__file__).parents[3] / "docs" / "batch-sampling.md"
COUNT, MANY = 10, 160


def sections() -> dict[str, str]:
    """The code of each section of the page, by its title; the lines that all need have the title ""."""
    parts = ["", *re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)]
    code = {
        title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: "\n".join(blocks) for title, blocks in code.items() if blocks}


CODE = sections()
# what the tests below run
PIPELINES = ("From Parquet to Parquet", "To WebDataset", "To image files")
CLUSTER, GPUS, MISTAKES, KILL = "On a cluster", "On GPUs", "Rows that cannot be sampled", "Continue after a kill"


def test_every_section_with_code_is_run() -> None:
    assert CODE.keys() == {"", *PIPELINES, CLUSTER, GPUS, MISTAKES, KILL}
    assert sum(code.count("import ray\n") for code in CODE.values()) == 1


@pytest.fixture(scope="module")
def store(s3: str, s3_environment: str) -> pyarrow.fs.S3FileSystem:
    """The store of the page: a bucket with tables of seeds, the last one with mistakes."""
    urllib.request.urlopen(urllib.request.Request(f"{s3_environment}/bucket", method="PUT"), timeout=5).close()
    store = pyarrow.fs.S3FileSystem(endpoint_override=s3_environment)
    labels = [("chelsea", "coffee")[seed % 2] for seed in range(COUNT)]
    tables = {
        "seeds": {"seed": list(range(COUNT)), "label": labels},
        "many_seeds": {"seed": list(range(MANY))},
        "seeds_with_mistakes": {"seed": [0, 1, -3, 3], "label": ["chelsea", "tea", "coffee", None]},
    }
    for name, columns in tables.items():
        pyarrow.parquet.write_table(pa.table(columns), f"bucket/{name}.parquet", filesystem=store)
    return store


@pytest.fixture(scope="module")
def pngs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The files of `patchloom sample` with the options of the page's first section, also registered as its model."""
    register(str(trained), "my-model")
    folder = tmp_path_factory.mktemp("samples") / "png"
    sample("models:/my-model/1", str(folder), f"0-{COUNT - 1}", steps=18, guidance=1.3, workers=0)
    return [(folder / f"000000/{seed:06d}.png").read_bytes() for seed in range(COUNT)]


def run(*titles: str) -> None:
    """Run sections of the page, one after the other."""
    names: dict[str, Any] = {}
    for title in ("", *titles):
        exec(compile(CODE[title], f"{PAGE.name}: {title}", "exec"), names)


def start(code: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a program in a process of its own."""
    (folder / "program.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, str(folder / "program.py")], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **environment}, cwd=folder, start_new_session=True,
    )  # fmt: skip


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def rows_of(folder: str) -> list[dict[str, Any]]:
    """The rows that Ray wrote as Parquet, with images as arrays."""
    return ray.data.read_parquet(f"s3://bucket/{folder}").take_all()


def files(store: pyarrow.fs.S3FileSystem, folder: str) -> dict[str, bytes]:
    selector = pyarrow.fs.FileSelector(f"bucket/{folder}", allow_not_found=True)
    contents = {}
    for info in store.get_file_info(selector):
        with contextlib.suppress(FileNotFoundError):  # removed just now
            if info.is_file:
                contents[info.base_name] = store.open_input_file(info.path).read()
    return contents


def images_of(rows: list[dict[str, Any]]) -> dict[int, np.ndarray]:
    """The image of each seed, of which there is one row."""
    images = {row["seed"]: row["image"] for row in rows}
    assert len(images) == len(rows)
    return images


@pytest.mark.slow
def test_outputs_have_the_images_of_patchloom_sample(store: pyarrow.fs.S3FileSystem, pngs: list[bytes]) -> None:
    run(*PIPELINES)
    images = images_of(rows_of("images"))
    assert images.keys() == set(range(COUNT))
    assert all((images[seed] == pixels(png)).all() for seed, png in enumerate(pngs))
    members = {}
    for archive in files(store, "archives").values():
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            members |= {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    assert members == {f"{seed:06d}.png": png for seed, png in enumerate(pngs)} | {
        f"{seed:06d}.cls": (b"chelsea", b"coffee")[seed % 2] for seed in range(COUNT)
    }
    assert sorted(files(store, "pngs").values()) == sorted(pngs)


@pytest.mark.slow
@pytest.mark.usefixtures("pngs")
def test_wrong_rows_are_kept_apart(store: pyarrow.fs.S3FileSystem) -> None:
    run(MISTAKES)
    assert images_of(rows_of("good")).keys() == {0, 3}
    found = {
        row["seed"]: row for content in files(store, "errors").values() for row in map(json.loads, content.splitlines())
    }
    assert found.keys() == {1, -3} and "tea" in found[1]["error"] and "chelsea, coffee" in found[1]["error"]
    assert "image" not in found[1]


@pytest.mark.slow
def test_killed_pipeline_continues_and_writes_each_row_once(
    store: pyarrow.fs.S3FileSystem, pngs: list[bytes], tmp_path: Path
) -> None:
    program = "\n".join(CODE[title] for title in ("", CLUSTER, KILL))
    here = ray.get_runtime_context().gcs_address
    first = start(program, tmp_path, RAY_ADDRESS=here)
    wait_until(lambda: len(files(store, "written")) >= 2, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = files(store, "resumable")
    again = start(program, tmp_path, RAY_ADDRESS=here)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    images = images_of(rows_of("resumable"))
    assert images.keys() == set(range(MANY))
    written = files(store, "resumable")
    assert written.items() >= {name: kept[name] for name in kept if name in written}.items()
    assert 1 <= len(kept.keys() & written.keys()) < len(written)
    assert not files(store, "written")


@pytest.mark.slow
def test_pool_on_gpus(champion: str, pngs: list[bytes], tmp_path: Path) -> None:
    """The GPU exists for Ray only, so the images are computed on the CPU."""
    code = "\n".join(CODE[title] for title in ("", CLUSTER, PIPELINES[0], GPUS))
    code = code.replace("images.write", "# images.write")
    save = "import numpy\nnumpy.savez('images.npz', **{str(row['seed']): row['image'] for row in on_gpus.take_all()})"
    fake_gpu = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2, "GPU": 1}', "PATCHLOOM_DEVICE": "cpu"}
    program = start(f"{code}\n{save}", tmp_path, RAY_ADDRESS="local", **fake_gpu)
    output, _ = program.communicate(timeout=300)
    assert program.returncode == 0, output
    expected = Sampler("models:/my-model/1", steps=18, guidance=1.3, batch=64)({"seed": np.arange(COUNT)})["image"]
    with np.load(tmp_path / "images.npz") as found:
        assert all((found[str(seed)] == expected[seed]).all() for seed in range(COUNT))
