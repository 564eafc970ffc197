"""Hub card: the README.md of an exported model, in the format of the model cards of the Hugging Face Hub."""

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import JsonValue

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.cards import CONTROLNET, ModelCard
from patchloom.pipelines.registry.describing import version_of
from patchloom.pipelines.registry.quality import TITLES, Evaluation, evaluations_of
from patchloom.pipelines.registry.version_card import CONDITIONS
from patchloom.platform.files.inside import check_links
from patchloom.platform.progress import say
from patchloom.platform.tracking.registry import FetchedModel, fetch_preview
from patchloom.redaction import redacted

HUB_CARD, SAMPLES_PICTURE = "README.md", "samples.png"
UNKNOWN_LICENSE = "unknown"  # an identifier of the Hub
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
MOST_NAMES = 20  # of classes in the text


def check_license(name: str) -> None:
    """Raise UserError unless a text has the form of the Hub's license identifiers."""
    if not LICENSE_ID.fullmatch(name):
        raise UserError(
            f"license: {name!r} is not an identifier of the Hugging Face Hub: give one such as apache-2.0, cc-by-4.0, "
            f"openrail, other or {UNKNOWN_LICENSE}"
        )


def write_hub_card(folder: Path, fetched: FetchedModel, card: ModelCard, license_id: str, *, diffusers: bool) -> None:
    """Write `README.md` and, if the run of the model has a preview, `samples.png` into an exported folder.

    Args:
        folder: the exported folder. A README.md in it is kept.
        fetched: the model that was exported.
        card: its `model.json`.
        license_id: the license of the weights, an identifier of the Hub.
        diffusers: the folder is a ControlNet for diffusers, without the rest of the model.
    """
    if (folder / HUB_CARD).exists():
        return
    picture = _samples_picture(fetched, folder / SAMPLES_PICTURE)
    version = version_of(fetched)
    evaluations = evaluations_of(version.tags) if version else []
    name = fetched.name or card.name or "model"
    metadata = _metadata(name, card, evaluations, license_id, diffusers)
    body = [f"# {_plain(name)}", "", _summary(card), ""]
    if picture:
        body += [f"![samples of fixed seeds]({SAMPLES_PICTURE})", ""]
    body += _diffusers_usage(card) if diffusers else _usage(card)
    body += _metrics(evaluations)
    body += _training(card)
    if license_id == UNKNOWN_LICENSE:
        body += [
            "The license of the weights is not stated. Set `license` at the top of this file before you publish.",
            "",
        ]
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)
    (folder / HUB_CARD).write_text(redacted(f"---\n{header}---\n\n" + "\n".join(body)), encoding="utf-8")


def _metadata(
    name: str, card: ModelCard, evaluations: Sequence[Evaluation], license_id: str, diffusers: bool
) -> dict[str, JsonValue]:
    """The YAML block: what the Hub filters and sorts by."""
    tags: list[JsonValue] = ["diffusion", "patch-diffusion", card.normalisation.kind]
    found: dict[str, JsonValue] = {
        "license": license_id,
        "library_name": "diffusers" if diffusers else "patchloom",
        "pipeline_tag": _task(card),
        "tags": [*tags, CONTROLNET] if card.denoiser.network == CONTROLNET else tags,
    }
    results: list[JsonValue] = [_result(evaluation, _task(card)) for evaluation in evaluations if _numbers(evaluation)]
    if results:  # the Hub refuses a model-index without results
        metrics: list[JsonValue] = list(dict.fromkeys(name for found in evaluations for name in _numbers(found)))
        found |= {"metrics": metrics, "model-index": [{"name": name, "results": results}]}
    return found


def _task(card: ModelCard) -> str:
    """The task of the Hub."""
    if card.denoiser.network == CONTROLNET:
        return "text-to-image"
    return "unconditional-image-generation" if card.condition is None else "image-to-image"


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation that are finite numbers, in the order of `TITLES`."""
    found = {name: evaluation.metrics.get(name) for name in TITLES}
    return {name: value for name, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def _result(evaluation: Evaluation, task: str) -> dict[str, JsonValue]:
    """An entry of `model-index`. The reference images are no dataset of the Hub, so `type` names none."""
    identity = evaluation.identity
    metrics: list[JsonValue] = [
        {
            "type": name,
            "name": f"{TITLES[name][0]}, n = {identity.n_samples:,}",
            "value": value,
            "args": {"n": identity.n_samples, "features": identity.features, "evaluation": evaluation.digest},
        }
        for name, value in _numbers(evaluation).items()
    ]
    dataset = {"type": "images", "name": _reference(evaluation), "revision": str(identity.reference)}
    return {"task": {"type": task}, "dataset": {**dataset}, "metrics": metrics}


def _reference(evaluation: Evaluation) -> str:
    count, reference = evaluation.identity.n_reference, str(evaluation.identity.reference)[:12]
    return f"{count:,} images ({reference})" if count else f"statistics ({reference})"


def _summary(card: ModelCard) -> str:
    """What the model is, in two sentences."""
    size, channels = card.denoiser.resolution, card.denoiser.channels
    space = "pixels" if card.normalisation.kind == "pixels" else "latents"
    what = "ControlNet" if card.denoiser.network == CONTROLNET else "diffusion model"
    text = f"A {what} of {size} x {size} {space} with {channels} channels"
    if card.autoencoder:
        text += f", which its autoencoder decodes to {card.image_side} x {card.image_side} pixels"
    if card.patches:
        text += f". It was trained on patches, with p = {card.patches.p:g} and the {card.patches.schedule} schedule"
    if card.condition:
        text += f". It follows a condition image: {_plain(card.condition.summary)}"
    return f"{text} ([Patch Diffusion](https://arxiv.org/abs/2304.12526))."


def _usage(card: ModelCard) -> list[str]:
    """How to load the model and sample from it; `folder` is this folder."""
    package = card.denoiser.network.split(".")[0] if ":" in card.denoiser.network else None
    code = ["import numpy as np", "import patchloom"]
    if package:
        code += ["from patchloom.models.backbones import allow_backbones", "", f'allow_backbones("{package}")']
    code += ["", 'folder = "."  # or huggingface_hub.snapshot_download("USER/NAME")']
    if card.condition is None:
        code += [
            "sampler = patchloom.Sampler(folder, steps=18)",
            'images = sampler({"seed": np.arange(4)})["image"]  # (4, H, W, C) uint8',
        ]
    code += ["denoiser = patchloom.load_model(folder)  # the network alone, for your own sampler"]
    options = (CONDITIONS if card.condition else "") + (f" --allow-backbone {package}" if package else "")
    command = f"patchloom sample . samples --seeds 0-63{options}"
    base = []
    if card.denoiser.network == CONTROLNET:
        name = _plain(str(card.denoiser.network_options.get("base")))
        base = [f"It needs its base, {name}, on the machine; `PATCHLOOM_BASE_MODEL` names another folder for it.", ""]
    needed = f"Needs `patchloom` {__version__} or newer."
    return ["## Use", "", needed, "", *base, "```python", *code, "```", "", "```", command, "```", ""]


def _diffusers_usage(card: ModelCard) -> list[str]:
    """How to load an exported ControlNet with diffusers."""
    base = _plain(str(card.denoiser.network_options.get("base")))
    code = ["from diffusers import ControlNetModel", "", 'controlnet = ControlNetModel.from_pretrained(".")']
    coordinates = (
        ", then the coordinates x and y of each pixel in [-1, 1]" if card.denoiser.coordinates != "none" else ""
    )
    text = f"It controls {base}. The channels of its control image: the condition in [0, 1]{coordinates}."
    return ["## Use", "", text, "", "```python", *code, "```", ""]


def _metrics(evaluations: Sequence[Evaluation]) -> list[str]:
    """A table of all metrics with the number of samples and what they were compared with."""
    rows = [
        f"| {TITLES[name][0]} | {value:.4g} | {found.identity.n_samples:,} | {_plain(found.circumstances())} |"
        for found in evaluations
        for name, value in _numbers(found).items()
    ]
    if not rows:
        return []
    return ["## Metrics", "", "| metric | value | n | measured with |", "|---|---|---|---|", *rows, ""]


def _training(card: ModelCard) -> list[str]:
    """Where the weights come from."""
    names = ", ".join(card.class_names[:MOST_NAMES])
    more = f", and {len(card.class_names) - MOST_NAMES:,} more" if len(card.class_names) > MOST_NAMES else ""
    facts = {
        "network": card.denoiser.network,
        "classes": names + more,
        "counted images (crops and full images)": f"{card.images_seen:,}" if card.images_seen is not None else "",
        "updates": f"{card.updates:,}" if card.updates is not None else "",
        "imported from": card.imported_from.file if card.imported_from else "",
        "dataset fingerprint": card.dataset_fingerprint or "",
        "patchloom": card.code_version,
        "sha256 of the weights": card.weights_sha256,
    }
    rows = [f"| {name} | {_plain(value)} |" for name, value in facts.items() if value]
    return ["## Training", "", "| | |", "|---|---|", *rows, ""]


def _samples_picture(fetched: FetchedModel, place: Path) -> bool:
    """Copy the newest preview of the run of a model; False if there is none, or if MLflow no longer has it."""
    if fetched.run_id:
        try:
            return fetch_preview(fetched, place) is not None
        except UserError as error:
            say(f"  the model card has no picture: {error}")
            return False
    run = fetched.folder.parent
    found = sorted((run / "previews").glob("*.png"))[-1:] if (run / "run.json").is_file() else []
    for picture in found:
        check_links(run, picture, run)
        place.write_bytes(picture.read_bytes())
    return bool(found)


def _plain(text: str) -> str:
    """A text that comes from a file, in one line of Markdown and without effect there."""
    words = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(words, quote=False))
