"""Sample: a model and seeds in, a folder of images out."""

from patchloom.pipelines.sample.sampling import sample

__all__ = ["sample"]
