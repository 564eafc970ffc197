"""Extrapolation (section 4.5): images on larger canvases, around a given image or without one, and their borders."""

import shlex
from functools import partial
from pathlib import Path

import numpy as np

from patchloom.models.sampling_options import CANVASES
from patchloom.models.windows import window_starts
from patchloom.pipelines.pages.html import Number, Picture, Table
from patchloom.pipelines.pages.pictures import png_bytes, png_pixels, save_png, side_by_side
from patchloom.pipelines.reproduce.outcome import Finding, Outcome
from patchloom.pipelines.reproduce.paper import DATA
from patchloom.pipelines.reproduce.samplers import data_of, model_stages
from patchloom.pipelines.reproduce.stages import SMALL_SIDE, ReproductionFolder, Stage, samples_flops
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.sample.options import INPAINTING_METHODS
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.progress import clock
from patchloom.platform.recipe.run_recipe import load_recipe

CANVAS_DATA = "bedroom"
GIVEN_IMAGES, SAMPLES_AROUND, SHOWN_AROUND = 3, 8, 4
CANVAS_STEPS, REPEATED = 18, 4  # evaluations per evaluation of the methods that are not of the paper
CANVAS_FACTORS = (1.5, 2.0)  # of the canvas, as multiples of the trained side (Figures 7 and 11)
WIDE_FACTOR, WIDE_SHOWN = 4, 3
SMALL_CHANGES = ("train.images=60000",)
METHODS = tuple(reversed(INPAINTING_METHODS))  # that of the paper first


def _recipe(place: ReproductionFolder) -> tuple[str, tuple[str, ...]]:
    return ("celeba64_small", SMALL_CHANGES) if place.asked.small else ("lsun_bedroom256", ())


def _side(place: ReproductionFolder) -> int:
    return SMALL_SIDE if place.asked.small else DATA[CANVAS_DATA].resolution


def extrapolation_stages(place: ReproductionFolder) -> list[Stage]:
    """Train a model, sample around held-out images in every way, and sample wide canvases in every way."""
    recipe, changes = _recipe(place)
    stages, model = model_stages(place, CANVAS_DATA, recipe, changes, latents=not place.asked.small)
    side = _side(place)
    for factor in CANVAS_FACTORS:
        size = round(side * factor)
        for method in METHODS:
            for number in range(GIVEN_IMAGES):
                out = place.path(*_around(size, method, number))
                words = _sampling(model, out, (size, size), "extrapolate")
                kept = ("--outpaint", place.path(_reference(number)), "--outpaint-method", method)
                title = f"Sample {size} x {size} around image {number + 1} with {method}"
                flops = _flops(place, factor**2) * (1 if method == "replace" else REPEATED)
                stages.append(Stage(title, words + kept, flops, before=partial(_write_reference, place, number)))
    for canvas in CANVASES:
        out = place.path(*_wide(canvas))
        words = _sampling(model, out, (side, WIDE_FACTOR * side), canvas)
        stages.append(Stage(f"Sample {side} x {WIDE_FACTOR * side} with {canvas}", words, _flops(place, WIDE_FACTOR)))
    return stages


def _sampling(model: str, out: str, size: tuple[int, int], canvas: str) -> tuple[str, ...]:
    """The command that samples a canvas of this height and width."""
    seeds, side = f"0-{SAMPLES_AROUND - 1}", f"{size[0]}x{size[1]}"
    return ("sample", model, out, "--seeds", seeds, "--steps", str(CANVAS_STEPS), "--size", side, "--canvas", canvas)


def _flops(place: ReproductionFolder, area: float) -> float:
    """FLOPs of one command without repeats, on a canvas of so many times the trained area."""
    name, changes = _recipe(place)
    return samples_flops(load_recipe(name, list(changes)), SAMPLES_AROUND, CANVAS_STEPS) * area


def _around(size: int, method: str, number: int) -> tuple[str, str]:
    return "around", f"{size}-{method}-{number}"


def _wide(canvas: str) -> tuple[str, str]:
    return "wide", canvas


def _reference(number: int) -> str:
    return f"references/{number}.png"


def _write_reference(place: ReproductionFolder, number: int) -> None:
    """Write a held-out image as a PNG file."""
    dataset = open_dataset(place.reference(data_of(place, CANVAS_DATA), not place.asked.small))
    fraction = load_recipe(_recipe(place)[0]).data.held_out_fraction
    split = dataset.split("held_out", fraction) if fraction else dataset.split("train", 0)
    row = split.spread(GIVEN_IMAGES)[number : number + 1]
    place.folder.write(_reference(number), png_bytes(dataset.rows(row, ["image"])["image"][0]))


def squared_steps(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean squared difference of each pixel of (N, C, H, W) to the next one: down (H - 1, W), right (H, W - 1)."""
    down, right = (np.mean(np.diff(images.astype(float), axis=axis) ** 2, axis=(0, 1)) for axis in (2, 3))
    return down, right


def border_ratio(images: np.ndarray, region: np.ndarray) -> float:
    """The rms step across the border of a region, (H, W) bool, over the rms step outside of it."""
    border, outside = [], []
    for axis, steps in enumerate(squared_steps(images)):
        crossing = np.diff(region, axis=axis)
        border.append(steps[crossing])
        near = region | np.roll(region, -1, axis)  # one of the two pixels is in the region
        outside.append(steps[~near[: steps.shape[0], : steps.shape[1]]])
    return float(np.sqrt(np.concatenate(border).mean() / np.concatenate(outside).mean()))


def window_ratio(images: np.ndarray) -> float:
    """The rms step between the columns where windows of a wide canvas end, over the other steps along rows."""
    side = images.shape[2]
    ends = {end for start in window_starts(WIDE_FACTOR * side, side) for end in (start, start + side)} - {
        0,
        WIDE_FACTOR * side,
    }
    border = np.zeros(WIDE_FACTOR * side - 1, bool)
    border[[end - 1 for end in ends]] = True
    _, right = squared_steps(images)
    return float(np.sqrt(right[:, border].mean() / right[:, ~border].mean()))


def extrapolation_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    """The references next to what was sampled around them, wide canvases, and how large the steps at borders are."""
    side = _side(place)
    rows, pictures = [], []
    for factor in CANVAS_FACTORS:
        size = round(side * factor)
        for method in METHODS:
            samples = [_read(place, _around(size, method, number)) for number in range(GIVEN_IMAGES)]
            ratios = [border_ratio(one, _center(size, side)) for one in samples]
            shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
            rows.append([f"{size} x {size}", method, f"{np.mean(ratios):.2f}", shown, _seconds(place, size, method)])
        pictures.append(_around_picture(place, here, size))
    wide = [[canvas, f"{window_ratio(_read(place, _wide(canvas))):.3f}"] for canvas in CANVASES]
    best = min(rows, key=lambda row: abs(float(row[2]) - 1))
    return Outcome(
        lead=f"Canvases larger than the {side} x {side} pixels of the training, with the coordinates continued beyond "
        "-1 and 1: around held-out images in every way that there is, and four times as wide.",
        numbers=[
            Number("images around", f"{GIVEN_IMAGES}"),
            Number("samples of each", f"{SAMPLES_AROUND}"),
            Number("time of all commands", clock(sum(stage.seconds for stage in place.asked.stages))),
        ],
        findings=[
            Finding(
                "Steps across the border of the given image, over the steps outside of it (rms; 1 is no border)",
                Table(["canvas", "method", "mean", "of each image", "time"], rows),
                [f"Closest to 1: {best[1]} on {best[0]} pixels, with {best[2]}."],
            ),
            Finding(
                f"Steps where windows end on {side} x {WIDE_FACTOR * side} pixels, over the other steps (rms)",
                Table(["canvas", "ratio"], wide),
                ["Only the canvas of windows has ends there: the other two show what these columns have by chance."],
            ),
        ],
        texts=[],
        differences=[
            "The paper shows LSUN-Bedroom at 256 x 256 pixels on 384 x 384 (Figure 7) and 512 x 512 (Figure 11), from "
            "latents, and gives no number.",
            "The paper keeps the given image fixed in each step, which is the method replace. The methods resample and "
            "reconstruct, and the canvas of windows, are not from it.",
        ],
        pictures=[*pictures, _wide_picture(place, here)],
    )


def _read(place: ReproductionFolder, names: tuple[str, ...]) -> np.ndarray:
    folder = place.folder.folder("/".join(names))
    return read_samples(folder, list(read_entries(folder)))


def _center(size: int, side: int) -> np.ndarray:
    """(size, size) bool, the pixels of the given image."""
    region, first = np.zeros((size, size), bool), (size - side) // 2
    region[first : first + side, first : first + side] = True
    return region


def _seconds(place: ReproductionFolder, size: int, method: str) -> str:
    """The time of all commands with a method, with the starts of their processes."""
    paths = [place.path(*_around(size, method, number)) for number in range(GIVEN_IMAGES)]
    commands = [(shlex.split(one.command), one.seconds) for one in place.asked.stages]
    return clock(sum(seconds for words, seconds in commands if any(path in words for path in paths)))


def _around_picture(place: ReproductionFolder, here: Path, size: int) -> Picture:
    """Each given image, in the centre of white, next to samples around it; a row for each method and image."""
    rows = []
    for number in range(GIVEN_IMAGES):
        given = png_pixels(place.folder.read(_reference(number)))
        region = _center(size, given.shape[1])
        framed = np.full((given.shape[0], size, size), 255, np.uint8)
        framed[:, region] = given.reshape(len(given), -1)
        rows += [
            np.concatenate([framed[None], _read(place, _around(size, method, number))[:SHOWN_AROUND]])
            for method in METHODS
        ]
    path = here / f"around-{size}.png"
    save_png(side_by_side(rows, scale=max(1, 128 // size)), path)
    caption = (
        f"{size} x {size}: the given image on the left, then samples around it. Rows of each: {', '.join(METHODS)}."
    )
    return Picture(path, caption, pixelated=True)


def _wide_picture(place: ReproductionFolder, here: Path) -> Picture:
    rows = [_read(place, _wide(canvas))[:WIDE_SHOWN] for canvas in CANVASES]
    path = here / "wide.png"
    save_png(side_by_side(rows, scale=max(1, 64 // rows[0].shape[2])), path)
    return Picture(path, f"The same seeds on a wide canvas, one row each: {', '.join(CANVASES)}.", pixelated=True)
