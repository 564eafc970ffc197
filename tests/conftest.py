"""What all tests share: an MLflow store and a Ray session of their own, small real images, a tiny trained run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import photograph, tiny_recipe
from PIL import Image

CLASSES = ("chelsea", "coffee")


@pytest.fixture(scope="session", autouse=True)
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real MLflow store on sqlite, also for the processes that tests start."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    yield folder
    if before is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def ray_cluster(mlflow_store: Path) -> Iterator[None]:
    """One Ray session for every test that needs one."""
    from patchloom.platform.cluster import ray_session

    with ray_session(cpus=2):
        yield


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
def pixels(images: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as a prepared dataset."""
    from patchloom.pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "pixels"
    prepare(str(images), str(folder), resolution=16, shard_rows=20)
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
    from patchloom.pipelines.register import register

    register(str(trained), "tiny", alias="champion")
    return "models:/tiny@champion"
