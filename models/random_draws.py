"""Random draws: the random numbers of a run, each a pure function of the seed, its position and what it is for.

The numbers of a training step depend on the seed, the step and the number of the crop in the step. They do not depend
on how crops are shared among workers. All but the noise do not depend on the patch size either, so two runs that differ
only in p or schedule have the same dropped labels, mirrored images, noise levels and crop positions in a step. They
rarely have the same rows, because rows are counted in crops, and smaller patches come in larger batches.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchloom.models.augment import AUGMENTATION_NORMALS, AUGMENTATION_UNIFORMS, augmentation_parameters
from patchloom.models.layers import DropoutMasks
from patchloom.models.random_words import (
    GAMMA,
    Key,
    draw_words,
    key_of,
    normals,
    numpy_words,
    signed,
    uniforms,
    words_from,
)

TWISTER_AT, TWISTER_WORDS = 24, 624  # bytes before the words of the Mersenne Twister in a CPU generator's state
CURRENT_DRAWS = 2  # version of the draws of new runs
KIND_BITS = 48  # the counters of a step: the kind of number, then 48 bits for the position
SCALARS, POSTERIOR, NOISE, DROPOUT = 0, 1, 2, 16  # kinds; each dropout layer has the next one
UNIFORM_WORDS = (4 + AUGMENTATION_UNIFORMS) // 2  # per crop, of the kind SCALARS; then words of normals
SCALAR_NORMALS = 2 + AUGMENTATION_NORMALS
SCALAR_WORDS = UNIFORM_WORDS + SCALAR_NORMALS // 2
MIXING_ROUNDS = 8  # of the order of rows


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
class CropBatch:
    """Some crops of a step that are drawn together.

    Args:
        step: number of the step.
        blocks: numbers of their blocks in the step.
        block_size: crops per block.
        channels: channels of the stored images.
        resolution: side of the full image.
        size: side of the patch.
        latent: whether a posterior is drawn.
        device: device of the numbers.
        augmentation: probability of EDM's augmentations.
    """

    step: int
    blocks: range
    block_size: int
    channels: int
    resolution: int
    size: int
    latent: bool
    device: torch.device
    augmentation: float = 0.0

    @property
    def first(self) -> int:
        """Number of the first crop in the step."""
        return self.blocks.start * self.block_size

    @property
    def count(self) -> int:
        """Number of crops."""
        return len(self.blocks) * self.block_size


@dataclass(frozen=True)
class RandomDraws:
    """The random numbers of B crops.

    Args:
        label_kept: (B,) uniform; the label is kept if it is not below the label dropout, and the condition if it is not
            below the condition dropout.
        mirrored: (B,) uniform; the image is mirrored if it is not below 0.5.
        sigma: (B,) standard normal, for the noise level.
        corner: (B, 2) uniform, for the position of the crop.
        posterior: (B, C, R, R) standard normal, for the latents; empty for pixels.
        noise: (B, C, s, s) standard normal.
        augmentation: (B, 8) parameters; (B, 0) without augmentation.
    """

    label_kept: Tensor
    mirrored: Tensor
    sigma: Tensor
    corner: Tensor
    posterior: Tensor
    noise: Tensor
    augmentation: Tensor


class Rows(Protocol):
    """The order in which a run reads the rows of its dataset."""

    def at(self, crops: range) -> npt.NDArray[np.int64]:
        """The rows of these crops, by their numbers in the run."""


class DrawSource(Protocol):
    """The random numbers of a run. Each version of the draws is one such class."""

    def crops(self, batch: CropBatch) -> RandomDraws:
        """The numbers of some crops."""

    def masks(self, step: int, blocks: range, block_size: int, device: torch.device) -> DropoutMasks:
        """The dropout masks of the crops of some blocks."""

    def size_uniform(self, step: int, rank: int = 0) -> float:
        """The uniform in [0, 1) that decides the patch size of a step, or of one of its emulated ranks."""

    def row_order(self, rows: int) -> Rows:
        """The order of the rows of a dataset."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of a run, by `random_words`.

    Args:
        seed: seed of the run.
    """

    seed: int

    def crops(self, batch: CropBatch) -> RandomDraws:
        """The numbers of some crops. The number of operations does not depend on how many crops there are."""
        image = (batch.channels, batch.resolution, batch.resolution) if batch.latent else (0,)
        patch = (batch.channels, batch.size, batch.size)
        key, lengths = key_of(self.seed, batch.step), (math.prod(image), math.prod(patch))
        words = _words_of(key, SCALARS, batch, SCALAR_WORDS)
        fields = [_words_of(key, kind, batch, -(-n // 2)) for kind, n in ((POSTERIOR, lengths[0]), (NOISE, lengths[1]))]
        uniform = uniforms(words[:, :UNIFORM_WORDS])
        normal = normals(torch.cat([words[:, UNIFORM_WORDS:], *fields], dim=1))
        scalars, posterior, noise = normal.split([SCALAR_NORMALS, *(2 * field.shape[1] for field in fields)], dim=1)
        parameters = uniform[:, :0]
        if batch.augmentation:
            parameters = augmentation_parameters(uniform[:, 4:], scalars[:, 2:], batch.augmentation)
        return RandomDraws(
            label_kept=uniform[:, 0],
            mirrored=uniform[:, 1],
            sigma=scalars[:, 0],
            corner=uniform[:, 2:4],
            posterior=posterior[:, : lengths[0]].unflatten(1, image),
            noise=noise[:, : lengths[1]].unflatten(1, patch),
            augmentation=parameters,
        )

    def masks(self, step: int, blocks: range, block_size: int, device: torch.device) -> "CounterMasks":
        """The dropout masks of the crops of some blocks."""
        return CounterMasks(key_of(self.seed, step), blocks.start * block_size, device)

    def size_uniform(self, step: int, rank: int = 0) -> float:
        """The uniform in [0, 1) that decides the patch size of a step, or of one of its emulated ranks."""
        return float(key_of(self.seed, step, "size").at(rank) >> 11) * 2.0**-53

    def row_order(self, rows: int) -> "RowOrder":
        """The order of the rows of a dataset."""
        return RowOrder(rows, self.seed)


def _words_of(key: Key, kind: int, batch: CropBatch, words: int) -> Tensor:
    """Words of one kind: (B, words) int64."""
    start = (kind << KIND_BITS) + batch.first * words
    return draw_words(key, start, batch.count * words, batch.device).view(batch.count, words)


class CounterMasks:
    """Dropout masks of the crops of a step, with 16 random bits per value. Eager and compiled networks have the same.

    Args:
        key: key of the step.
        first: number of the first crop in the step.
        device: device of the masks.
    """

    def __init__(self, key: Key, first: int, device: torch.device) -> None:
        self.key, self.first = key, first
        # compiled graphs take tensors, because numbers would make a graph per step
        self.inputs = torch.tensor([signed(key.low), signed(key.high), first]).to(device, non_blocking=True)

    def kept(self, x: Tensor, rate: float, layer: int) -> Tensor:
        """A mask of 0 and 1 in the shape of x (B, C, H, W); a share `rate` of it is 0."""
        values = x[0].numel()
        words = self._words(len(x), -(-values // 4), layer, x.device)
        lanes = words.view(torch.int16)[:, :values].reshape(x.shape)
        threshold = round(rate * 2**16) - 2**15
        if torch.compiler.is_compiling():
            return lanes >= threshold
        return torch.ge(lanes, threshold, out=torch.empty_like(x))

    def _words(self, crops: int, words: int, layer: int, device: torch.device) -> Tensor:
        start = (DROPOUT + layer) << KIND_BITS
        if torch.compiler.is_compiling():
            low, high, first = self.inputs.unbind()
            low = low + signed(GAMMA * (start + 1)) + first * signed(GAMMA * words)
            found = words_from(torch.arange(crops * words, device=device), low, high)
        else:
            found = draw_words(self.key, start + self.first * words, crops * words, device)
        return found.view(crops, words)


class RowOrder:
    """The row of the k-th crop of a run: entry k mod N of a permutation of N rows, another one in each epoch.

    The permutation is a Feistel network on the numbers below a x b, where a x b is just above N, with cycle walking
    (Black and Rogaway 2002). It needs no memory and no set-up.

    Args:
        rows: number of rows N.
        seed: seed of the run.
        stream: name of the stream of random words, for the permutations of a run that must differ.
    """

    def __init__(self, rows: int, seed: int, stream: str = "rows") -> None:
        self.rows, self.seed = rows, seed
        self._key = key_of(seed, stream)
        # with an even number of columns, a round can be an odd permutation
        self._columns = 2 * math.ceil(math.sqrt(rows) / 2)
        self._lines = -(-rows // self._columns)

    def at(self, crops: range) -> npt.NDArray[np.int64]:
        """The rows of these crops, by their numbers in the run: (B,)."""
        epoch, row = np.divmod(np.arange(crops.start, crops.stop, crops.step, dtype=np.uint64), np.uint64(self.rows))
        row = self._permuted(row, epoch)
        while (outside := row >= self.rows).any():  # walk along the cycle, back to the rows
            row[outside] = self._permuted(row[outside], epoch[outside])
        return row.astype(np.int64)

    def _permuted(self, row: npt.NDArray[np.uint64], epoch: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """A permutation of the numbers below lines x columns."""
        columns, lines = np.uint64(self._columns), np.uint64(self._lines)
        line, column = np.divmod(row, columns)
        for number in range(MIXING_ROUNDS):
            counters = epoch * np.uint64(MIXING_ROUNDS) + np.uint64(number)
            keys = numpy_words(self._key, counters)
            if number % 2:
                line = (line + numpy_words(Key(0, self._key.high), column ^ keys) % lines) % lines
            else:
                column = (column + numpy_words(Key(0, self._key.high), line ^ keys) % columns) % columns
        found: npt.NDArray[np.uint64] = line * columns + column
        return found


@dataclass(frozen=True)
class Window:
    """The crops of a run that read the same shards.

    Args:
        number: its number in the run.
        crops: numbers of its crops in the run.
        shards: (n,) numbers of the shards of its rows.
    """

    number: int
    crops: range
    shards: npt.NDArray[np.int64]


class WindowedOrder:
    """The order of rows for a dataset that a node cannot hold: it reads few shards at a time, and every row per epoch.

    In each epoch the shards are permuted anew. Consecutive ones make windows of about the same number of rows, and the
    rows of a window are permuted among themselves. All permutations are those of `RowOrder`. The order is a pure
    function of the seed and the number of the crop, and needs memory for each shard, not for each row.

    Args:
        rows_of_shards: rows of each shard, in the order of the dataset; rows are numbered in this order.
        window_rows: most rows of a window, up to the rows of a shard.
        seed: seed of the run.
    """

    def __init__(self, rows_of_shards: npt.ArrayLike, window_rows: int, seed: int) -> None:
        self.seed, self.window_rows = seed, window_rows
        self._shard_rows = np.asarray(rows_of_shards, np.int64)
        self._shard_starts = np.cumsum(self._shard_rows) - self._shard_rows
        self.rows = int(self._shard_rows.sum())
        self.windows = -(-self.rows // window_rows)  # per epoch
        self._layouts: dict[int, _ShardLayout] = {}

    def at(self, crops: range) -> npt.NDArray[np.int64]:
        """The rows of these crops, by their numbers in the run: (B,)."""
        found = []
        while crops:
            window = self.window_at(crops.start)
            here = range(crops.start, min(crops.stop, window.crops.stop), crops.step)
            found.append(self._rows_in(window, here))
            crops = crops[len(here) :]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def window_at(self, crop: int) -> Window:
        """The window of a crop."""
        epoch, place = divmod(crop, self.rows)
        layout = self._layout(epoch)
        window = int(np.searchsorted(layout.bounds, place, side="right")) - 1  # the last one: others there are empty
        begin, end = (epoch * self.rows + int(bound) for bound in layout.bounds[window : window + 2])
        first, last = np.searchsorted(layout.starts, layout.bounds[window : window + 2])
        return Window(epoch * self.windows + window, range(begin, end), layout.shards[first:last])

    def _rows_in(self, window: Window, crops: range) -> npt.NDArray[np.int64]:
        """The rows of crops of one window."""
        count, first_place = len(window.crops), window.crops.start % self.rows
        shift = window.number * count - window.crops.start  # the windows of a run are the epochs of `RowOrder`
        inside = range(crops.start + shift, crops.stop + shift, crops.step)
        places = first_place + RowOrder(count, self.seed, "windows").at(inside)
        layout = self._layout(crops.start // self.rows)
        which = np.searchsorted(layout.starts, places, side="right") - 1
        rows: npt.NDArray[np.int64] = self._shard_starts[layout.shards[which]] + places - layout.starts[which]
        return rows

    def _layout(self, epoch: int) -> "_ShardLayout":
        """The order of the shards in an epoch. Those of two epochs are kept, because steps alternate between them."""
        kept = self._layouts  # other threads may replace it
        if epoch not in kept:
            used = np.flatnonzero(self._shard_rows)
            order = RowOrder(len(used), self.seed, "shards").at(range(epoch * len(used), (epoch + 1) * len(used)))
            shards = used[order]
            starts = np.cumsum(self._shard_rows[shards]) - self._shard_rows[shards]
            # a window begins with the first shard that starts at or after its share of the rows
            shares = np.arange(self.windows + 1) * self.rows // self.windows
            bounds = np.append(starts, self.rows)[np.searchsorted(starts, shares)]
            kept = dict(list(kept.items())[-1:]) | {epoch: _ShardLayout(shards, starts, bounds)}
            self._layouts = kept
        return kept[epoch]


@dataclass(frozen=True)
class _ShardLayout:
    """The shards of an epoch in their order, where each starts, and where each window starts and the last one ends."""

    shards: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
