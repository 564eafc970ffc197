"""Runs of format 1 keep the draws and the order of rows of version 0.1.0."""

import math

import pytest
import torch
from scipy import stats

from patchloom.models.layers import Dropout
from patchloom.models.old_draws import OldDraws
from patchloom.models.random_draws import CropBatch, Draws, derive_seed
from patchloom.models.step_plan import draw_source

CPU = torch.device("cpu")


def test_the_format_of_a_run_chooses_its_draws() -> None:
    assert draw_source(3, 1) == OldDraws(3)
    assert draw_source(3, 2) == draw_source(3) == Draws(3)


def test_blocks_are_drawn_in_the_stated_order_from_their_own_generators() -> None:
    drawn = OldDraws(3).crops(CropBatch(8, range(2, 4), 5, 4, 8, 4, True, CPU, 0.5))
    for number, block in enumerate((2, 3)):
        rows = slice(5 * number, 5 * number + 5)
        generator = torch.Generator().manual_seed(derive_seed(3, 8, block))
        assert torch.equal(drawn.label_kept[rows], torch.rand(5, generator=generator))
        assert torch.equal(drawn.mirrored[rows], torch.rand(5, generator=generator))
        assert torch.equal(drawn.sigma[rows], torch.randn(5, generator=generator))
        assert torch.equal(drawn.corner[rows], torch.rand(5, 2, generator=generator))
        assert torch.equal(drawn.posterior[rows], torch.randn(5, 4, 8, 8, generator=generator))
        assert torch.equal(drawn.noise[rows], torch.randn(5, 4, 4, 4, generator=generator))
        geometric = torch.Generator().manual_seed(derive_seed(3, 8, block, "augmentation"))
        stretched = torch.rand(5, 5, generator=geometric)[:, 3] < 0.5
        torch.rand(5, 2, generator=geometric)
        angle = (torch.rand(5, 2, generator=geometric)[:, 1] * 2 - 1) * math.pi
        assert torch.equal(drawn.augmentation[rows, 4], angle * stretched)


def test_rows_and_sizes_are_those_of_torchs_generators() -> None:
    generator = torch.Generator().manual_seed(derive_seed(1, "rows", 2))
    wanted = torch.randperm(50, generator=generator).numpy()
    assert (OldDraws(1).row_order(50).at(range(95, 155))[5:55] == wanted).all()
    uniform = torch.rand((), generator=torch.Generator().manual_seed(derive_seed(1, 7, "size", 0)))
    assert OldDraws(1).size_uniform(7) == float(uniform)


@pytest.mark.parametrize("shape", [(6, 32, 16, 16), (6, 3, 5, 5)])  # the second fills no whole number of words
def test_masks_belong_to_blocks(shape: tuple[int, ...]) -> None:
    layer, x = Dropout(0.13).train(), torch.ones(shape)
    layer.masks = OldDraws(1).masks(4, range(5, 8), 2, CPU)
    out = layer(x)
    generator = torch.Generator().manual_seed(derive_seed(1, 4, 6, "dropout"))
    words = torch.empty(-(-x[:2].numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16)[: x[:2].numel()].view(x[:2].shape) >= round(0.13 * 2**16) - 2**15
    assert torch.equal(out[2:4] > 0, kept)


def test_neighbouring_masks_are_independent() -> None:
    layer = Dropout(0.5).train()
    layer.masks = OldDraws(0).masks(0, range(1), 1, CPU)
    kept = (layer(torch.ones(1, 1, 1, 80_000)) > 0).flatten().reshape(-1, 4)  # the four lanes of a word
    counts = (kept.long() * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
