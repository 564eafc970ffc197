"""The quality of an autoencoder: PSNR and SSIM of reconstructions of held-out images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from patchloom.models.autoencoder import Autoencoder, load_autoencoder
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.progress import say

MEASURED_IMAGES = 256
SHOWN_IMAGES = 8
DECODE_BATCH = 32
SSIM_WINDOW = 7  # pixels of a side of scikit-image's uniform window; that of Wang et al. 2004 is an 11 x 11 Gaussian
RECONSTRUCTIONS = "reconstructions.png"


@dataclass(frozen=True)
class ReconstructionQuality:
    """Means over image pairs.

    Args:
        psnr_db: peak signal-to-noise ratio in dB.
        ssim: structural similarity in uniform windows of 7 x 7 pixels.
        measured_images: number of pairs.
    """

    psnr_db: float
    ssim: float
    measured_images: int


def measure_autoencoder(folder: Path, dataset: Dataset, held_out_fraction: float) -> ReconstructionQuality:
    """Measure the autoencoder in `folder/model` on held-out images, and write a picture of some of them."""
    images = _held_out_images(dataset, held_out_fraction)
    autoencoder = load_autoencoder(folder / "model")
    batches = [images[start : start + DECODE_BATCH] for start in range(0, len(images), DECODE_BATCH)]
    decoded = np.concatenate([reconstruct(autoencoder, batch) for batch in batches])
    shown = np.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).astype(int)
    save_png(side_by_side([images[shown], decoded[shown]], scale=2), folder / RECONSTRUCTIONS)
    return reconstruction_quality(images, decoded)


def _held_out_images(dataset: Dataset, fraction: float) -> np.ndarray:
    """Up to `MEASURED_IMAGES` held-out images, or training images if none are held out."""
    split = dataset.split("held_out", fraction)
    if not len(split):
        say("  no rows are held out: measuring reconstructions of training rows")
        split = dataset.split("train", fraction)
    images: np.ndarray = dataset.rows(split.spread(MEASURED_IMAGES), ["image"])["image"]
    return images


def reconstruct(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Encode (N, 3, H, W) uint8 images and decode the mean of the posterior; returns the same shape and type."""
    mean, _ = autoencoder.encode(torch.from_numpy(images))
    decoded: np.ndarray = autoencoder.decode(mean).numpy()
    return decoded


def reconstruction_quality(images: np.ndarray, decoded: np.ndarray) -> ReconstructionQuality:
    """Compare (N, 3, H, W) uint8 images with their reconstructions, with scikit-image."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pairs = list(zip(images, decoded, strict=True))
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    ssim = [structural_similarity(a, b, win_size=SSIM_WINDOW, channel_axis=0, data_range=255) for a, b in pairs]
    return ReconstructionQuality(float(np.mean(psnr)), float(np.mean(ssim)), len(pairs))
