"""Canvases: the borders of out-painted images and of windows on a wide canvas, with a trained model.

`python -m patchloom.benchmarks.canvases MODEL IMAGE FOLDER` samples around the image with every method, and a canvas
four times as wide in every way. It prints how large steps across borders are, and saves two pictures.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from patchloom.models.sampling_options import CANVASES
from patchloom.models.windows import window_starts
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.sample.options import INPAINTING_METHODS
from patchloom.pipelines.sample.sampling import sample
from patchloom.platform.files.folder import Folder

SEEDS, SHOWN, SHOWN_WIDE = "0-15", 6, 3


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


def outpaint(model: str, picture: Path, folder: Path) -> list[np.ndarray]:
    """Sample around an image with every method; print the steps across the border, and return some samples of each."""
    with Image.open(picture) as opened:
        width, height = opened.size
    region = np.zeros((2 * height, 2 * width), bool)
    region[height // 2 : height // 2 + height, width // 2 : width // 2 + width] = True
    rows = []
    for method in reversed(INPAINTING_METHODS):
        began = time.process_time()
        images = _sampled(model, folder / method, size=region.shape, canvas="extrapolate", outpaint=str(picture),
                          outpaint_method=method)  # fmt: skip
        seconds = time.process_time() - began
        print(f"{method}: {seconds:.1f} s of CPU, border {border_ratio(images, region):.2f}", flush=True)
        rows.append(images[:SHOWN])
    return rows


def widen(model: str, side: int, folder: Path) -> list[np.ndarray]:
    """Sample a canvas four times as wide as a window in every way; print the steps at the borders of windows."""
    ends = {end for start in window_starts(4 * side, side) for end in (start, start + side)} - {0, 4 * side}
    border = np.zeros(4 * side - 1, bool)
    border[[end - 1 for end in ends]] = True
    rows = []
    for canvas in CANVASES:
        images = _sampled(model, folder / canvas, size=(side, 4 * side), canvas=canvas)
        _, right = squared_steps(images)
        ratio = np.sqrt(right[:, border].mean() / right[:, ~border].mean())
        print(f"{canvas}: steps where windows end are {ratio:.3f} times the other ones", flush=True)
        rows.append(images[:SHOWN_WIDE])
    return rows


def _sampled(model: str, folder: Path, **options: object) -> np.ndarray:
    sample(model, str(folder), SEEDS, workers=0, **options)  # type: ignore[arg-type]
    place = Folder(str(folder))
    return read_samples(place, list(read_entries(place)))


def main() -> None:
    """Sample, print one line per method, and save `outpainting.png` and `wide.png`."""
    model, picture, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = outpaint(model, picture, folder)
    save_png(side_by_side(rows, scale=2), folder / "outpainting.png")
    save_png(side_by_side(widen(model, rows[0].shape[2] // 2, folder), scale=2), folder / "wide.png")


if __name__ == "__main__":
    main()
