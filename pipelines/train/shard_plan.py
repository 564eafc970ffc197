"""Shard plans: which shards of a remote dataset a run needs next, and whether the cache of the node can hold them."""

import math
from collections.abc import Iterator

import numpy as np

from patchloom.errors import UserError
from patchloom.models.random_draws import CURRENT_DRAWS, Rows, WindowedOrder
from patchloom.models.step_plan import draw_source
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.dataset.remote_shards import RemoteShards, ShardsInNeed
from patchloom.platform.files.cache import CACHE_GIB
from patchloom.platform.recipe.run_recipe import Recipe

LOOK_AHEAD_CROPS = 65_536  # whose shards are found at once
CHECKED_WINDOWS = 4096  # the windows of more epochs differ by about a shard
SPARE_SHARDS = 2  # next to the windows, for previews and the held-out loss


def new_shard_plan(dataset: Dataset, recipe: Recipe, draws_version: int = CURRENT_DRAWS) -> "ShardPlan":
    """The order of rows of a recipe, and the plan of the shards that it needs."""
    train = dataset.indices("train", recipe.data.held_out_fraction)
    rows = np.diff(np.searchsorted(train, dataset.reader.starts))
    if recipe.data.order == "windowed":
        return ShardPlan(dataset, rows, WindowedOrder(rows, recipe.data.window_rows, recipe.seed))
    return ShardPlan(dataset, rows, draw_source(recipe.seed, draws_version).row_order(len(train)))


class ShardPlan:
    """Has the shards of the current window and the next one fetched, in the order in which the run needs them.

    With the global order, all shards are needed. The shards of a local dataset are there already.

    Args:
        dataset: the dataset.
        rows_of_shards: (S,) rows to train on of each shard.
        order: the order of these rows.
    """

    def __init__(self, dataset: Dataset, rows_of_shards: np.ndarray, order: Rows) -> None:
        self.dataset, self.order, self.rows_of_shards = dataset, order, rows_of_shards
        self.files = dataset.reader.files if isinstance(dataset.reader.files, RemoteShards) else None
        self._ends = np.cumsum(rows_of_shards)
        self._current = range(0)  # the crops of the current windows

    def advance(self, crops: range) -> None:
        """Fetch what these crops and the next ones need. Called in the order of the crops."""
        if self.files is None or not crops or (crops[0] in self._current and crops[-1] in self._current):
            return
        if not isinstance(self.order, WindowedOrder):
            self._current, shards = range(crops[0], 2**62), np.flatnonzero(self.rows_of_shards)
            self.files.need([ShardsInNeed(shards, self._first_uses(self._current, len(shards)))])
            return
        windows = [self.order.window_at(crops[0])]
        while windows[-1].crops.stop <= crops[-1]:
            windows.append(self.order.window_at(windows[-1].crops.stop))
        self._current = range(windows[0].crops.start, windows[-1].crops.stop)
        windows.append(self.order.window_at(self._current.stop))
        rest = [range(max(crops[0], window.crops.start), window.crops.stop) for window in windows]
        uses = [self._first_uses(left, len(window.shards)) for left, window in zip(rest, windows, strict=True)]
        self.files.need([ShardsInNeed(window.shards, order) for window, order in zip(windows, uses, strict=True)])

    def close(self) -> None:
        """Stop to fetch."""
        if self.files is not None:
            self.files.close()

    def _first_uses(self, crops: range, shards: int) -> Iterator[int]:
        """The shards of these crops in the order of their first use, until there are so many."""
        seen: set[int] = set()
        for first in range(crops.start, crops.stop, LOOK_AHEAD_CROPS):
            rows = self.order.at(range(first, min(first + LOOK_AHEAD_CROPS, crops.stop)))
            numbers, places = np.unique(np.searchsorted(self._ends, rows, side="right"), return_index=True)
            new = [number for number in numbers[np.argsort(places)].tolist() if number not in seen]
            seen.update(new)
            yield from new
            if len(seen) == shards:
                return

    def cache_bytes(self, crops: int) -> int:
        """The least size of the cache: all of a remote dataset, or any two windows that follow each other.

        Args:
            crops: crops of the run.
        """
        assert self.files is not None
        sizes, base_bytes = self.dataset.shards.sizes, self.files.parts.base_bytes
        if not isinstance(self.order, WindowedOrder):
            return int(base_bytes + sizes.sum())
        largest, window = 0, self.order.window_at(0)
        for _ in range(CHECKED_WINDOWS):
            following = self.order.window_at(window.crops.stop)
            largest = max(largest, int(sizes[np.union1d(window.shards, following.shards)].sum()))
            if following.crops.stop > crops:
                break
            window = following
        return min(int(base_bytes + largest + SPARE_SHARDS * sizes.max()), int(base_bytes + sizes.sum()))

    def check_cache(self, recipe: Recipe) -> None:
        """Check that the cache of this node can hold what the run needs at the same time.

        Args:
            recipe: the recipe.

        Raises:
            UserError: it is too small; the message names the least size.
        """
        if self.files is None:
            return
        least, capacity = self.cache_bytes(recipe.train.images), self.files.parts.capacity_bytes()
        if least <= capacity:
            return
        found = f"{self.dataset.address}: the cache {self.files.parts.cache} can have {capacity / 2**30:.3g} GiB, and "
        rows = recipe.data.window_rows
        if isinstance(self.order, WindowedOrder):
            raise UserError(
                f"{found}two windows of {rows:,} rows need {gib(least)}: set {CACHE_GIB}={gib(least)} on a disk that "
                "has this room, or a smaller data.window_rows"
            )
        windowed = ShardPlan(self.dataset, self.rows_of_shards, WindowedOrder(self.rows_of_shards, rows, recipe.seed))
        less = gib(windowed.cache_bytes(recipe.train.images))
        raise UserError(
            f"{found}all rows, which data.order: global reads, need {gib(least)}: set {CACHE_GIB}={gib(least)} on a "
            f"disk that has this room, or set data.order=windowed, which needs {less} with data.window_rows={rows}"
        )


def gib(size_bytes: float) -> str:
    """A size in GiB, rounded up to three digits, without the unit."""
    scale = 10 ** (2 - math.floor(math.log10(max(size_bytes, 1) / 2**30)))
    return f"{math.ceil(size_bytes / 2**30 * scale) / scale:g}"
