"""Held-out images are read once per run if they are small, and at each measurement if they are not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_recipe

from patchloom.models.step import StoredRows
from patchloom.pipelines.train.hooks.held_out import HeldOutHook


class CountingReader:
    """Rows of latents, and how often they were read."""

    def __init__(self) -> None:
        self.held_out, self.reads = SimpleNamespace(spread=lambda count: np.arange(count)), 0

    def at(self, indices: np.ndarray) -> StoredRows:
        self.reads += 1
        latents = torch.arange(len(indices) * 16.0).reshape(len(indices), 1, 4, 4)
        return StoredRows(latents, torch.zeros(len(indices)), torch.ones_like(latents))


@pytest.mark.parametrize(("kept_bytes", "reads", "images"), [(64 * 16 * 4, 1, 64), (64 * 16 * 4 - 1, 3, 64),
                                                             (64 * 16 * 4, 3, 65)])  # fmt: skip
def test_images_are_read_once_if_they_are_small(
    kept_bytes: int, reads: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchloom.pipelines.train.hooks.held_out.KEPT_ROWS_BYTES", kept_bytes)
    reader = CountingReader()
    run: Any = SimpleNamespace(reader=reader, recipe=tiny_recipe(train__held_out_images=images))
    hook = HeldOutHook(run)
    found = [hook._rows() for _ in range(3)]
    assert reader.reads == reads and len(found[0].image) == images
    assert all(torch.equal(rows.image, found[0].image) and rows.std is None for rows in found)
