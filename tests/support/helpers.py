"""Small things that several tests use."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from safetensors.torch import load_file

from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import Recipe, check_recipe, with_values

# real images and weights next to the repository; tests that need them are skipped where there are none
SHARED_DATA = Path(os.environ.get("PATCHLOOM_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def photograph(name: str) -> np.ndarray:
    """One of the photographs inside scikit-image, (H, W, 3) uint8."""
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return np.asarray(image.convert("RGB"))


def tiny_recipe(**changes: Any) -> Recipe:
    """A recipe that trains within seconds; `changes` by dotted keys with `__` for the dot."""
    recipe = check_recipe({
        "name": "tiny",
        "seed": 3,
        "data": {"held_out_fraction": 0.2},
        "model": {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "class_conditional": True,
                  "label_dropout": 0.1, "dropout": 0.1},
        "patches": {"p": 0.5},
        "optimizer": {"lr": 1e-3, "lr_rampup_images": 100},
        "ema": [{"halflife_images": 200}],
        "train": {"images": 600, "batch_size": 8, "checkpoint_every_images": 150, "log_every_images": 60},
        "preview": {"every_images": 300, "count": 4, "steps": 2},
    })  # fmt: skip
    return with_values(recipe, {key.replace("__", "."): value for key, value in changes.items()})


def dataset_card(shards: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A dataset.json for shards that a test wrote itself, with some fields changed."""
    rows = sum(shard["rows"] for shard in shards)
    return {
        "format_version": 1, "kind": "pixels", "resolution": 4, "channels": 3, "dtype": "uint8", "rows": rows,
        "inputs": rows, "skipped": {"count": 0, "reasons": {}}, "classes": [], "mean": [], "std": [],
        "transform": None, "mirror": False, "split_by": "key", "autoencoder": None, "source_sha256": "",
        "preparation": "", **changes, "shards": shards,
    }  # fmt: skip


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for a while, also for the processes that are started in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_port() -> int:
    """A port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, away from the repository."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd="/"
    )


def run_bounded(imports: str, code: str, mib: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that gets at most some memory more than after its imports."""
    limit = f"""
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ({mib} << 20),) * 2)
"""
    return run_python(f"{imports}\n{limit}\n{code}", **environment)


def start_cli(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line as a user would, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "patchloom.pipelines.cli", *arguments],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 240) -> None:
    """Wait for what a process is about to do; fails with its words where it ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


def read_output_until(process: subprocess.Popen[str], text: str) -> None:
    """Read the output of a process until a line contains a text."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text} was not printed")


def assert_equal_models(one: Path, other: Path) -> None:
    """The models of two runs are equal, bit for bit."""
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def shard_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every shard of a dataset, by its file's name."""
    files = sorted((folder / "shards").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def names_in(folder: Path) -> list[str]:
    """Files that are not hidden."""
    return [name for name in Folder(str(folder)).files() if "/." not in f"/{name}"]


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns; fails where it does not come back."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert out, f"nothing came back within {seconds} s"
    return out[0]
