"""Tune: many short runs of one recipe, ranked by one number."""

from patchloom.pipelines.tune.tuning import tune

__all__ = ["tune"]
