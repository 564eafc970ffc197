"""Luck: every random number of a run as a pure function of (seed, step, block), and the order of its rows.

Numbers are drawn in an order that does not depend on patch size until the noise itself, so that two
runs that differ only in p or schedule see the same rows, labels, noise levels and crop positions.
"""

import hashlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from patchloom.models.augment import draw_parameters


def derive_seed(*parts: int | str) -> int:
    """One 63-bit seed from several names and numbers, alike on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class RandomDraws:
    """The draws of a block of B crops, in the order in which they are drawn."""

    label_kept: Tensor  # (B,) uniform
    mirrored: Tensor  # (B,) uniform
    sigma: Tensor  # (B,) standard normal
    corner: Tensor  # (B, 2) uniform
    posterior: Tensor  # (B, C, R, R) standard normal; empty for pixels
    noise: Tensor  # (B, C, s, s) standard normal
    augmentation: Tensor  # (B, 8) parameters, from a generator of their own; (B, 0) without


def draws_of_block(
    seed: int, step: int, block: int, count: int, channels: int, resolution: int, size: int,
    latent: bool, device: torch.device, augmentation: float = 0.0,
) -> RandomDraws:  # fmt: skip
    """The luck of one block: its own generator, so that any worker can draw it."""
    generator = torch.Generator(device).manual_seed(derive_seed(seed, step, block))
    posterior = (count, channels, resolution, resolution) if latent else (count, 0)
    parameters = torch.zeros(count, 0, device=device)
    if augmentation:
        geometric = torch.Generator(device).manual_seed(derive_seed(seed, step, block, "augmentation"))
        parameters = draw_parameters(count, augmentation, geometric)
    return RandomDraws(
        torch.rand(count, generator=generator, device=device),
        torch.rand(count, generator=generator, device=device),
        torch.randn(count, generator=generator, device=device),
        torch.rand(count, 2, generator=generator, device=device),
        torch.randn(posterior, generator=generator, device=device),
        torch.randn(count, channels, size, size, generator=generator, device=device),
        parameters,
    )


def concatenate_draws(blocks: list[RandomDraws]) -> RandomDraws:
    """Several blocks as one batch."""
    return RandomDraws(*(torch.cat([getattr(block, field.name) for block in blocks]) for field in fields(RandomDraws)))


def size_uniform(seed: int, step: int, rank: int = 0) -> float:
    """The uniform in [0, 1) that settles the patch size of a step, or of one of its emulated ranks."""
    generator = torch.Generator().manual_seed(derive_seed(seed, step, "size", rank))
    return float(torch.rand((), generator=generator))


class RowOrder:
    """Which of N rows is the k-th of a run: entry k mod N of the permutation seeded by (seed, k div N)."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._permutations: dict[int, Tensor] = {}

    def __getitem__(self, k: int) -> int:
        epoch, entry = divmod(k, self.rows)
        if epoch not in self._permutations:
            # one step may cross an epoch's end, so the epoch before stays
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "rows", epoch))
            self._permutations[epoch] = torch.randperm(self.rows, generator=generator)
        return int(self._permutations[epoch][entry])
