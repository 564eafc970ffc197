"""What all tests share: an MLflow store and a Ray session of their own, small real images, a tiny trained run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, find_browser
from helpers import environment, photograph, tiny_recipe
from PIL import Image

CLASSES = ("chelsea", "coffee")


def pytest_configure() -> None:
    """Commands that tests start get Ctrl-C, also where a shell runs the tests in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for two processes: a file stays in one, and each process starts at most one Ray session.

    Tests with Ray are two groups of about the same duration.
    """
    for item in items:
        needs_ray = item.get_closest_marker("ray") or "ray_cluster" in getattr(item, "fixturenames", ())
        ray_group = "ray and runs" if item.path.parent.name in ("train", "tune") else "ray"
        item.add_marker(pytest.mark.xdist_group(ray_group if needs_ray else item.path.name))


@pytest.fixture(autouse=True)
def shared_ray(request: pytest.FixtureRequest) -> None:
    """Tests marked `ray` find one running session, which they share."""
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("ray_cluster")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from more, and threads that wait for one another stand still on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # Ray lowers the priority of its workers by default; next to the tests of another process they would starve
    with environment(OMP_NUM_THREADS="1", RAY_worker_niceness="0"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Copies of what is remote lie in a folder of these tests, also those of Ray's workers."""
    folder = tmp_path_factory.mktemp("cache")
    with environment(PATCHLOOM_CACHE=str(folder)):
        yield folder


@pytest.fixture(scope="session", autouse=True)
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real MLflow store on sqlite, also for the processes that tests start."""
    folder = tmp_path_factory.mktemp("mlflow")
    with environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}"):
        yield folder


@pytest.fixture(scope="session")
def ray_cluster(mlflow_store: Path, cache: Path, s3_environment: str) -> Iterator[None]:
    """One Ray session for every test that needs one; its workers find the tests' own networks by PYTHONPATH."""
    from patchloom.platform.compute.session import ray_session

    path = os.pathsep.join(filter(None, (str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH"))))
    with environment(PYTHONPATH=path), ray_session(cpus=2):
        yield


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[str]:
    """The address of the tests' S3 server, known to every process that they start, Ray's workers too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with environment(AWS_ENDPOINT_URL=address, **keys):
        yield address


@pytest.fixture(scope="session")
def s3_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the S3 server of the tests reports: a line for each request, such as `"PUT /patchloom/a HTTP/1.1" 200`."""
    return tmp_path_factory.mktemp("s3") / "server.log"


@pytest.fixture(scope="session")
def s3(s3_environment: str, s3_log: Path) -> Iterator[str]:
    """A bucket on a real S3-compatible server (moto's, in a process of its own)."""
    log = s3_log.open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", s3_environment.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(300):
        try:
            request = urllib.request.Request(f"{s3_environment}/patchloom", method="PUT")
            urllib.request.urlopen(request, timeout=5).close()
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.1)
    yield "s3://patchloom"
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 PNG files of 16 x 16 in two classes, and a text file that calls itself one."""
    folder = tmp_path_factory.mktemp("images")
    for name in CLASSES:
        (folder / name).mkdir()
        pixels = photograph(f"{name}.png")
        for number in range(24):
            y, x = 40 + 8 * (number // 6), 60 + 20 * (number % 6)
            Image.fromarray(pixels[y : y + 64 : 4, x : x + 64 : 4]).save(folder / name / f"{number:02d}.png")
    (folder / "chelsea" / "note.png").write_text("not an image")
    (folder / "chelsea" / "README.txt").write_text("not an input")
    return folder


@pytest.fixture(scope="session")
def pixels(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as a prepared dataset."""
    from patchloom.pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "pixels"
    prepare(str(images), str(folder), resolution=16, shard_rows=20, workers=0)
    return folder


@pytest.fixture(scope="session")
def trained(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run of this process."""
    from patchloom.pipelines.train import train

    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe(), str(pixels), str(folder), workers=0)
    return folder


@pytest.fixture(scope="session")
def champion(trained: Path) -> str:
    """The tiny run's model in the registry."""
    from patchloom.pipelines.registry.registering import register

    register(str(trained), "tiny", alias="champion")
    return "models:/tiny@champion"


@pytest.fixture(scope="session")
def changed_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, float], Path]:
    """Copies the model of a run with a number added to one of its weights: another model, whole and valid."""

    def copy(run: Path, change: float) -> Path:
        from safetensors.torch import load_file, save_file

        from patchloom.models.manifest import write_manifest
        from patchloom.platform.files.storage import file_sha256

        folder = tmp_path_factory.mktemp("copies") / "model"
        shutil.copytree(run / "model", folder)
        weights = load_file(folder / "model.safetensors")
        first = next(iter(weights))
        save_file(weights | {first: weights[first] + change}, folder / "model.safetensors")
        card = json.loads((folder / "model.json").read_text())
        card["weights_sha256"] = file_sha256(folder / "model.safetensors")
        (folder / "model.json").write_text(json.dumps(card))
        write_manifest(folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium: install one (apt-get install chromium), or set CHROMIUM to its path")
    with Browser(program) as opened:
        yield opened
