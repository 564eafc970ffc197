"""Evaluate: how far images are from others, as numbers that carry what they depend on."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.features import INCEPTION, Features
from patchloom.models.metrics import COLOUR_LAYOUT, KID_SUBSET_SIZE, KID_SUBSETS
from patchloom.pipelines.evaluate.features import (
    BATCH,
    COLOUR_FEATURES,
    extract,
    load_features,
    missing_features,
    read_statistics,
    write_statistics,
)
from patchloom.pipelines.evaluate.image_sets import ImageSet, SampleImages, check_pair, open_images, sha256_at
from patchloom.pipelines.evaluate.metrics import METRICS, NEIGHBOURS, ComparedSets
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.registry.quality import TITLES, Evaluation
from patchloom.pipelines.registry.version_card import record_evaluation
from patchloom.platform.compute.session import ray_session
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import make_folder, write_json
from patchloom.platform.progress import say

METRICS_FORMAT = 2
SHOWN = 16
# of how samples were made: whose they are is what is compared; the others change last bits or only the container
NOT_OF_THE_NUMBERS = ("model", "batch", "threads", "format", "shard_size")


def evaluate(
    samples: str,
    reference: str,
    *,
    metrics: tuple[str, ...] | None = None,
    features: str = "inception",
    out: str | None = None,
    save_reference: str | None = None,
    workers: int | None = None,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Measure images against a reference: FID, KID, precision, recall, ...

    The result is written to `out` and, if the samples come from a registered model, added to its version.

    Args:
        samples: a folder of `sample`, a folder of PNG files, an `.npz`, or a prepared dataset. Latents are decoded.
        reference: any of these, or an `.npz` of statistics (EDM's or ADM's).
        metrics: some of "fid", "sfid", "kid", "is", "precision", "recall" (on Inception features), "fd" (Fréchet
            distance of other features), "psnr", "ssim". By default all that apply but the last two.
        features: "inception", "dinov2", "colours" (mean tile colours, no network), or a file of Inception weights or
            TorchScript.
        out: the JSON file to write. By default `SAMPLES/metrics.json`.
        save_reference: also save the statistics of the reference to this `.npz`.
        workers: worker processes; 0 runs in this process, without Ray. By default all GPUs or CPUs.
        batch: images per forward pass.

    Returns:
        The metrics, and everything that they depend on.

    Raises:
        UserError: the images cannot be compared, or the metrics do not fit the features or the reference.

    Example:
        result = patchloom.evaluate("samples", "dataset", features="colours", workers=0)
        print(result["metrics"]["frechet_distance"])
    """
    ours = open_images(samples)
    statistics = read_statistics(reference) if reference.endswith(".npz") else {}
    theirs = _reference_images(reference, bool(statistics))
    check_pair(ours, theirs)
    network = load_features(features if metrics is None or _outputs(metrics) else COLOUR_FEATURES)
    least = min(len(images) for images in (ours, theirs) if images is not None)
    chosen = metrics or _possible(network, theirs is not None, set(statistics), least)
    _check_metrics(chosen, network, theirs is not None, set(statistics))
    sides = _extract(ours, theirs, statistics, network, features, chosen, workers, batch)
    if save_reference:
        _save_reference(sides, save_reference, _outputs(chosen))
    result = Evaluation(_measured(sides, chosen), _identity(sides, network, reference, theirs))
    written = _keep(result, sides, out or _default_place(ours))
    _tell(result)
    return written


def _measured(sides: ComparedSets, chosen: tuple[str, ...]) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    try:
        for measure in dict.fromkeys(METRICS[name].measure for name in chosen):
            measured |= measure(sides)
    except ValueError as error:  # of too few rows
        raise UserError(f"{sides.samples.images.address}: {error}: sample more seeds") from None
    return measured


def _reference_images(reference: str, has_statistics: bool) -> ImageSet | None:
    """The reference's images; None for a file that holds statistics alone."""
    if not has_statistics:
        return open_images(reference)
    try:
        return open_images(reference)  # ADM's files may hold both
    except UserError:
        return None


def _outputs(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """What a network must give for these metrics."""
    outputs = [METRICS[name].output for name in metrics if name in METRICS]
    return tuple(dict.fromkeys(output for output in outputs if output is not None))


def _possible(network: Features, has_images: bool, statistics: set[str], least: int) -> tuple[str, ...]:
    """Every metric that the features, the reference and the smaller side's images allow, psnr and ssim aside."""
    is_inception = network.name == INCEPTION
    return tuple(
        name
        for name, metric in METRICS.items()
        if metric.output in network.outputs
        and least >= metric.least_images
        and metric.of_inception in (None, is_inception)
        and (has_images or (not metric.needs_images and metric.output in statistics))
        and (name != "is" or network.classifier is not None)
    )


def _check_metrics(chosen: tuple[str, ...], network: Features, has_images: bool, statistics: set[str]) -> None:
    unknown = [name for name in chosen if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics {','.join(unknown)} is not offered: choose among {', '.join(METRICS)}")
    for name in chosen:
        metric = METRICS[name]
        if metric.of_inception and network.name != INCEPTION:
            raise UserError(
                f"{name} is measured on {INCEPTION} and the features are {network.name}: ask for fd instead"
            )
        if not has_images and (metric.needs_images or metric.output not in statistics):
            raise UserError(f"{name} needs the reference's images, and its file holds statistics alone: give a dataset")


def _extract(
    ours: ImageSet, theirs: ImageSet | None, statistics: dict[str, tuple[Tensor, Tensor]], network: Features,
    features: str, chosen: tuple[str, ...], workers: int | None, batch: int,
) -> ComparedSets:  # fmt: skip
    """Look at both sides, as far as the metrics need them."""
    outputs = _outputs(chosen)
    workers = 0 if network.name == COLOUR_LAYOUT else workers  # done before Ray would have started
    wanted = [METRICS[name].output for name in chosen if METRICS[name].needs_images]
    theirs_outputs = tuple(output for output in outputs if output in wanted or output not in statistics)
    with contextlib.ExitStack() as stack:
        todo = missing_features(ours, network, outputs) or (
            theirs is not None and missing_features(theirs, network, theirs_outputs)
        )
        if todo and workers != 0:
            stack.enter_context(ray_session())  # one for both sides
        options = network, features, workers, batch
        reference = extract(theirs, theirs_outputs, *options) if theirs is not None else None
        return ComparedSets(extract(ours, outputs, *options), reference, dict(statistics))


def _save_reference(sides: ComparedSets, address: str, outputs: tuple[str, ...]) -> None:
    if sides.reference is None or sides.statistics:
        raise UserError(
            f"the reference is statistics already, so --save-reference {address} would copy it: copy the file"
        )
    write_statistics(address, {output: sides.reference.moments(output) for output in outputs})
    say(f"  statistics of the reference -> {address}")


def _identity(sides: ComparedSets, network: Features, reference: str, theirs: ImageSet | None) -> dict[str, Any]:
    """All that the numbers depend on but the images that are measured."""
    ours = sides.samples.images
    options = {key: value for key, value in ours.details.items() if key not in NOT_OF_THE_NUMBERS}
    about: dict[str, Any]
    if theirs is None:
        about = {"reference": sha256_at(reference), "reference_kind": "statistics", "n_reference": None}
    else:
        about = {"reference": theirs.fingerprint, "reference_kind": theirs.kind, "n_reference": len(theirs),
                 "reference_transform": theirs.details.get("transform")}  # fmt: skip
    return {
        **network.describe().to_json(),
        "width": len(sides.samples.moments().mean),
        "quantisation": "uint8",
        "images": ours.kind,
        "n_samples": len(ours),
        "seeds": seed_ranges([entry.seed for entry in ours.entries]) if isinstance(ours, SampleImages) else None,
        **options,
        **about,
        "kid_subsets": [KID_SUBSETS, min(KID_SUBSET_SIZE, len(ours) // 2)],
        "neighbours": NEIGHBOURS,
    }


def seed_ranges(seeds: list[int]) -> str:
    """`0-63,70`: ascending seeds in few words."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _default_place(images: ImageSet) -> str:
    """`metrics.json` in what patchloom wrote, beside what others did."""
    return f"{images.address}/metrics.json" if images.features_folder else f"{images.address}.metrics.json"


def _keep(result: Evaluation, sides: ComparedSets, address: str) -> dict[str, Any]:
    """Write the result and its pictures, here or far away, and give them to the version they are of."""
    folder, name = Folder.of_file(address)
    if not folder.is_remote:
        make_folder(folder.path)
    images = sides.samples.images
    with tempfile.TemporaryDirectory() as scratch:
        files = _write(result, sides, Path(scratch) / name)
        for file in files:
            folder.put(file, file.name)
        if isinstance(images, SampleImages):
            record_evaluation(result, images.sampling.lineage, files)
    written: dict[str, Any] = folder.read_json(name)
    return written


def _write(result: Evaluation, sides: ComparedSets, place: Path) -> list[Path]:
    """Write the result and its pictures; returns their paths, the result's first."""
    pictures = []
    if "neighbours" in vars(sides):
        for name, rows in _pictures(sides).items():
            pictures.append(place.with_name(f"{place.stem}.{name}.png"))
            save_png(side_by_side(rows, scale=1 if rows[0].shape[-1] >= 64 else 2), pictures[-1])
    write_json(place, {
        "format_version": METRICS_FORMAT,
        "metrics": result.metrics,
        "identity": result.identity,
        "digest": result.digest,
        "model": sides.samples.images.details.get("model"),
        "notes": notes(result),
        "pictures": [picture.name for picture in pictures],
        "code_version": __version__,
    })  # fmt: skip
    return [place, *pictures]


def _pictures(sides: ComparedSets) -> dict[str, list[np.ndarray]]:
    """Samples nearest to a real image, above it; and samples where real images are densest and thinnest."""
    assert sides.reference is not None
    found, ours, theirs = sides.neighbours, sides.samples.images, sides.reference.images
    near = _nearest_pairs(found.nearest_distance.cpu().numpy(), found.nearest.cpu().numpy())
    by_density = (-found.density).argsort(stable=True).cpu().numpy()
    return {
        "nearest": [ours.at(near), theirs.at(found.nearest.cpu().numpy()[near])],
        "density": [ours.at(by_density[:SHOWN]), ours.at(by_density[-SHOWN:])],
    }


def _nearest_pairs(distance: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The samples nearest to a reference image, at most one an image."""
    order = distance.argsort(kind="stable")
    _, first = np.unique(nearest[order], return_index=True)
    return np.asarray(order[np.sort(first)[:SHOWN]])


def notes(result: Evaluation) -> list[str]:
    """What somebody who reads the numbers must know."""
    metrics, n = result.metrics, result.identity["n_samples"]
    said = []
    for name in ("fid", "frechet_distance"):
        if f"{name}_infinity" in metrics:
            low, high = metrics[f"{name}_interval_95"]
            said.append(
                f"{TITLES[name][0]} of {n:,} samples is biased upwards, about {metrics[f'{name}_infinity']:.4g} with "
                f"ever more of them{_hint(n, result)}, and {low:.4g} to {high:.4g} in 95 % of draws of {n:,}: "
                "compare it at the same n only"
            )
        if f"{name}_of_real_images" in metrics:
            said.append(f"as many real images come to {metrics[f'{name}_of_real_images']:.4g} against the rest of them")
    if "sfid" in metrics:
        said.append("sFID is unverified: no published value could be reproduced yet")
    if "authenticity" in metrics:
        said.append(
            f"{1 - metrics['authenticity']:.0%} of the samples are nearer to a reference image than any other "
            "reference image is (about half of real images are; much more points to copies)"
        )
    if result.identity["features"] == COLOUR_LAYOUT:
        said.append("mean tile colours see colours and where they lie, nothing finer: this is no FID")
    return said


def _hint(n: int, result: Evaluation) -> str:
    """A line in 1 / n fits where there are more samples than features."""
    return " (an extrapolation from few, and so a hint)" if n < 2 * result.identity["width"] else " (extrapolated)"


def _tell(result: Evaluation) -> None:
    identity = result.identity
    reference = f"{identity['n_reference']:,} images" if identity["n_reference"] else "statistics"
    say(f"  {identity['n_samples']:,} {identity['images']} against {reference}, features {identity['features']}")
    for name, (title, _) in TITLES.items():
        if name in result.metrics:
            error = result.metrics.get(f"{name}_standard_error")
            say(f"    {title:<16} {result.metrics[name]:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    for note in notes(result):
        say(f"  {note}")
