"""What a server refuses before any work, and with which HTTP status."""

import json
from pathlib import Path

import pytest

from patchloom.models.checkpoints import read_card
from patchloom.pipelines.serve.requests import RefusedRequest, ServerLimits, checked_request

LIMITS = ServerLimits(max_images=4, max_side=32, max_steps=20)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ("{", 400, "JSON"),
        ("[1]", 422, ""),
        ({}, 422, "seeds"),
        ({"seeds": []}, 422, "seeds"),
        ({"seeds": [-1]}, 422, "seeds.0"),
        ({"seeds": [1.5]}, 422, "seeds.0"),
        ({"seeds": [1.0]}, 422, "seeds.0"),
        ({"seeds": [1], "guidance": 31}, 422, "max_guidance"),
        ({"seeds": [1], "guidance": -31}, 422, "max_guidance"),
        ({"seeds": [1], "churn": 1e300}, 422, "churn"),
        ({"seeds": [1], "steps": 100_000}, 422, "max_steps"),
        ({"seeds": [1], "size": [10**9, 10**9]}, 422, "size"),
        ({"seeds": [1], "labels": ["x" * 60_000]}, 422, "label"),
        ("[" * 60_000, 400, "JSON"),
        ('{"seeds": [' + "9" * 5000 + "]}", 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        ({"seeds": [2**64]}, 422, "seeds.0"),
        ({"seeds": ["1"]}, 422, "seeds.0"),
        ({"seeds": [1, 2, 3, 4, 5]}, 422, "5 images"),
        ({"seeds": [1], "steps": 21}, 422, "21"),
        ({"seeds": [1], "steps": 0}, 422, "steps"),
        ({"seeds": [1], "steps": True}, 422, "steps"),
        ({"seeds": [1], "size": [64, 16]}, 422, "64x16"),
        ({"seeds": [1], "size": [17, 16]}, 422, "17x16"),
        ({"seeds": [1], "size": [0, 16]}, 422, "0x16"),
        ({"seeds": [1], "sampler": "magic"}, 422, "magic"),
        ({"seeds": [1], "guidance": 1e999}, 422, "guidance"),
        ({"seeds": [1], "precision": "fp8"}, 422, "fp8"),
        ({"seeds": [1], "labels": ["dog"]}, 422, "dog"),
        ({"seeds": [1], "labels": ["coffee", "coffee"]}, 422, "labels"),
        ({"seeds": [1, 2], "format": "png"}, 422, "png"),
        ({"seeds": [1], "model": "/etc/passwd"}, 422, "model"),
        ({"seeds": [1], "outpaint": "/etc/passwd"}, 422, "outpaint"),
        ({"seeds": [1], "batch": 1}, 422, "batch"),
    ],
)
def test_wrong_request_is_refused(body: object, status: int, named: str, trained: Path) -> None:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    content = content.decode("latin1") if isinstance(content, bytes) else content
    with pytest.raises(RefusedRequest) as refused:
        checked_request(content.encode("latin1"), read_card(trained / "model"), LIMITS, 8)
    assert refused.value.status == status and named in refused.value.message and "\n" not in refused.value.message


def test_request_has_class_numbers_and_options(trained: Path) -> None:
    body = {"seeds": [0, 3, 2**64 - 1], "labels": ["coffee", None, 0], "steps": 4, "guidance": 1.5, "size": [32, 16],
            "precision": "bf16"}  # fmt: skip
    found = checked_request(json.dumps(body).encode(), read_card(trained / "model"), LIMITS, 8)
    assert found.classes == [1, 1, 0] and found.seeds == [0, 3, 2**64 - 1]
    assert found.sampling.steps == 4 and found.sampling.guidance == 1.5 and found.sampling.size == (32, 16)
    assert found.sampling.precision == "bf16"


def test_arguments_of_serve_run_are_texts(champion: str) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from patchloom.pipelines.serve import app

    built = call_user_app_builder_with_args_if_necessary(app, {"model": champion, "max_replicas": "3", "batch": "4"})
    arguments, stores = built._bound_deployment.init_args
    assert (
        arguments.model == "models:/tiny/1" and arguments.max_replicas == 3 and arguments.batch == 4
    )  # the alias is fixed
    assert stores["MLFLOW_TRACKING_URI"].startswith("sqlite:////")
    config = built._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 3 and config.max_queued_requests == 64
