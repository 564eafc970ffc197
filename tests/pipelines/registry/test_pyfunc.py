"""Pyfunc: MLflow returns the bytes of `patchloom sample`: in a process, over HTTP, and from the wheel of a version."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from helpers import run_python
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from patchloom.pipelines.sample import sample
from patchloom.platform.tracking.client import connect
from patchloom.platform.tracking.registry import fetch_model

pytestmark = pytest.mark.ray
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
CASES: dict[str, dict[str, Any]] = {
    "defaults": {"steps": 2},
    "guided": {"steps": 3, "guidance": 1.3, "guidance_between": (0.3, 5.0), "ladder": "vp"},
    "churned": {"steps": 3, "churn": 10.0, "churn_between": (0.05, 50.0), "churn_noise": 1.003},
    "another sampler": {"steps": 3, "sampler": "dpmpp-2m-sde", "batch": 3},
    "a larger canvas": {"steps": 2, "size": (24, 32), "canvas": "extrapolate"},
    "half precision": {"steps": 2, "precision": "bf16"},
}


def sampled(champion: str, folder: Path, **options: Any) -> dict[int, bytes]:
    """The PNG files of seeds 0 to 3 in a batch job."""
    sample(champion, str(folder), "0-3", workers=0, **options)
    return {seed: (folder / "000000" / f"{seed:06d}.png").read_bytes() for seed in range(4)}


def pngs_of(table: pd.DataFrame) -> dict[int, bytes]:
    return {int(row.seed): base64.b64decode(str(row.png)) for row in table.itertuples()}


@pytest.fixture(scope="module")
def loaded(champion: str) -> Any:
    """The champion as MLflow loads it."""
    connect()
    return mlflow.pyfunc.load_model(champion)


@pytest.mark.parametrize("case", CASES)
def test_options_give_the_bytes_of_patchloom_sample(case: str, champion: str, loaded: Any, tmp_path: Path) -> None:
    wanted = sampled(champion, tmp_path / "samples", **CASES[case])
    params = {name: list(value) if isinstance(value, tuple) else value for name, value in CASES[case].items()}
    table = loaded.predict(pd.DataFrame({"seed": [3, 0, 1]}), params=params)
    assert list(table.columns) == ["seed", "label", "png"]
    assert list(zip(table["seed"], table["label"], strict=True)) == [(3, 1), (0, 0), (1, 1)]
    assert pngs_of(table) == {seed: wanted[seed] for seed in (3, 0, 1)}


@pytest.mark.parametrize(
    ("given", "numbers"),
    [(["coffee", "chelsea", None], [1, 0, 0]), ([1, 1, -1], [1, 1, -1]), ([1.0, None, 0.0], [1, 1, 0])],
    ids=str,
)
def test_labels_are_class_names_or_numbers(given: list[Any], numbers: list[int], loaded: Any) -> None:
    table = loaded.predict(pd.DataFrame({"seed": [0, 1, 2], "label": given}), params={"steps": 1})
    assert table["label"].tolist() == numbers


@pytest.mark.parametrize(
    ("column", "params", "named"),
    [
        ({"label": ["tea"]}, {}, "tea.*chelsea, coffee"),
        ({"label": [2]}, {}, "2"),
        ({}, {"size": [32]}, "size"),
        ({}, {"size": [17, 16]}, "multiples of 2"),
        ({}, {"sampler": "magic"}, "sampler.*magic"),
        ({}, {"batch": 0}, "batch"),
        ({}, {"precision": "fp8"}, "precision.*fp8.*fp32, bf16, fp16"),
    ],
)
def test_options_that_do_not_fit_are_invalid_parameters(
    column: dict[str, Any], params: dict[str, Any], named: str, loaded: Any
) -> None:
    with pytest.raises(MlflowException, match=named) as refused:
        loaded.predict(pd.DataFrame({"seed": [0], **column}), params=params)
    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"


def test_version_has_a_signature_and_a_working_input_example(champion: str, loaded: Any) -> None:
    signature = loaded.metadata.signature
    assert [(column.name, column.required) for column in signature.inputs] == [("seed", True), ("label", False)]
    assert [column.name for column in signature.outputs] == ["seed", "label", "png"]
    assert {spec.name: spec.default for spec in signature.params} == {
        "sampler": "heun", "steps": 18, "ladder": "karras", "churn": 0.0, "churn_between": [], "churn_noise": 1.0,
        "guidance": 1.0, "guidance_between": [], "size": [], "canvas": "rescale", "precision": "fp32",
        "batch": 8,
    }  # fmt: skip
    version = fetch_model(champion).folder.parents[1]
    example, params = (
        Model.load(version).load_input_example(str(version)),
        Model.load(version).load_input_example_params(str(version)),
    )
    assert example.to_dict("list") == {"seed": [0, 1], "label": ["chelsea", "coffee"]}
    assert len(loaded.predict(example, params=params)) == 2


def test_registered_version_has_no_pickle(champion: str, mlflow_store: Path) -> None:
    files = [path for path in mlflow_store.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    assert not [path for path in files if path.suffix in PICKLES]
    assert not [path for path in files if path.read_bytes()[:2] == b"\x80\x04"]


@pytest.mark.parametrize(
    ("rows", "params", "named"),
    [
        (1, {"steps": 100_000}, "max_steps"),
        (1, {"batch": 1_000_000}, "max_batch"),
        (1001, {"steps": 1}, "max_images"),
        (1, {"size": [100_000, 100_000]}, "size"),
        (1, {"size": [4096, 16]}, "max_side"),
        (1, {"guidance": 1e9}, "guidance"),
    ],
)
def test_request_beyond_a_bound_is_a_bad_request(rows: int, params: dict[str, Any], named: str, loaded: Any) -> None:
    with pytest.raises(MlflowException, match=named) as refused:
        loaded.predict(pd.DataFrame({"seed": list(range(rows))}), params=params)
    assert refused.value.get_http_status_code() == 400


def test_request_that_takes_too_long_is_given_up(champion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_REQUEST_TIMEOUT_S", "0.5")
    connect()
    model = mlflow.pyfunc.load_model(champion)
    with pytest.raises(MlflowException, match="request_timeout_s"):
        model.predict(pd.DataFrame({"seed": list(range(500))}), params={"steps": 500})


def test_version_loads_with_its_own_wheel_and_without_pickle(champion: str, tmp_path: Path) -> None:
    version = fetch_model(champion).folder.parents[1]
    requirements = (version / "requirements.txt").read_text().split()
    assert requirements == [f"mlflow=={mlflow.__version__}", "artifacts/patchloom-0.1.0-py3-none-any.whl"]
    # as MLflow installs them: with the version's folder as the working directory
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "code"),
    ]
    subprocess.run([*install, requirements[1]], check=True, cwd=version, capture_output=True)
    code = (
        "import mlflow, pandas, patchloom\n"
        f"model = mlflow.pyfunc.load_model({champion!r})\n"
        "table = model.predict(pandas.DataFrame({'seed': [0, 3]}), params={'steps': 2})\n"
        "print(patchloom.__file__)\n"
        "print(table.to_json(orient='records'))\n"
    )
    done = run_python(code, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false", PYTHONPATH=str(tmp_path / "code"))
    assert done.returncode == 0, done.stderr
    *_, where, rows = done.stdout.strip().splitlines()
    assert where == str(tmp_path / "code" / "patchloom" / "__init__.py")
    wanted = sampled(champion, tmp_path / "samples", steps=2)
    assert pngs_of(pd.DataFrame(json.loads(rows))) == {seed: wanted[seed] for seed in (0, 3)}


@pytest.fixture
def server(champion: str, tmp_path: Path) -> Iterator[str]:
    """The address of a process of `mlflow models serve` with the champion."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        champion,
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # where MLflow finds its server
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": path}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path)
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        process.terminate()
        process.wait()


def test_http_server_returns_the_bytes_of_patchloom_sample(champion: str, server: str, tmp_path: Path) -> None:
    def ask(**content: Any) -> Any:
        body = json.dumps(content).encode()
        request = urllib.request.Request(server, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["predictions"]

    options = {"steps": 3, "guidance": 1.3, "size": (24, 16)}
    wanted = sampled(champion, tmp_path / "samples", label="coffee", **options)
    table = {"columns": ["seed", "label"], "data": [[3, "coffee"], [1, 1], [0, "coffee"]]}
    rows = ask(dataframe_split=table, params={**options, "size": [24, 16]})
    assert [(row["seed"], row["label"]) for row in rows] == [(3, 1), (1, 1), (0, 1)]
    assert pngs_of(pd.DataFrame(rows)) == {seed: wanted[seed] for seed in (3, 1, 0)}
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        ask(dataframe_records=[{"seed": 0, "label": "tea"}])
    message = json.loads(refused.value.read())["message"]
    assert all(name in message for name in ("tea", "chelsea", "coffee"))
