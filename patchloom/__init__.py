"""Patchloom: image diffusion models trained on patches, on Ray, kept in MLflow."""

__version__ = "0.1.0"
