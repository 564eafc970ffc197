"""A growth probe: opens a dataset as a worker of `patchloom train` does, in a new process, and reads rows in its order.

python -m patchloom.benchmarks.growth_probe RECIPE DATASET BATCHES    # prints an `Opening` as JSON
"""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from patchloom.models.random_draws import CURRENT_DRAWS
from patchloom.pipelines.train.run import RowReader
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.recipe import load_recipe

BATCH = 256
SAMPLE_EVERY_S = 0.02


@dataclass(frozen=True)
class Opening:
    """What it takes to open a dataset and to read its first rows.

    Args:
        open_s: seconds to open it.
        splits_s: seconds to divide it, which may build an index.
        first_rows_s: seconds to read the first batch of rows.
        rows_per_second: the rate of the batches after it.
        memory_mb: the most memory that all of this needed, without the pages of mapped files, in 10^6 bytes.
        held_out: the number of held-out rows.
    """

    open_s: float
    splits_s: float
    first_rows_s: float
    rows_per_second: float
    memory_mb: float
    held_out: int

    @property
    def to_first_rows_s(self) -> float:
        """Seconds until the first batch is read."""
        return self.open_s + self.splits_s + self.first_rows_s


def own_memory_mb(process: psutil.Process) -> float:
    """The memory of a process without the pages of mapped files, in 10^6 bytes; on Linux, elsewhere all of it."""
    status = Path(f"/proc/{process.pid}/status")
    if status.is_file():
        sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(sizes["RssAnon"].split()[0]) * 1024 / 1e6 if "RssAnon" in sizes else 0.0  # a zombie has none
    return float(process.memory_info().rss / 1e6)


class PeakMemory:
    """Samples the memory of this process during a block; `mb` is the most that it had above that at the start."""

    def __init__(self) -> None:
        self.mb = 0.0
        self._process, self._is_done = psutil.Process(), threading.Event()
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> "PeakMemory":
        self._start_mb = own_memory_mb(self._process)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._is_done.wait(SAMPLE_EVERY_S):
            self.mb = max(self.mb, own_memory_mb(self._process) - self._start_mb)


def measure_opening(recipe_path: str, address: str, batches: int) -> Opening:
    """Open a dataset and read batches of rows in the order of a recipe."""
    recipe = load_recipe(recipe_path)
    with PeakMemory() as peak:
        times = [time.perf_counter()]
        dataset = open_dataset(address)
        times.append(time.perf_counter())
        reader = RowReader(dataset, recipe, torch.device("cpu"), CURRENT_DRAWS)
        times.append(time.perf_counter())
        for number in range(batches + 1):
            reader.rows(range(number * BATCH, (number + 1) * BATCH))
            if number == 0:
                times.append(time.perf_counter())
        times.append(time.perf_counter())
        reader.plan.close()
    open_s, splits_s, first_rows_s, rest_s = np.diff(times).tolist()
    return Opening(open_s, splits_s, first_rows_s, BATCH * batches / rest_s, peak.mb, len(reader.held_out))


if __name__ == "__main__":
    print(json.dumps(asdict(measure_opening(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
