"""The growth benchmark: what opening a dataset and training on it cost as its rows grow, on a disk and at a store."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from patchloom.benchmarks.datasets import write_dataset
from patchloom.benchmarks.findings import EXTRAPOLATED, Finding, Say, Scale, exact
from patchloom.benchmarks.growth_probe import BATCH, Opening, own_memory_mb
from patchloom.benchmarks.interleaved import Spread, now
from patchloom.benchmarks.slow_store import SlowStore, slow_store
from patchloom.benchmarks.startup import Workspace, is_not_empty, patchloom
from patchloom.platform.files.cache import CACHE
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import Recipe, check_recipe
from patchloom.platform.records.run import PROGRESS_FILE

ROWS_PER_IMAGE = 1250  # of a scale: 10 million at the default one
SHARD_ROWS = 10_000
SIDE, CHANNELS = 4, 2  # of a row: 32 bytes
LEAST_ROWS, FAR_ROWS = 1_000, 100_000_000
DISK, STORE = "disk", "store"
DELAY_S = 0.02
UPLOADS_AT_ONCE = 8
STEPS = 40  # of the command
FIRST_STEP_WANTED_S, MEMORY_WANTED_MB = 10.0, 150.0
SAMPLE_EVERY_S = 0.2


def by_rows(scale: Scale, say: Say) -> list[Finding]:
    """The cost of opening a dataset and of training on it, for three sizes of datasets, on a disk and at a slow store.

    The rows have 32 bytes. The store adds 20 ms to each request. At the store, rows come in the windowed order.
    """
    most = ROWS_PER_IMAGE * scale.images
    sizes = [most // 100, most // 10, most]
    measured: dict[str, dict[int, Measured]] = {DISK: {}, STORE: {}}
    with tempfile.TemporaryDirectory() as scratch, slow_store(DELAY_S) as store:
        folder = Path(scratch)
        say("a dataset of the least size")
        base = _start(folder, store, DISK, min(LEAST_ROWS, sizes[0]), scale)
        base.run_command()  # creates the MLflow store
        own = base.run_command()
        for rows in sizes:
            for place, found in measured.items():
                say(f"{rows:,} rows, {place}")
                growing = _start(folder, store, place, rows, scale)
                found[rows] = growing.measure(scale.rounds, own)
    return [finding for place, found in measured.items() for finding in _findings(place, found)]


@dataclass(frozen=True)
class Command:
    """A run of `patchloom train --workers 1`: seconds to the end of the first step, and memory in 10^6 bytes."""

    first_step_s: float
    driver_mb: float
    worker_mb: float


@dataclass(frozen=True)
class Measured:
    """One dataset at one place: its openings, the command with its memory beyond that for 1,000 rows, and requests."""

    first: Opening
    later: list[Opening]
    first_requests: int
    later_requests: int
    command: Command
    command_requests: int


@dataclass(frozen=True)
class Cost:
    """A number that a dataset costs: its name, its unit, its values, and the most that is wanted."""

    what: str
    unit: str
    of: Callable[[Measured], list[float]]
    wanted: float | None = None


@dataclass(frozen=True)
class GrowingDataset:
    """A dataset of many small rows, and the processes that read it."""

    workspace: Workspace
    address: str
    recipe: str
    store: SlowStore
    environment: dict[str, str]
    batches: int

    def measure(self, rounds: int, own: Command) -> Measured:
        """Open it several times, then train on it."""
        counts = [self.store.requests()]
        openings = []
        for _ in range(1 + rounds):
            openings.append(self.open())
            counts.append(self.store.requests())
        command = self.run_command()
        beyond = Command(command.first_step_s, command.driver_mb - own.driver_mb, command.worker_mb - own.worker_mb)
        after = self.store.requests()
        first, *later = np.diff(counts).tolist()
        return Measured(openings[0], openings[1:], first, max(later), beyond, after - counts[-1])

    def open(self) -> Opening:
        """Open it in a new process, and read some batches."""
        command = [sys.executable, "-m", "patchloom.benchmarks.growth_probe", self.recipe, self.address]
        done = subprocess.run([*command, str(self.batches)], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.address} could not be opened: {done.stderr.strip()}")
        return Opening(**json.loads(done.stdout.splitlines()[-1]))

    def run_command(self) -> Command:
        """Train some steps on one worker of Ray."""
        start, first_step_s, driver_mb, worker_mb = now(), None, 0.0, 0.0
        with tempfile.TemporaryDirectory(dir=self.workspace.folder) as folder:
            run = Path(folder) / "run"
            arguments = ("train", self.recipe, "--data", self.address, "--out", str(run), "--workers", "1")
            with self.workspace.running(*patchloom(*arguments), **self.environment) as process:
                driver = psutil.Process(process.pid)
                while process.poll() is None:
                    if first_step_s is None and is_not_empty(run / PROGRESS_FILE):
                        first_step_s = now() - start
                    driver_mb = max(driver_mb, own_memory_mb(driver))
                    worker_mb = max([worker_mb, *_memories_of_workers(driver)])
                    time.sleep(SAMPLE_EVERY_S)
        assert first_step_s is not None
        return Command(first_step_s, driver_mb, worker_mb)


def _memories_of_workers(driver: psutil.Process) -> Iterator[float]:
    """The memory of each training worker that a driver has started."""
    for child in driver.children(recursive=True):
        try:
            if any("TrainWorker" in word for word in child.cmdline()[:1]):
                yield own_memory_mb(child)
        except (psutil.Error, OSError):  # it has ended
            continue


def _start(folder: Path, store: SlowStore, place: str, rows: int, scale: Scale) -> GrowingDataset:
    """Write a dataset and copy it to its place."""
    name = f"{rows}-rows"
    local = folder / name
    if not local.exists():
        starts = range(0, rows, SHARD_ROWS)
        write_dataset(local, (CHANNELS, SIDE, SIDE), [min(SHARD_ROWS, rows - start) for start in starts])
    address = str(local)
    if place == STORE:
        address = upload(local, f"{store.address}/{name}")
    workspace = Workspace(folder)
    recipe = workspace.write_recipe(f"{place}-{name}", order_recipe("windowed" if place == STORE else "global"))
    environment = {**workspace.environment, CACHE: str(folder / f"cache-{place}-{name}")}
    return GrowingDataset(workspace, address, recipe, store, environment, max(1, 4 * scale.images // BATCH))


def upload(folder: Path, address: str) -> str:
    """Copy the files of a folder to a store. Returns the address."""
    remote = Folder.at(address)
    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as executor:
        list(executor.map(lambda name: remote.put(folder / name, name), Folder(str(folder)).files()))
    return address


def order_recipe(order: str) -> Recipe:
    """A recipe of a network that is as small as it can be."""
    return check_recipe({
        "name": "growth",
        "data": {"order": order},
        "model": {"network": "ddpmpp", "width": 8, "width_multipliers": [1], "blocks": 1, "attention": [],
                  "class_conditional": False, "label_dropout": 0},
        "patches": {"p": 1.0},
        "train": {"images": STEPS * BATCH, "batch_size": BATCH, "log_every_images": BATCH},
        "preview": {"every_images": 0},
    })  # fmt: skip


def _findings(place: str, measured: dict[int, Measured]) -> Iterator[Finding]:
    """The numbers of one place: of each size, per million rows, and at a hundred million."""
    train = "`patchloom train --workers 1`"
    costs = [
        Cost("first opening, to the first rows", "s", lambda each: [each.first.to_first_rows_s]),
        Cost("later opening, to the first rows", "s", lambda each: [one.to_first_rows_s for one in each.later],
             FIRST_STEP_WANTED_S),
        Cost(f"{train}, to the end of the first step", "s", lambda each: [each.command.first_step_s]),
        Cost("memory of a later opening", "MB", lambda each: [one.memory_mb for one in each.later], MEMORY_WANTED_MB),
        Cost(f"{train}, memory of the driver", "MB", lambda each: [each.command.driver_mb], MEMORY_WANTED_MB),
        Cost(f"{train}, memory of the worker", "MB", lambda each: [each.command.worker_mb], MEMORY_WANTED_MB),
    ]  # fmt: skip
    if place == STORE:
        costs += [
            Cost("first opening and its batches", "requests", lambda each: [each.first_requests]),
            Cost("later opening and its batches", "requests", lambda each: [each.later_requests]),
            Cost(train, "requests", lambda each: [each.command_requests]),
        ]
    for cost in costs:
        spreads = {rows: Spread.of(cost.of(each)) for rows, each in measured.items()}
        what = f"{place}: {cost.what}"
        for rows, spread in spreads.items():
            yield Finding(what, spread, cost.unit, wanted=cost.wanted, is_cost=True, rows=rows)
        yield from extrapolated(what, cost.unit, {rows: spread.median for rows, spread in spreads.items()})
    for rows, each in measured.items():
        rates = Spread.of([one.rows_per_second for one in each.later])
        yield Finding(f"{place}: reading in batches of {BATCH}", rates, "rows/s", rows=rows)


def extrapolated(what: str, unit: str, costs: dict[int, float]) -> Iterator[Finding]:
    """The cost per million rows by least squares, and the cost of a hundred million rows on that line."""
    slope, start = np.polyfit(np.array(list(costs)) / 1e6, list(costs.values()), 1).tolist()
    slope, start = round(slope, 9), round(start, 9)  # zero instead of 1e-14
    yield Finding(f"{what}, per million rows", exact(slope), unit, is_cost=True)
    yield Finding(what + EXTRAPOLATED, exact(start + slope * FAR_ROWS / 1e6), unit, is_cost=True, rows=FAR_ROWS)
