"""Sampling models for tests, made from a denoiser without a model folder."""

from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.denoiser import Denoiser
from patchloom.models.normalisation import pixel_normalisation


def pixel_model(denoiser: Denoiser) -> SamplingModel:
    """A model of RGB pixels."""
    config = DenoiserConfig(
        network="song", network_options={}, resolution=denoiser.resolution, channels=denoiser.channels,
        classes=denoiser.classes, coordinates=denoiser.coordinates, sigma_data=denoiser.sigma_data,
    )  # fmt: skip
    card = ModelCard(denoiser=config, normalisation=pixel_normalisation())
    return SamplingModel(denoiser, pixel_normalisation(), None, card)
