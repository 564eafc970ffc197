"""Evaluate: two sets of images in, distances and other metrics out."""

from patchloom.pipelines.evaluate.evaluation import evaluate

__all__ = ["evaluate"]
