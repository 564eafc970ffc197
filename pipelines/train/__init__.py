"""Train: a recipe and a prepared dataset in, a run folder with a model out."""

from patchloom.pipelines.train.training import train

__all__ = ["train"]
