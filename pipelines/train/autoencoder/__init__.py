"""Train a small autoencoder of your own, and measure it."""

from patchloom.pipelines.train.autoencoder.quality import SSIM_WINDOW, reconstruct, reconstruction_quality
from patchloom.pipelines.train.autoencoder.training import AutoencoderResult, train_autoencoder
from patchloom.platform.records.autoencoder_run import AutoencoderSettings

__all__ = [
    "SSIM_WINDOW",
    "AutoencoderResult",
    "AutoencoderSettings",
    "reconstruct",
    "reconstruction_quality",
    "train_autoencoder",
]
