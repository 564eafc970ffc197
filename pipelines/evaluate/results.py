"""The result of an evaluation: its identity, its files, its notes, and what the command prints."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.features import POOL, Features
from patchloom.models.metrics import COLOUR_LAYOUT, EXTRAPOLATION_ROWS, INTERVAL_ROWS, KID_SUBSET_SIZE, KID_SUBSETS
from patchloom.pipelines.evaluate.image_sets import ImageSet, SampleImages, sha256_at
from patchloom.pipelines.evaluate.metrics import FEW_SAMPLES, NEIGHBOURS, ComparedSets
from patchloom.pipelines.pages.pictures import is_own_picture, save_png, side_by_side
from patchloom.pipelines.registry.quality import TITLES, Evaluation
from patchloom.pipelines.registry.version_card import ReferenceSet, record_evaluation
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_new_file
from patchloom.platform.files.storage import make_folder, write_json
from patchloom.platform.progress import say
from patchloom.platform.records.evaluation import EvaluationIdentity, EvaluationResult
from patchloom.platform.tracking.origin import command_line
from patchloom.redaction import redacted

HINT_ROWS = 10  # per feature: an extrapolation from fewer still has 5 to 8 % of the bias
PICTURED_IMAGES, PICTURES = 16, ("nearest", "density")
# options of the samples that are not part of the identity: the model is what is compared, the others change only the
# last bits or the file format
NOT_IN_IDENTITY = ("model", "batch", "threads", "device", "format", "shard_size")
DEFAULTS_NOT_IN_IDENTITY = {"precision": "fp32"}  # results of versions without these options stay comparable


def identity_of(sets: ComparedSets, network: Features, reference: str, outputs: tuple[str, ...]) -> EvaluationIdentity:
    """Everything that the metrics depend on, except the measured images.

    Args:
        sets: what is compared.
        network: the feature network.
        reference: the address of the reference.
        outputs: those of the network that were computed; none for metrics that compare the images themselves.
    """
    images = sets.samples.images
    options = {
        key: value
        for key, value in images.details.items()
        if key not in NOT_IN_IDENTITY and (key, value) not in DEFAULTS_NOT_IN_IDENTITY.items()
    }
    seeds = seed_ranges(images.seeds()) if isinstance(images, SampleImages) else None
    used = POOL if POOL in outputs else next(iter(outputs), None)
    return EvaluationIdentity.model_validate({
        **network.describe().to_json(),
        "width": len(sets.samples.moments(used).mean) if used else 0,
        "quantisation": "uint8",
        "images": images.kind,
        "n_samples": len(images),
        "seeds": seeds,
        **options,
        **_reference_identity(sets, reference),
        "kid_subsets": [KID_SUBSETS, min(KID_SUBSET_SIZE, len(images) // 2)],
        "neighbours": NEIGHBOURS,
    })  # fmt: skip


def _reference_identity(sets: ComparedSets, reference: str) -> dict[str, JsonValue]:
    if sets.reference is None:
        return {"reference": sha256_at(reference), "reference_kind": "statistics", "n_reference": None}
    images = sets.reference.images
    return {
        "reference": images.fingerprint,
        "reference_kind": images.kind,
        "n_reference": len(images),
        "reference_transform": images.details.get("transform"),
    }


def seed_ranges(seeds: Iterable[int]) -> str:
    """Ascending seeds as ranges: `0-63,70`."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def default_address(images: ImageSet) -> str:
    """`metrics.json` in a folder that patchloom wrote, next to anything else."""
    return f"{images.address}/metrics.json" if images.features_folder else f"{images.address}.metrics.json"


def check_result_file(address: str) -> None:
    """Raise UserError if a file that is not the result of an evaluation has this address."""
    folder, name = Folder.of_file(address)
    if not name:
        raise UserError(f"--out {address} is a folder: give the name of a JSON file in it")
    check_new_file(folder, name, "result of `evaluate`", lambda content: b'"metrics"' in content)
    for picture in PICTURES:
        check_new_file(folder, _picture_name(name, picture), "picture of `evaluate`", is_own_picture)


def _picture_name(name: str, picture: str) -> str:
    return f"{Path(name).stem}.{picture}.png"


def write_result(evaluation: Evaluation, sets: ComparedSets, address: str, reference: str) -> EvaluationResult:
    """Write the JSON file and its pictures, and add them to the registered version of the samples."""
    folder, name = Folder.of_file(address)
    if not folder.is_remote:
        make_folder(folder.path)
    images = sets.samples.images
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / name
        pictures = _drawn_pictures(sets, place)
        result = EvaluationResult(
            metrics=evaluation.metrics,
            identity=evaluation.identity,
            digest=evaluation.digest,
            model=images.details.get("model"),
            notes=notes_on(evaluation),
            pictures=[picture.name for picture in pictures],
            code_version=__version__,
            command=redacted(command_line()),
        )
        write_json(place, result.to_dict())
        for file in (place, *pictures):
            folder.put(file, file.name)
        if isinstance(images, SampleImages):
            compared = ReferenceSet(reference, evaluation.identity.reference)
            record_evaluation(evaluation, images.sampling.lineage, [place, *pictures], compared)
    return result


def _drawn_pictures(sets: ComparedSets, place: Path) -> list[Path]:
    """The pictures, or none of them with a message: they never cost the metrics."""
    try:
        return _write_pictures(sets, place)
    except Exception as error:
        say(f"  the pictures of neighbours cannot be drawn ({error})")
        return []


def _write_pictures(sets: ComparedSets, place: Path) -> list[Path]:
    """Pictures of the samples next to the file `place`, where their neighbours were computed."""
    if "neighbours" not in vars(sets):
        return []
    pictures = []
    for name, rows in _pictures(sets).items():
        pictures.append(place.with_name(_picture_name(place.name, name)))
        save_png(side_by_side(rows, scale=1 if rows[0].shape[-1] >= 64 else 2), pictures[-1])
    return pictures


def _pictures(sets: ComparedSets) -> dict[str, list[np.ndarray]]:
    """Samples above the reference images nearest to them; and samples in dense and in sparse regions."""
    assert sets.reference is not None
    neighbours, samples, reference = sets.neighbours, sets.samples.images, sets.reference.images
    nearest = neighbours.nearest.cpu().numpy()
    pairs = _nearest_pairs(neighbours.nearest_distance.cpu().numpy(), nearest)
    by_density = (-neighbours.density).argsort(stable=True).cpu().numpy()
    return {
        "nearest": [as_rgb(samples.at(pairs)), as_rgb(reference.at(nearest[pairs]))],
        "density": [samples.at(by_density[:PICTURED_IMAGES]), samples.at(by_density[-PICTURED_IMAGES:])],
    }


def as_rgb(images: np.ndarray) -> np.ndarray:
    """(N, 1 or 3, H, W) images with 3 channels."""
    return images.repeat(3, 1) if images.shape[1] == 1 else images


def _nearest_pairs(distance: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The samples nearest to a reference image, at most one per reference image."""
    order = distance.argsort(kind="stable")
    _, first = np.unique(nearest[order], return_index=True)
    return np.asarray(order[np.sort(first)[:PICTURED_IMAGES]])


def notes_on(evaluation: Evaluation) -> list[str]:
    """What a reader of the numbers must know, the most important first."""
    metrics, notes = evaluation.metrics, []
    if evaluation.identity.features == COLOUR_LAYOUT:
        notes.append(
            "This is not FID. The features are the mean colours of 16 tiles, which show colours and where they are, "
            "but no detail: noise of the right colours can score well"
        )
    notes += [note for name in ("fid", "frechet_distance") for note in _frechet_notes(name, evaluation)]
    if "sfid" in metrics:
        notes.append("sFID is not verified: it was not compared with a published value yet")
    window = metrics.get("ssim_window")
    if isinstance(window, float):
        notes.append(
            f"SSIM uses uniform windows of {window:.0f} x {window:.0f} pixels, as scikit-image does. Values with the "
            "Gaussian window of Wang et al. (2004) differ"
        )
    authenticity = metrics.get("authenticity")
    if isinstance(authenticity, float):
        notes.append(
            f"Copies: {1 - authenticity:.0%} of the samples are closer to their nearest reference image than any other "
            "reference image is. Of new real images, up to half are. A much larger share suggests that the model copies"
        )
    return notes


def _frechet_notes(name: str, evaluation: Evaluation) -> list[str]:
    metrics, n, notes = evaluation.metrics, evaluation.identity.n_samples, []
    title = TITLES[name][0]
    if name in metrics and n < FEW_SAMPLES:
        notes.append(
            f"With {n:,} samples, the {title} is too high (it is biased upwards): compare it only with values of the "
            f"same n. {_extrapolation_note(name, evaluation)}. {_interval_note(name, evaluation)}"
        )
    if f"{name}_of_real_images" in metrics:
        real = metrics[f"{name}_of_real_images"]
        notes.append(f"For comparison: the {title} between {n:,} of the real images and the others is {real:.4g}")
    return notes


def _interval_note(name: str, evaluation: Evaluation) -> str:
    """What the interval is for, or why it is not in the result."""
    n, width = evaluation.identity.n_samples, evaluation.identity.width
    interval = evaluation.metrics.get(f"{name}_interval_95")
    if isinstance(interval, list):
        return (
            f"The mean over many sets of {n:,} samples is between {interval[0]:.4g} and {interval[1]:.4g} (95% "
            "interval); a single set can be further off"
        )
    return f"A 95% interval needs {INTERVAL_ROWS * width:,} samples or more"


def _extrapolation_note(name: str, evaluation: Evaluation) -> str:
    """The distance with unlimited samples and how far it can be trusted, or why it is not in the result."""
    n, width = evaluation.identity.n_samples, evaluation.identity.width
    infinity = evaluation.metrics.get(f"{name}_infinity")
    if isinstance(infinity, float):
        rough = " (a rough estimate from few samples)" if n < HINT_ROWS * width else " (extrapolated)"
        return f"With unlimited samples it would be about {infinity:.4g}{rough}"
    if n < EXTRAPOLATION_ROWS * width:
        return f"An estimate for unlimited samples needs {EXTRAPOLATION_ROWS * width:,} samples or more"
    return "The value for unlimited samples is too small to be estimated from these samples"


def print_result(result: EvaluationResult) -> None:
    """Print the metrics and the notes."""
    identity = result.identity
    reference = f"{identity.n_reference:,} images" if identity.n_reference else "statistics"
    say(f"  {identity.n_samples:,} {identity.images} against {reference}, features {identity.features}", is_result=True)
    if identity.features == COLOUR_LAYOUT:
        say(f"  {result.notes[0]}", is_result=True)
    for name, (title, _) in TITLES.items():
        if name in result.metrics:
            error = result.metrics.get(f"{name}_standard_error")
            say(
                f"    {title:<16} {result.metrics[name]:.4f}" + (f" ± {error:.4f}" if error is not None else ""),
                is_result=True,
            )
    for note in result.notes[identity.features == COLOUR_LAYOUT :]:
        say(f"  {note}", is_result=True)
