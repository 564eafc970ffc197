"""Train a recipe on a prepared dataset. The run folder then contains a model."""

from patchloom.pipelines.train.training import train

__all__ = ["train"]
