"""Shard plans: which shards of a remote dataset a run needs next, and whether the cache of the node can hold them."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from patchloom.errors import UserError
from patchloom.models.random_draws import CURRENT_DRAWS, Rows, WindowedOrder
from patchloom.models.step_plan import draw_source
from patchloom.platform.dataset.index import Split
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.dataset.remote_shards import RemoteShards, ShardsInNeed
from patchloom.platform.files.cache import CACHE_GIB
from patchloom.platform.progress import say
from patchloom.platform.recipe.run_recipe import Recipe

LOOK_AHEAD_CROPS = 65_536  # whose shards are found at once
CHECKED_WINDOWS = 4096  # the windows of more epochs differ by about a shard
SPARE_SHARDS = 2  # next to the windows, for previews and the held-out loss


def training_rows(dataset: Dataset, recipe: Recipe) -> Split:
    """The rows that a recipe trains on; raises UserError if the dataset does not have so many."""
    return dataset.split("train", recipe.data.held_out_fraction, recipe.data.images)


def recipe_plan(dataset: Dataset, recipe: Recipe, draws_version: int = CURRENT_DRAWS) -> "ShardPlan":
    """The order of the rows of a recipe, and the plan of the shards that it needs.

    Raises:
        UserError: the cache of this node is too small for it; the message names the least size.
    """
    plan = unchecked_plan(dataset, recipe, draws_version)
    windowed = WindowedOrder(plan.rows_of_shards, recipe.data.window_rows, recipe.seed)
    plan.check_cache(recipe.train.images, windowed)
    return plan


def unchecked_plan(dataset: Dataset, recipe: Recipe, draws_version: int = CURRENT_DRAWS) -> "ShardPlan":
    """Like `recipe_plan`, also if the cache of this node is too small."""
    train = training_rows(dataset, recipe)
    rows = np.diff(train.starts)
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
        self._has_said = False
        self._current = range(0)  # the crops of the current windows

    def advance(self, crops: range) -> None:
        """Fetch what these crops and the next ones need. Called in the order of the crops."""
        if self.files is None or not crops or (crops[0] in self._current and crops[-1] in self._current):
            return
        if not isinstance(self.order, WindowedOrder):
            self._current, shards = range(crops[0], 2**62), np.flatnonzero(self.rows_of_shards)
            self._say_what_is_fetched(shards)
            self.files.need([ShardsInNeed(shards, self._first_uses(self._current, len(shards)))])
            return
        windows = [self.order.window_at(crops[0])]
        while windows[-1].crops.stop <= crops[-1]:
            windows.append(self.order.window_at(windows[-1].crops.stop))
        self._current = range(windows[0].crops.start, windows[-1].crops.stop)
        self._say_what_is_fetched(windows[0].shards)
        windows.append(self.order.window_at(self._current.stop))
        rest = [range(max(crops[0], window.crops.start), window.crops.stop) for window in windows]
        uses = [self._first_uses(left, len(window.shards)) for left, window in zip(rest, windows, strict=True)]
        self.files.need([ShardsInNeed(window.shards, order) for window, order in zip(windows, uses, strict=True)])

    def _say_what_is_fetched(self, shards: np.ndarray) -> None:
        """Say once that the first rows may take a while."""
        if self.files is not None and not self._has_said:
            self._has_said = True
            if missing := self.files.missing_bytes(shards):
                part = "the first window" if isinstance(self.order, WindowedOrder) else "the shards with its rows"
                what = "the dataset" if len(shards) == len(self.rows_of_shards) else part
                say(f"  fetching {gib(missing)} GiB ({what}); training starts when its first rows are here")

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
        """The least size of the cache: all shards with rows to train on, or any two windows that follow each other.

        Args:
            crops: crops of the run.
        """
        assert self.files is not None
        sizes, base_bytes = self.dataset.shards.sizes, self.files.parts.base_bytes
        whole = int(base_bytes + sizes.sum())
        if not isinstance(self.order, WindowedOrder):
            used_bytes = base_bytes + self._used_sizes.sum()
            return min(int(used_bytes + SPARE_SHARDS * sizes.max()), whole)
        largest, window = 0, self.order.window_at(0)
        for _ in range(CHECKED_WINDOWS):
            following = self.order.window_at(window.crops.stop)
            largest = max(largest, int(sizes[np.union1d(window.shards, following.shards)].sum()))
            if following.crops.stop > crops:
                break
            window = following
        return min(int(base_bytes + largest + SPARE_SHARDS * sizes.max()), whole)

    @property
    def _used_sizes(self) -> np.ndarray:
        """The bytes of each shard that has rows to train on."""
        found: np.ndarray = self.dataset.shards.sizes[self.rows_of_shards > 0]
        return found

    def check_cache(self, crops: int, windowed: WindowedOrder | None = None) -> None:
        """Check that the cache of this node can hold what a run needs at the same time.

        Args:
            crops: crops of the run.
            windowed: the order that the run could have instead of the global one.

        Raises:
            UserError: it is too small; the message names the least size.
        """
        if self.files is None:
            return
        parts, least = self.files.parts, self.cache_bytes(crops)
        capacity = parts.capacity_bytes()
        if least <= capacity:
            return
        need, change = "all its rows need", ""
        if isinstance(self.order, WindowedOrder):
            need = f"two windows of {self.order.window_rows:,} rows need"
            change = ", or choose a smaller data.window_rows"
        elif windowed is not None:
            less = ShardPlan(self.dataset, self.rows_of_shards, windowed).cache_bytes(crops)
            if less < least:
                change = f", or choose data.order=windowed, which needs {gib(less)}"
        raise UserError(
            f"{parts.remote}: {need} {gib(least)} GiB, and the cache of this node ({parts.cache}) can have "
            f"{gib(capacity, math.floor)}: set {CACHE_GIB}={gib(least)} on a disk with this room{change}"
        )

    def describe(self, crops: int) -> str:
        """What each node reads and keeps in a run of so many crops, as a sentence."""
        if self.files is None:
            return f"data: read in place from {self.dataset.path}"
        used, least, parts = self._used_sizes, self.cache_bytes(crops), self.files.parts
        shards = len(self.dataset.shards)
        rows = "the dataset" if len(used) == shards else f"{len(used):,} of {shards:,} shards"
        rows += f" ({gib(used.sum())} GiB)"
        order = "in the global order"
        copies = f"copies {rows} to its cache"
        if isinstance(self.order, WindowedOrder):
            order = f"in {self.order.windows:,} windows per epoch"
            copies = f"reads {rows} through its cache, at most once per epoch,"
        room = f"room for {gib(parts.capacity_bytes(), math.floor)} here in {parts.cache}"
        return f"data: each node {copies} {order}; the cache needs {gib(least)} GiB ({room})"


def gib(size_bytes: float, rounded: Callable[[float], int] = math.ceil) -> str:
    """A size in GiB without the unit, rounded up to three digits, or down with `math.floor`."""
    scale = 10 ** (2 - math.floor(math.log10(max(size_bytes, 1) / 2**30)))
    return f"{rounded(size_bytes / 2**30 * scale) / scale:g}"
