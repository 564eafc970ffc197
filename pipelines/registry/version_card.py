"""Version card: what a registered version shows of itself on its page in MLflow, and what evaluations add to it."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from patchloom.pipelines.registry.quality import TAG, Evaluation, evaluations_of
from patchloom.platform.tracking.registry import describe_version, find_version, logged_model
from patchloom.platform.tracking.runs import log_artifacts, log_metrics

PREVIEW = "preview"  # the tag that names the picture among the artifacts of the version's run


def write_card(name: str, version: str, tags: dict[str, Any]) -> None:
    """Add tags to a version and write its description anew: preview, facts, evaluations, how to sample from it."""
    found = find_version(name, version=version)
    described = dict(found.tags) | {key: str(value) for key, value in tags.items()}
    describe_version(name, version, card_text(name, version, found.run_id, described), tags)


def card_text(name: str, version: str, run_id: str, tags: dict[str, str]) -> str:
    """The description as Markdown. The picture's address is relative, so that it holds behind any server's."""
    lines = [f"Patch diffusion denoiser on {tags['kind']}.", ""]
    if PREVIEW in tags:
        query = urlencode({"run_uuid": run_id, "path": tags[PREVIEW]})
        lines += [f"![samples of fixed seeds](get-artifact?{query})", ""]
    facts = {key.replace("_", " "): value for key, value in tags.items() if "." not in key and key != PREVIEW}
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    for found in evaluations_of(tags):
        lines += [f"Evaluation `{found.digest}`: {found.numbers()} ({found.circumstances()})", ""]
    return "\n".join([*lines, f"Sample from it: `patchloom sample models:/{name}/{version} samples --seeds 0-63`"])


def record(result: Evaluation, lineage: dict[str, Any], files: list[Path]) -> None:
    """Give a result to the registered version that the samples came from, and to the run that made it.

    Metrics are called `fid/n-50000/1a2b3c4d`: numbers that may not be compared never share a curve.
    """
    if not lineage["run_id"]:
        return
    model_id = None
    if lineage["name"]:
        model_id = logged_model(lineage["name"], lineage["version"])
        value = json.dumps({"metrics": result.metrics, "identity": result.identity})
        write_card(lineage["name"], lineage["version"], {f"{TAG}{result.digest}": value, "quality": result.words()})
    numbers = {
        f"{name}/n-{result.identity['n_samples']}/{result.digest}": value
        for name, value in result.metrics.items()
        if isinstance(value, float)
    }
    log_metrics(lineage["run_id"], numbers, model_id=model_id)
    log_artifacts(lineage["run_id"], *files, under=f"evaluations/{result.digest}")
