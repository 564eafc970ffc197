"""Evaluate: how far samples are from a dataset, as numbers that carry what they depend on."""

from typing import Any

import numpy as np
import torch

from patchloom import __version__
from patchloom.models.metrics import COLOUR_LAYOUT, colour_layout, frechet_distance
from patchloom.pipelines.sample import MANIFEST, read_samples
from patchloom.platform.dataset import Dataset, open_dataset
from patchloom.platform.errors import UserError
from patchloom.platform.progress import progress, say
from patchloom.platform.registry import tag_version
from patchloom.platform.storage import local_path, read_json, read_json_lines, write_json
from patchloom.platform.tracking import log_metrics

METRICS_FORMAT = 1
METRICS = ("fd",)
CHUNK = 512


def evaluate(
    samples: str, reference: str, *, metrics: tuple[str, ...] = ("fd",), out: str | None = None
) -> dict[str, Any]:
    """Compare a sample folder with a prepared pixel dataset; returns the result and writes it to `out`.

    metrics: `fd`, the Fréchet distance on the mean colours of a 4 x 4 grid of tiles (48 numbers an image:
    colours and where they lie, nothing finer; it is not FID). Beside it stands the distance of as many
    real images to the rest, which is what a perfect model would get at this n. out: a JSON file,
    SAMPLES/metrics.json by default. Raises UserError for what cannot be compared.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise UserError(f"--metrics {','.join(unknown)} is not offered: choose among {', '.join(METRICS)}")
    folder = local_path(samples)
    entries = read_json_lines(folder / MANIFEST)
    if not entries:
        raise UserError(f"{folder} holds no samples: give the folder of `patchloom sample`")
    if len(entries) < 2:
        raise UserError(f"{folder} holds 1 image, and a distance takes 2 or more: sample more seeds")
    dataset = open_dataset(reference)
    _check_reference(dataset, read_samples(folder, entries[:1])[0], reference)

    with progress("measuring", len(entries) + len(dataset), "images") as meter:
        sampled = []
        for start in range(0, len(entries), CHUNK):
            sampled.append(_features(read_samples(folder, entries[start : start + CHUNK])))
            meter.update(meter.done + len(sampled[-1]))
        real = []
        for start in range(0, len(dataset), CHUNK):
            real.append(_features(dataset.rows(range(start, min(start + CHUNK, len(dataset))))["image"]))
            meter.update(meter.done + len(real[-1]))
    features_a, features_b = np.concatenate(sampled), np.concatenate(real)
    sampling = read_json(folder / "sampling.json")
    result = {
        "format_version": METRICS_FORMAT,
        "frechet_distance": frechet_distance(features_a, features_b),
        "frechet_distance_of_real_images": _real_floor(features_b, len(features_a)),
        "features": COLOUR_LAYOUT,
        "n_samples": len(features_a),
        "n_reference": len(features_b),
        "seeds": [entries[0]["seed"], entries[-1]["seed"]],
        "reference_fingerprint": dataset.fingerprint,
        "reference_transform": dataset.card["transform"],
        "quantisation": "uint8 PNG",
        "sampling": {key: value for key, value in sampling.items() if key not in ("format_version", "kind")},
        "code_version": __version__,
    }
    write_json(local_path(out) if out else folder / "metrics.json", result)
    _track(sampling, result)
    say(
        f"  Fréchet distance {result['frechet_distance']:.4f} on {COLOUR_LAYOUT} (not FID), "
        f"{len(features_a)} samples against {len(features_b):,} images; "
        f"as many real images: {result['frechet_distance_of_real_images']:.4f}"
    )
    return result


def _check_reference(dataset: Dataset, image: np.ndarray, reference: str) -> None:
    if dataset.kind != "pixels":
        raise UserError(f"{reference} holds {dataset.kind}: give the pixel dataset that they were encoded from")
    side = dataset.card["resolution"]
    if image.shape[-2:] != (side, side):
        found = f"{image.shape[-1]}x{image.shape[-2]}"
        raise UserError(f"samples are {found} and the reference is {side}x{side}: give a reference of the same size")


def _features(images: np.ndarray) -> np.ndarray:
    features: np.ndarray = colour_layout(torch.from_numpy(images)).numpy()
    return features


def _real_floor(features: np.ndarray, n: int) -> float:
    """The distance of n real images, drawn with a fixed seed, to the rest of them."""
    order = np.random.default_rng(0).permutation(len(features))
    n = min(n, len(features) // 2)
    return frechet_distance(features[order[:n]], features[order[n:]])


def _track(sampling: dict[str, Any], result: dict[str, Any]) -> None:
    """The number goes to the run that made the model, where the samples came from a registered one."""
    run_id = sampling["lineage"]["run_id"]
    if run_id:
        name = f"frechet_distance/{COLOUR_LAYOUT}"
        log_metrics(run_id, {name: result["frechet_distance"], f"{name}/n_samples": result["n_samples"]})
        if sampling["lineage"]["name"]:
            tags = {"frechet_distance": f"{result['frechet_distance']:.4f} ({COLOUR_LAYOUT}, n={result['n_samples']})"}
            tag_version(sampling["lineage"]["name"], sampling["lineage"]["version"], tags)
