"""Evaluations of registered versions, as `patchloom evaluate` records them."""

import json
from typing import Any

from patchloom.pipelines.registry.quality import TAG, Evaluation
from patchloom.platform.records.evaluation import EvaluationIdentity
from patchloom.platform.tracking.registry import tag_version

IDENTITY = {"features": "inception-2015-12-05", "n_samples": 1000, "seeds": "0-999", "steps": 18, "reference": "a" * 64,
            "n_reference": 5000, "sampler": "heun", "network_evaluations": 35, "guidance": 1.0}  # fmt: skip


def add_evaluation(name: str, version: str, fid: float, **identity: Any) -> None:
    """Add an evaluation to a version, as `patchloom evaluate` does."""
    found = Evaluation(
        metrics={"fid": fid, "precision": 0.5}, identity=EvaluationIdentity.model_validate({**IDENTITY, **identity})
    )
    value = json.dumps(found.to_dict())
    tag_version(name, version, {TAG + found.digest: value})
