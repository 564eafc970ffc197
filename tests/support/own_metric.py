"""Your own comparison of samples with held-out rows; an excerpt of docs/how-to/own-metric.md."""

# --8<-- [start:metric]
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import patchloom

dataset = patchloom.open_dataset("pixels")
held_out = dataset.rows(dataset.indices("held_out"))["image"]  # (N, C, H, W) uint8
files = sorted(Path("samples").glob("*/*.png"))
samples = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)


def contrasts(images: np.ndarray) -> torch.Tensor:
    """(N, C) standard deviations of each image and channel."""
    return torch.from_numpy(images.std(axis=(2, 3)) / 255)


print(patchloom.kernel_distance(contrasts(samples), contrasts(held_out)))
# --8<-- [end:metric]
