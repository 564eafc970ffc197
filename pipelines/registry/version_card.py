"""Version card: what the page of a registered version in MLflow shows, and what an evaluation adds to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from patchloom.pipelines.registry.quality import GROUP, TAG, TITLES, Evaluation, evaluations_of
from patchloom.platform.progress import say
from patchloom.platform.records.samples import ModelLineage
from patchloom.platform.tracking.registry import describe_version, find_version, logged_model
from patchloom.platform.tracking.runs import (
    log_artifacts,
    log_dataset,
    log_metrics,
    run_exists,
    tag_run,
    tags_of_run,
)
from patchloom.platform.tracking.store import shown_uri

CONDITIONS = " --conditions FOLDER"  # of the command that samples from a model with a condition
LABEL_TAG = "mlflow.patchloom.label."  # prefix of a run's tag, followed by the digest of an evaluation: its label
CARD_SECTIONS = {  # of the description: tags with their words
    "Training": {
        "p": "p, the share of steps on full-size images",
        "schedule": "Schedule of patch sizes",
        "images_seen": "Counted images (crops and full images)",
        "updates": "Updates",
        "held_out_loss": "Held-out loss",
        "condition": "Condition",
    },
    "Provenance": {
        "dataset_fingerprint": "Dataset fingerprint",
        "recipe_sha256": "Recipe, sha256",
        "weights_sha256": "Weights, sha256",
        "files_sha256": "List of files, sha256",
        "address": "Stored at",
        "code_version": "Version of Patchloom",
    },
}
PREVIEW = "preview"  # the tag with the name of the preview picture among the artifacts of the version's run


def write_card(name: str, version: str, tags: dict[str, str]) -> None:
    """Add tags to a version and rewrite its description."""
    found = find_version(name, version=version)
    describe_version(name, version, card_text(name, version, found.run_id, dict(found.tags) | tags), tags)


def card_text(name: str, version: str, run_id: str, tags: dict[str, str]) -> str:
    """The description in Markdown: preview, how to sample from the version, quality, training, and where it comes from.

    The address of the picture is relative, so that it is right behind any server's address.
    """
    # a registration that was killed leaves a version without tags
    size = f" of {tags['resolution']} x {tags['resolution']} {tags['kind']}" if "resolution" in tags else ""
    lines = [f"Patch diffusion denoiser{size}.", ""]
    if PREVIEW in tags:
        query = urlencode({"run_uuid": run_id, "path": tags[PREVIEW]})
        lines += [f"![samples of fixed seeds](get-artifact?{query})", ""]
    conditions = CONDITIONS if "condition" in tags else ""
    command = f"patchloom sample models:/{name}/{version} samples --seeds 0-63{conditions}"
    lines += ["### Sample from it", "", "```", command, "```", "", *_quality_lines(tags)]
    for title, keys in CARD_SECTIONS.items():
        facts = [f"- {words}: {value}" for key, words in keys.items() if (value := _shown(key, tags))]
        lines += [f"### {title}", "", *facts, ""] if facts else []
    return "\n".join(lines).rstrip()


def _shown(key: str, tags: dict[str, str]) -> str:
    """The value of a tag as a person reads it: whole numbers with commas, checksums as code."""
    value = tags.get(key, "")
    if key in ("images_seen", "updates") and value.isdigit():
        return f"{int(value):,}"
    return f"`{value}`" if value and ("sha256" in key or key in ("dataset_fingerprint", "address")) else value


def _quality_lines(tags: dict[str, str]) -> list[str]:
    """A list of the metrics of each evaluation."""
    lines = []
    for found in evaluations_of(tags):
        lines += [f"### Quality ({found.circumstances()})", ""]
        lines += [f"- {TITLES[metric][0]}: {found.value(metric):.4g}" for metric in TITLES if metric in found.metrics]
        lines += [f"- Files: `evaluations/{found.digest}` of the run", ""]
    return lines


@dataclass(frozen=True)
class ReferenceSet:
    """What samples were compared with: its address, and the fingerprint of its images or statistics."""

    address: str
    fingerprint: str


def record_evaluation(result: Evaluation, lineage: ModelLineage, files: list[Path], reference: ReferenceSet) -> None:
    """Add an evaluation to the registered version that the samples came from, and to the run that trained it.

    A metric is logged as `quality/fid n-50000 heun-18`, so that values that cannot be compared are on different curves,
    and as `fid`, by which `models list` filters and sorts. MLflow's latest value of `fid` is the one with the most
    samples. Both are linked to the reference, and to the logged model of the version.
    """
    run_id = lineage.run_id
    if not run_id:
        return
    if not run_exists(run_id):
        say(f"  {shown_uri()} does not have the run {run_id} of the model: only the file has this evaluation")
        return
    model_id = None
    if lineage.name and lineage.version:
        model_id = logged_model(lineage.name, lineage.version)
        value = json.dumps(result.to_dict())
        write_card(lineage.name, lineage.version, {f"{TAG}{result.digest}": value, "quality": result.headline()})
    samples, label = result.identity.n_samples, _label_in_run(run_id, result)
    numbers = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
    dataset = log_dataset(run_id, reference.address, reference.fingerprint, "evaluation")
    by_label = {f"{GROUP}/{name} {label}": numbers[name] for name in TITLES if name in numbers}
    log_metrics(run_id, by_label, model_id=model_id, dataset=dataset)
    # the latest value has the highest step
    log_metrics(run_id, numbers, step=samples, model_id=model_id, dataset=dataset)
    log_artifacts(run_id, *files, under=f"evaluations/{result.digest}")


def _label_in_run(run_id: str, result: Evaluation) -> str:
    """The label of an evaluation. If the run has another one with the same label, the digest makes it unique."""
    kept = {key: value for key, value in tags_of_run(run_id).items() if key.startswith(LABEL_TAG)}
    key = f"{LABEL_TAG}{result.digest}"
    if key not in kept:
        label = result.label()
        kept[key] = f"{label} {result.digest}" if label in kept.values() else label
        tag_run(run_id, {key: kept[key]})
    return kept[key]
