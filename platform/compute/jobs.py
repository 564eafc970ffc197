"""Jobs: resumable work in units. Workers do the units, notes keep what is finished, and a card completes the folder.

`prepare`, `sample` and the extraction of features are jobs. Each one only defines its units and its worker.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from patchloom.errors import UserError
from patchloom.platform.compute.actors import map_on_actors, room_for_pool
from patchloom.platform.compute.metrics import MetricRecorder
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.session import begin_work
from patchloom.platform.compute.shared_paths import NO_PATHS, UsedPaths
from patchloom.platform.files.fence import fenced
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import locked, make_folder, sweep_partial
from patchloom.platform.progress import Meter, progress
from patchloom.platform.records.record import Record, flat_values

WORK_FOLDER = ".work"  # in the job's folder, removed when the job is finished
NOTES_FOLDER = f"{WORK_FOLDER}/notes"  # one file per finished unit
PLAN_FILE, INPUTS_FOLDER = f"{WORK_FOLDER}/plan.json", f"{WORK_FOLDER}/inputs"  # of `prepare`
TEXT_ENCODER_FOLDER = f"{WORK_FOLDER}/text_encoder"  # of `prepare`


class Unit(Protocol):
    """One part of a job, which one worker does."""

    @property
    def size(self) -> int:
        """The number of images."""


UnitT = TypeVar("UnitT", bound=Unit)
ResultT = TypeVar("ResultT")


class Job(ABC, Generic[UnitT, ResultT]):
    """A resumable job. `run_job` calls `start`, `missing`, the workers, `keep` and `finish`, in this order.

    Attributes:
        command: the command that the job belongs to, for metrics.
        title: what the progress line says.
        total: number of images of the whole job.
        folder: locked while the job runs, if it is local. None: nothing is locked.
        worker: `worker(argument)` is built once per process and called with each unit. It writes the output of
            the unit first and its note last, so that a killed unit is done again.
        argument: a frozen dataclass that travels to the workers.
        on_gpus: whether the workers can use GPUs.
        paths: local paths that the workers use, which all nodes must see.
        head_start_s: seconds of work in this process before Ray starts; short jobs finish without Ray.
    """

    command: ClassVar[str] = ""
    title: str
    total: int
    folder: Folder | None
    worker: ClassVar[type[Any]]
    argument: object
    on_gpus: bool = True
    paths: UsedPaths = NO_PATHS
    head_start_s: float = 0.0

    def check_folder(self) -> None:
        """Raise UserError, before anything is written, if the folder contains something else."""

    def start(self) -> bool:
        """Write the plan, or check the plan of an earlier call. Returns False if the job is complete.

        Raises:
            UserError: the folder contains something else.
        """
        return True

    @abstractmethod
    def missing(self) -> list[UnitT]:
        """The units that no earlier call finished."""

    def keep(self, unit: UnitT, result: ResultT) -> None:
        """Take the result of a unit in this process."""

    def finish(self) -> None:
        """Combine the notes into the final files."""


@dataclass(frozen=True)
class JobResult:
    """The number of images of one call of a job, and their rate without the start of the workers."""

    images: int = 0
    images_per_second: float = 0.0


def run_job(job: Job[Any, Any], workers: int | None, resources: Resources = DEFAULT_RESOURCES) -> JobResult:
    """Run a job to its end: start it or continue it, do the missing units, and finish it.

    Args:
        job: the job.
        workers: number of parallel processes; None: all CPUs or GPUs; 0: this process, without Ray.
        resources: the nodes that they may use.

    Raises:
        UserError: another process uses the folder, or the folder contains something else.
    """
    with contextlib.ExitStack() as stack:
        job.check_folder()
        if job.folder is not None and not job.folder.files():
            resources = stack.enter_context(room_for_pool(workers, job.on_gpus, resources))
        stack.enter_context(_exclusive(job.folder))
        if not job.start():
            return JobResult()
        _sweep(job.folder)
        units = job.missing()
        images = sum(unit.size for unit in units)
        began = time.monotonic()
        with progress(job.title, job.total, "images") as meter:
            meter.begin(job.total - images)
            _do(job, units, workers, meter, resources)
        # one update alone has no rate: then the start of the workers counts too
        result = JobResult(images, meter.rate or images / max(time.monotonic() - began, 1e-9))
        job.finish()
    return result


@contextlib.contextmanager
def _exclusive(folder: Folder | None) -> Iterator[None]:
    """Keep other processes out of a folder."""
    if folder is None:
        yield
        return
    if folder.is_remote:
        with fenced(folder):
            yield
        return
    with locked(make_folder(folder.path)):
        yield


def _sweep(folder: Folder | None) -> None:
    """Remove the temporary files of killed workers from a folder, which is ours now."""
    if folder is not None and not folder.is_remote:
        for place in (folder.path, *folder.path.glob("*/"), *folder.path.glob(f"{WORK_FOLDER}/*/")):
            sweep_partial(place)


def remove_work(folder: Folder) -> None:
    """Remove what jobs write into the work folder, and the work folder if nothing else is in it."""
    for name in (NOTES_FOLDER, INPUTS_FOLDER, TEXT_ENCODER_FOLDER):
        folder.remove_folder(name)
    folder.remove(PLAN_FILE)
    if not folder.is_remote:
        with contextlib.suppress(OSError):
            (folder.path / WORK_FOLDER).rmdir()


def _do(job: Job[UnitT, ResultT], units: list[UnitT], workers: int | None, meter: Meter, resources: Resources) -> None:
    """Do units in this process (all, or during the head start), and the others on Ray."""
    start, finished, todo, remaining = meter.done, 0, deque(units), len(units)
    metrics = MetricRecorder(job.command, job.title, job.folder)

    def show(images: int) -> None:
        meter.update(max(meter.done, start + images))
        metrics.record_job(meter.done, job.total, meter.rate, remaining)

    def take(unit: UnitT, result: ResultT) -> None:
        nonlocal finished, remaining
        job.keep(unit, result)
        finished, remaining = finished + unit.size, remaining - 1
        show(finished)

    if todo and (workers == 0 or (workers is None and job.head_start_s)):
        end = time.monotonic() + (job.head_start_s if workers is None else inf)
        begin_work()
        worker = job.worker(job.argument)
        meter.start()
        while todo and time.monotonic() < end:
            unit = todo.popleft()
            take(unit, worker(unit, lambda images: show(finished + images)))
    before = finished
    for unit, result in map_on_actors(
        job.worker, job.argument, list(todo), workers, job.on_gpus, lambda images: show(before + images), resources,
        job.paths, metrics,
    ):  # fmt: skip
        take(unit, result)


def check_same(folder: Folder, noun: str, found: Record, wanted: Record, ignored: Collection[str] = ()) -> None:
    """Raise UserError if the plan in a folder differs from the wanted plan.

    Args:
        folder: the folder, for the message.
        noun: what the folder contains, for the message.
        found: the plan in the folder.
        wanted: the plan of this call.
        ignored: dotted names of fields that may differ.
    """
    old, new = flat_values(found.to_dict()), flat_values(wanted.to_dict())
    changes = [
        f"{name} was {_short(old.get(name))} and is now {_short(new.get(name))}"
        for name in {**new, **old}
        if old.get(name) != new.get(name) and not any(f"{name}.".startswith(f"{other}.") for other in ignored)
    ]
    if changes:
        raise UserError(
            f"{folder} contains {noun} with other options ({'; '.join(changes)}): "
            "repeat the earlier call, or choose another folder"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
