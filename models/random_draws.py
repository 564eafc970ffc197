"""Random draws: the random numbers of a run, each a pure function of (seed, step, block), and the order of its rows.

The noise is drawn last, because its size is that of the patch. So two runs that differ only in p or schedule have the
same rows, labels, noise levels and crop positions.
"""

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from patchloom.models.augment import draw_parameters

TWISTER_AT, TWISTER_WORDS = 24, 624  # bytes before the words of the Mersenne Twister in a CPU generator's state


def sampling_generator(seed: int) -> torch.Generator:
    """A CPU generator that depends on all 64 bits of a seed. torch's own uses the low 32 bits only.

    Seeds below 2^32 give `torch.Generator().manual_seed(seed)`. Larger ones seed the same Mersenne Twister with both
    halves by its `init_by_array`, as `numpy.random.RandomState([low, high])` does.
    """
    generator = torch.Generator().manual_seed(seed)
    if seed >= 1 << 32:
        twister = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).get_state(legacy=False)
        state = generator.get_state()
        words = state[TWISTER_AT : TWISTER_AT + 8 * TWISTER_WORDS].numpy().view(np.uint64)
        words[:] = twister["state"]["key"]
        generator.set_state(state)
    return generator


def derive_seed(*parts: int | str) -> int:
    """Hash names and numbers to a 63-bit seed, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class RandomDraws:
    """The random numbers of B crops, in the order of drawing.

    Args:
        label_kept: (B,) uniform; the label is kept if it is not below the label dropout.
        mirrored: (B,) uniform; the image is mirrored if it is not below 0.5.
        sigma: (B,) standard normal, for the noise level.
        corner: (B, 2) uniform, for the position of the crop.
        posterior: (B, C, R, R) standard normal, for the latents; empty for pixels.
        noise: (B, C, s, s) standard normal.
        augmentation: (B, 8) parameters, from a separate generator; (B, 0) without augmentation.
    """

    label_kept: Tensor
    mirrored: Tensor
    sigma: Tensor
    corner: Tensor
    posterior: Tensor
    noise: Tensor
    augmentation: Tensor


def draws_of_block(
    seed: int, step: int, block: int, count: int, channels: int, resolution: int, size: int,
    latent: bool, device: torch.device, augmentation: float = 0.0,
) -> RandomDraws:  # fmt: skip
    """Draw the random numbers of one block. The block has its own generator, so that any worker can draw them.

    Args:
        seed: seed of the run.
        step: number of the step.
        block: number of the block in the step.
        count: crops in the block.
        channels: channels of the stored images.
        resolution: side of the full image.
        size: side of the patch.
        latent: whether a posterior is drawn.
        device: device of the numbers.
        augmentation: probability of EDM's augmentations.
    """
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
    """Join the draws of several blocks to one batch."""
    return RandomDraws(*(torch.cat([getattr(block, field.name) for block in blocks]) for field in fields(RandomDraws)))


def size_uniform(seed: int, step: int, rank: int = 0) -> float:
    """The uniform in [0, 1) that decides the patch size of a step, or of one of its emulated ranks."""
    generator = torch.Generator().manual_seed(derive_seed(seed, step, "size", rank))
    return float(torch.rand((), generator=generator))


class RowOrder:
    """The row of the k-th crop of a run: entry k mod N of the permutation of N rows seeded by (seed, k div N)."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._permutations: dict[int, Tensor] = {}

    def __getitem__(self, k: int) -> int:
        epoch, entry = divmod(k, self.rows)
        if epoch not in self._permutations:
            # keep the previous epoch: a step may cross the end of an epoch
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "rows", epoch))
            self._permutations[epoch] = torch.randperm(self.rows, generator=generator)
        return int(self._permutations[epoch][entry])
