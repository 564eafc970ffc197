"""A real Ray Serve application: images as of `patchloom sample`, batches of waiting requests, and its bounds."""

import base64
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import free_port

from patchloom.models.checkpoints import load_model, read_card, save_model
from patchloom.pipelines.sample import sample
from patchloom.pipelines.serve.requests import RefusedRequest, checked_request

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def address(champion: str, ray_cluster: None) -> Iterator[str]:
    """The address of a server of the tiny model."""
    from ray import serve

    from patchloom.pipelines.serve import app
    from patchloom.pipelines.serve.application import ServeArguments

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = ServeArguments(
        model=champion, max_images=4, max_body_bytes=2000, max_queued_requests=6, batch_wait_s=0.3
    )
    serve.run(app(arguments), name="tiny")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


def ask(url: str, body: object = None) -> tuple[int, Any, dict[str, str]]:
    """Status, content (JSON if it is) and headers."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=120) as answer:
            status, content, headers = answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        status, content, headers = error.code, error.read(), dict(error.headers)
    is_json = "json" in headers.get("content-type", "")
    return status, json.loads(content) if is_json else content, headers


def test_images_have_the_bytes_of_sample(address: str, champion: str, tmp_path: Path) -> None:
    sample(champion, str(tmp_path / "samples"), "0-5", steps=3, workers=0)
    expected = {seed: (tmp_path / f"samples/000000/{seed:06d}.png").read_bytes() for seed in range(6)}
    with ThreadPoolExecutor(3) as pool:  # three requests at once, in one batch or not
        answers = list(
            pool.map(lambda seeds: ask(f"{address}/sample", {"seeds": seeds, "steps": 3}), [[0], [1, 2], [3, 4, 5]])
        )
    images = {row["seed"]: base64.b64decode(row["png"]) for _, content, _ in answers for row in content["images"]}
    assert images == expected
    assert max(int(headers["x-batch-images"]) for _, _, headers in answers) > 1
    status, png, headers = ask(f"{address}/sample", {"seeds": [4], "steps": 3, "format": "png"})
    assert status == 200 and png == expected[4] and headers["content-type"] == "image/png"
    sample(champion, str(tmp_path / "half"), "4", steps=3, precision="bf16", workers=0)
    half = {"seeds": [4], "steps": 3, "format": "png", "precision": "bf16"}
    assert ask(f"{address}/sample", half)[1] == (tmp_path / "half/000000/000004.png").read_bytes() != png


def test_server_says_which_model_it_serves(address: str, champion: str, trained: Path) -> None:
    assert ask(f"{address}/health")[:2] == (200, {"status": "ok"})
    status, found, _ = ask(f"{address}/model")
    assert status == 200 and found["weights_sha256"] == read_card(trained / "model").weights_sha256
    assert found["model"] == "models:/tiny/1" and found["classes"] == ["chelsea", "coffee"]
    assert found["limits"]["max_images"] == 4 and found["options"]["steps"] == 18 and found["batch"] == 8


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/sample", b"{", 400),
        ("/sample", {"seeds": [1, 2, 3, 4, 5]}, 422),
        ("/sample", {"seeds": [1], "model": "models:/other/1"}, 422),
        ("/sample", b" " * 3000, 413),
        ("/sample", None, 405),
        ("/files/../model.json", None, 404),
    ],
)
def test_wrong_request_gets_one_line(address: str, path: str, body: object, status: int) -> None:
    code, content, _ = ask(address + path, body)
    assert code == status and list(content) == ["error"] and "\n" not in content["error"]


def test_overload_is_answered_with_503_and_the_server_recovers(address: str) -> None:
    def one(seed: int) -> int:
        return ask(f"{address}/sample", {"seeds": [seed] * 4, "steps": 40})[0]

    with ThreadPoolExecutor(64) as pool:
        statuses = list(pool.map(one, range(64)))
    assert set(statuses) == {200, 503}
    assert ask(f"{address}/sample", {"seeds": [1], "steps": 1})[0] == 200


def test_options_that_overflow_fail_only_the_requests_that_have_them(trained: Path, tmp_path: Path) -> None:
    from patchloom.pipelines.serve.application import ModelServer, ServeArguments, _Waiting

    model = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    denoiser = load_model(model)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(300)
    save_model(model, denoiser, read_card(model))
    server = ModelServer(ServeArguments(model=str(model)), {})
    bodies = [{"seeds": [0], "steps": 2}, {"seeds": [1], "steps": 2, "precision": "fp16"}]
    limits = server.limits
    waiting = [_Waiting(checked_request(json.dumps(body).encode(), server.model.card, limits, 32), limits.deadline())
               for body in bodies]  # fmt: skip
    exact, half = server._sample_all(waiting)
    assert isinstance(half, RefusedRequest) and half.status == 422
    assert not isinstance(exact, RefusedRequest) and exact is not None and exact.images.shape[0] == 1
