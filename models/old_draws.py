"""Old draws: the random numbers and the order of rows of runs of format 1, such as those of version 0.1.0.

Each block of a step has generators of its own. Only runs that are continued use this module.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchloom.models.random_draws import CropBatch, RandomDraws, derive_seed


@dataclass(frozen=True)
class OldDraws:
    """The random numbers of a run of format 1.

    Args:
        seed: seed of the run.
    """

    seed: int

    def crops(self, batch: CropBatch) -> RandomDraws:
        """The numbers of some crops, block by block."""
        blocks = [self._block(batch, block) for block in batch.blocks]
        return RandomDraws(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))

    def _block(self, batch: CropBatch, block: int) -> list[Tensor]:
        """The fields of the draws of one block, in the order of drawing."""
        count, channels, side, device = batch.block_size, batch.channels, batch.resolution, batch.device
        generator = torch.Generator(device).manual_seed(derive_seed(self.seed, batch.step, block))
        posterior = (count, channels, side, side) if batch.latent else (count, 0)
        parameters = torch.zeros(count, 0, device=device)
        if batch.augmentation:
            geometric = torch.Generator(device).manual_seed(derive_seed(self.seed, batch.step, block, "augmentation"))
            parameters = _augmentation(count, batch.augmentation, geometric)
        return [
            torch.rand(count, generator=generator, device=device),
            torch.rand(count, generator=generator, device=device),
            torch.randn(count, generator=generator, device=device),
            torch.rand(count, 2, generator=generator, device=device),
            torch.randn(posterior, generator=generator, device=device),
            torch.randn(count, channels, batch.size, batch.size, generator=generator, device=device),
            parameters,
        ]

    def masks(self, step: int, blocks: range, block_size: int, device: torch.device) -> "OldMasks":
        """The dropout masks of the crops of some blocks."""
        return OldMasks([derive_seed(self.seed, step, block, "dropout") for block in blocks], device)

    def size_uniform(self, step: int, rank: int = 0) -> float:
        """The uniform in [0, 1) that decides the patch size of a step, or of one of its emulated ranks."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, "size", rank))
        return float(torch.rand((), generator=generator))

    def row_order(self, rows: int) -> "OldRowOrder":
        """The order of the rows of a dataset."""
        return OldRowOrder(rows, self.seed)


def _augmentation(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """The parameters of EDM, Table 6, with an angle of the anisotropy that is never 0: (count, 8)."""
    device = generator.device
    used = torch.rand(count, 5, generator=generator, device=device) < probability
    flips = (torch.rand(count, 2, generator=generator, device=device) < 0.5).float()
    angles = (torch.rand(count, 2, generator=generator, device=device) * 2 - 1) * math.pi
    normals = torch.randn(count, 4, generator=generator, device=device)
    vertical, scaled, rotated, stretched, shifted = used.float().unbind(1)
    return torch.stack([
        flips[:, 0],
        flips[:, 1] * vertical,
        normals[:, 0] * scaled,
        angles[:, 0] * rotated,
        angles[:, 1] * stretched,
        normals[:, 1] * stretched,
        normals[:, 2] * shifted,
        normals[:, 3] * shifted,
    ], dim=1)  # fmt: skip


class OldMasks:
    """Dropout masks with a generator per block. Compiled graphs cannot use generators, so they hash other masks."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(number) for number in seeds]
        self.seeds = torch.tensor([number & 0xFFFFFFFF for number in seeds], device=device)  # (blocks,)

    def kept(self, x: Tensor, rate: float, layer: int) -> Tensor:
        """A mask of 0 and 1 in the shape of x (B, C, H, W)."""
        if torch.compiler.is_compiling():
            shape = (len(x) // len(self.seeds), *x.shape[1:])
            return _hashed_uniforms(self.seeds + 0x85EBCA77 * layer, shape) >= rate
        kept, blocks = torch.empty_like(x), len(self.generators)
        values = x.numel() // blocks
        words = torch.empty(blocks, -(-values // 4), dtype=torch.int64, device=x.device)
        for block, generator in zip(words, self.generators, strict=True):
            block.random_(-(2**63), None, generator=generator)  # all 64 bits
        words_as_int16 = words.view(torch.int16)[:, :values].reshape(-1).as_strided(kept.shape, kept.stride())
        return torch.ge(words_as_int16, round(rate * 2**16) - 2**15, out=kept)


def _hashed_uniforms(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniforms in [0, 1) from seeds and positions: (blocks,) int64 -> (blocks * shape[0], *shape[1:]).

    Positions are mixed by the finaliser of MurmurHash3 (Appleby 2011), in 32 bits.
    """
    low = 0xFFFFFFFF
    positions = torch.arange(math.prod(shape), device=seeds.device)
    bits = (positions[None] * 0x9E3779B1 + seeds[:, None]) & low
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = ((bits ^ (bits >> shift)) * multiplier) & low
    bits = bits ^ (bits >> 16)
    return (bits.float() / 2**32).clamp(max=1 - 2**-24).view(-1, *shape[1:])


class OldRowOrder:
    """The row of the k-th crop of a run: entry k mod N of the permutation of N rows seeded by (seed, k div N)."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._permutations: dict[int, Tensor] = {}

    def at(self, crops: range) -> npt.NDArray[np.int64]:
        """The rows of these crops, by their numbers in the run: (B,)."""
        return np.array([self._row(k) for k in crops], np.int64)

    def _row(self, k: int) -> int:
        epoch, entry = divmod(k, self.rows)
        if epoch not in self._permutations:
            # keep the previous epoch: a step may cross the end of an epoch
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "rows", epoch))
            self._permutations[epoch] = torch.randperm(self.rows, generator=generator)
        return int(self._permutations[epoch][entry])
