"""A Ray cluster of separate machines, with an S3 server and MLflow on PostgreSQL, for `make test-cluster`."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from helpers import environment, names_in, tiny_recipe
from machines import (
    GATEWAY,
    MLFLOW_PORT,
    ROOT,
    TOKEN,
    WITH_TESTS,
    Network,
    RayCluster,
    TrackingServer,
    answers,
    missing_tools,
    wait_for,
)

from patchloom.pipelines.train import train
from patchloom.platform.files.folder import Folder

S3_PORT, S3_PROXY_PORT, POSTGRES_PORT = 5601, 5603, 5602
IMAGES = 40_000
WORKERS = ("one", "two")


def postgres_program(name: str) -> str | None:
    """The path of a program of PostgreSQL, which Debian does not put on the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where the machine lacks something."""
    missing = missing_tools() + ["postgresql" for name in ("initdb",) if postgres_program(name) is None]
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.cluster)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"this machine lacks: {', '.join(missing)}"))


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """The bridge that all machines and servers are connected to."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # jobs run `python`
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
        "MLFLOW_TRACKING_URI": f"http://{GATEWAY}:{MLFLOW_PORT}",
        "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{S3_PROXY_PORT}",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1", "PATCHLOOM_CACHE": "/tmp/cache",
    }  # fmt: skip
    with Network(environment) as network:
        yield network


@pytest.fixture(scope="session")
def s3_proxy(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    """An S3-compatible server behind a proxy whose faults a test switches on and off."""
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("w")
    command = [*WITH_TESTS, sys.executable, "-m", "moto.server", "-H", GATEWAY, "-p", str(S3_PORT)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://{GATEWAY}:{S3_PORT}"
    wait_for(lambda: answers(address), "the S3 server")
    for bucket in ("patchloom", "artifacts"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
    with FaultyProxy(address, GATEWAY, S3_PROXY_PORT) as proxy:
        yield proxy
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def s3_environment(network: Network, s3_proxy: FaultyProxy) -> Iterator[str]:
    """The address of the store, also for the tests themselves and for Ray on this machine."""
    keys = {name: value for name, value in network.environment.items() if name.startswith("AWS_")}
    with environment(**keys):
        yield s3_proxy.address


@pytest.fixture(scope="session")
def store(s3_environment: str) -> str:
    """A bucket in the store."""
    return "s3://patchloom"


@pytest.fixture(scope="session")
def database(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server, and the address of an empty database on it."""
    folder = tmp_path_factory.mktemp("postgres")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    data = folder / "data"
    data.mkdir()
    shutil.chown(data, "postgres")
    initdb, server = postgres_program("initdb"), postgres_program("postgres")
    assert initdb is not None and server is not None
    command = [initdb, "--pgdata", str(data), "--auth=trust", "--username=mlflow", "--encoding=UTF8"]
    subprocess.run(command, user="postgres", check=True, capture_output=True, cwd="/")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {GATEWAY}/24 trust\n")
    options = ["-D", str(data), "-h", GATEWAY, "-p", str(POSTGRES_PORT), "-k", str(data)]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen([*WITH_TESTS, server, *options], user="postgres", stderr=log, cwd="/")
    create = ["createdb", "-h", GATEWAY, "-p", str(POSTGRES_PORT), "-U", "mlflow", "mlflow"]
    wait_for(lambda: subprocess.run(create, capture_output=True).returncode == 0, "PostgreSQL")
    yield f"postgresql+psycopg2://mlflow@{GATEWAY}:{POSTGRES_PORT}/mlflow"
    process.send_signal(signal.SIGINT)  # does not wait for its clients
    process.wait()


@pytest.fixture(scope="session")
def tracking(
    network: Network, database: str, store: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrackingServer]:
    """MLflow on PostgreSQL, with its artifacts in the store."""
    where = ["--backend-store-uri", database, "--host", GATEWAY, "--port", str(MLFLOW_PORT)]
    options = [*where, "--workers", "1", "--artifacts-destination", "s3://artifacts"]
    command = [*WITH_TESTS, sys.executable, "-m", "mlflow", "server", *options]
    keys = {name: value for name, value in network.environment.items() if name.startswith("AWS_")}
    keys["AWS_ENDPOINT_URL"] = keys["MLFLOW_S3_ENDPOINT_URL"] = f"http://{GATEWAY}:{S3_PORT}"
    server = TrackingServer(command, os.environ | keys, tmp_path_factory.mktemp("mlflow") / "server.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ray_nodes(network: Network, store: str, tracking: TrackingServer) -> RayCluster:
    """The cluster of the tests, without worker nodes at first."""
    return RayCluster(network)


@pytest.fixture
def cluster(ray_nodes: RayCluster) -> RayCluster:
    """The cluster with two worker nodes."""
    ray_nodes.set_workers(*WORKERS)
    return ray_nodes


@pytest.fixture(scope="session")
def archive(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, also in the store."""
    folder = tmp_path_factory.mktemp("archive")
    pictures = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pictures, labels=np.arange(IMAGES) % 3)
    Folder.at(f"{store}/source").put(folder / "images.npz", "images.npz")
    return folder / "images.npz"


@pytest.fixture(scope="session")
def dataset(pixels: Path, store: str) -> str:
    """The tiny dataset in the store."""
    there = Folder.at(f"{store}/pixels")
    for name in sorted(names_in(pixels), key=lambda name: name == "dataset.json"):
        there.put(pixels / name, name)
    return str(there)


@pytest.fixture(scope="session")
def run_of_one_machine(ray_cluster: None, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two workers on this machine."""
    return train(
        tiny_recipe(train__images=3000), str(pixels), str(tmp_path_factory.mktemp("one") / "run"), workers=2
    ).folder
