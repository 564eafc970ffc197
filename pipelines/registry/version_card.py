"""Version card: what the page of a registered version in MLflow shows, and what an evaluation adds to it."""

import json
from pathlib import Path
from urllib.parse import urlencode

from patchloom.pipelines.registry.quality import TAG, Evaluation, evaluations_of
from patchloom.platform.progress import say
from patchloom.platform.records.samples import ModelLineage
from patchloom.platform.tracking.registry import describe_version, find_version, logged_model
from patchloom.platform.tracking.runs import log_artifacts, log_metrics, run_exists
from patchloom.platform.tracking.store import shown_uri

CONDITIONS = " --conditions FOLDER"  # of the command that samples from a model with a condition
PREVIEW = "preview"  # the tag with the name of the preview picture among the artifacts of the version's run


def write_card(name: str, version: str, tags: dict[str, str]) -> None:
    """Add tags to a version and rewrite its description."""
    found = find_version(name, version=version)
    describe_version(name, version, card_text(name, version, found.run_id, dict(found.tags) | tags), tags)


def card_text(name: str, version: str, run_id: str, tags: dict[str, str]) -> str:
    """The description in Markdown: preview, facts, evaluations, and how to sample from the version.

    The address of the picture is relative, so that it is right behind any server's address.
    """
    lines = [f"Patch diffusion denoiser on {tags['kind']}.", ""]
    if PREVIEW in tags:
        query = urlencode({"run_uuid": run_id, "path": tags[PREVIEW]})
        lines += [f"![samples of fixed seeds](get-artifact?{query})", ""]
    facts = {key.replace("_", " "): value for key, value in tags.items() if "." not in key and key != PREVIEW}
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    for found in evaluations_of(tags):
        lines += [f"Evaluation `{found.digest}`: {found.numbers()} ({found.circumstances()})", ""]
    command = (
        f"patchloom sample models:/{name}/{version} samples --seeds 0-63{CONDITIONS if 'condition' in tags else ''}"
    )
    return "\n".join([*lines, f"Sample from it: `{command}`"])


def record_evaluation(result: Evaluation, lineage: ModelLineage, files: list[Path]) -> None:
    """Add an evaluation to the registered version that the samples came from, and to the run that trained it.

    A metric is logged as `fid/n-50000/1a2b3c4d`, so that values that cannot be compared are on different curves, and as
    `fid`, by which `models list` filters and sorts. MLflow's latest value of `fid` is the one with the most samples.
    """
    if not lineage.run_id:
        return
    if not run_exists(lineage.run_id):
        say(f"  {shown_uri()} does not have the run {lineage.run_id} of the model: only the file has this evaluation")
        return
    model_id = None
    if lineage.name and lineage.version:
        model_id = logged_model(lineage.name, lineage.version)
        value = json.dumps(result.to_dict())
        write_card(lineage.name, lineage.version, {f"{TAG}{result.digest}": value, "quality": result.headline()})
    samples = result.identity.n_samples
    numbers = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
    by_identity = {f"{name}/n-{samples}/{result.digest}": value for name, value in numbers.items()}
    log_metrics(lineage.run_id, by_identity, model_id=model_id)
    log_metrics(lineage.run_id, numbers, step=samples, model_id=model_id)  # the latest value has the highest step
    log_artifacts(lineage.run_id, *files, under=f"evaluations/{result.digest}")
