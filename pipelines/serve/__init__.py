"""Serve: a Ray Serve application that samples a registered model on demand."""

from patchloom.pipelines.serve.application import app

__all__ = ["app"]
