"""Edges: how well samples follow the edge images that they are given, on photographs that ship with scikit-image.

`python -m patchloom.benchmarks.edges FOLDER` trains `edges_small` with three seeds, samples from held-out edges and
prints the agreement of the edges of the samples with their controls, and with the controls of other samples.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter

from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.prepare.conditions import edges
from patchloom.pipelines.prepare.photographs import copy_photographs
from patchloom.pipelines.prepare.preparing import prepare
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.sample.sampling import sample
from patchloom.pipelines.train.training import train
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe.run_recipe import load_recipe

CONTROLS, SHOWN = 64, 12
PICTURED = (0, 2.0)  # the seed of training and the guidance of the picture, with two samples per control
SHIFTS = (9, 23, 38)  # of the controls, for pairs that do not belong together


def edge_agreement(found: np.ndarray, wanted: np.ndarray, tolerance: int = 1) -> float:
    """The F1 score of edge pixels: each counts as right if the other image has an edge within some pixels.

    Args:
        found: (N, H, W) bool, the edges of samples.
        wanted: (N, H, W) bool, their controls.
        tolerance: pixels along each axis.

    Returns:
        The harmonic mean of the share of found edges that are wanted, and of wanted edges that are found.
    """
    size = (1, 2 * tolerance + 1, 2 * tolerance + 1)
    right = (found & maximum_filter(wanted, size)).sum() / max(1, found.sum())
    met = (wanted & maximum_filter(found, size)).sum() / max(1, wanted.sum())
    return float(2 * right * met / (right + met)) if right + met else 0.0


def write_controls(dataset: Dataset, fraction: float, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the edges of held-out images as PNG files; returns them, (N, 1, H, W), and the images, (N, 3, H, W)."""
    rows = dataset.rows(dataset.split("held_out", fraction).spread(CONTROLS), ["condition", "image"])
    folder.mkdir(exist_ok=True)
    for number, control in enumerate(rows["condition"]):
        Image.fromarray(control[0]).save(folder / f"{number:03d}.png")
    return rows["condition"], rows["image"]


def sampled(folder: Path) -> np.ndarray:
    """The images of a folder of samples, in the order of the seeds: (N, 3, H, W) uint8."""
    place = Folder(str(folder))
    return read_samples(place, list(read_entries(place)))


def scores(images: np.ndarray, controls: np.ndarray) -> tuple[float, float]:
    """The agreement of samples with their controls, and with those of other samples."""
    found = np.stack([edges(image.transpose(1, 2, 0))[:, :, 0] > 0 for image in images])
    wanted = controls[:, 0] > 0
    chance = [edge_agreement(found, np.roll(wanted, shift, axis=0)) for shift in SHIFTS]
    return edge_agreement(found, wanted), float(np.mean(chance))


def main() -> None:
    """Measure, print one line per seed and guidance, and save a picture."""
    folder = Path(sys.argv[1])
    photographs = copy_photographs(folder / "photographs")
    data = folder / "data"
    dataset = prepare(str(photographs), str(data), resolution=32, crop="windows", condition="edges", workers=0)
    fraction = load_recipe("edges_small").data.held_out_fraction
    controls, originals = write_controls(dataset, fraction, folder / "controls")
    for seed in range(3):
        recipe, run = load_recipe("edges_small", [f"seed={seed}"]), folder / f"run{seed}"
        train(recipe, str(data), str(run), workers=0, resume=True)
        for guidance in (1.0, 2.0):
            place = folder / f"samples-{seed}-{guidance:g}"
            seeds = f"0-{2 * CONTROLS - 1}" if (seed, guidance) == PICTURED else f"0-{CONTROLS - 1}"
            options: dict[str, Any] = {"conditions": str(folder / "controls"), "guidance": guidance, "batch": 16}
            sample(str(run), str(place), seeds, workers=0, **options)
            images = sampled(place)[:CONTROLS]
            followed, chance = scores(images, controls)
            print(f"seed {seed}, guidance {guidance:g}: F1 {followed:.3f}, other controls {chance:.3f}", flush=True)
    images, chosen = sampled(folder / "samples-0-2"), np.linspace(0, CONTROLS - 1, SHOWN).astype(int)
    rows = [controls.repeat(3, axis=1)[chosen], images[chosen], images[CONTROLS + chosen], originals[chosen]]
    save_png(side_by_side(rows, scale=2), folder / "edges.png")


if __name__ == "__main__":
    main()
