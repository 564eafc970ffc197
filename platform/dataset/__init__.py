"""Prepared datasets, and the sources that they are made from."""

from patchloom.platform.dataset.prepared import Dataset, is_dataset, open_dataset

__all__ = ["Dataset", "is_dataset", "open_dataset"]
