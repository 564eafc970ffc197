"""The checkpoints of a run: where it continues, how they are written, and which are kept."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.cards import CheckpointCard
from patchloom.models.checkpoints import checkpoint_content, read_checkpoint_card, write_checkpoint
from patchloom.models.step import TrainingState
from patchloom.pipelines.train.initial_weights import INITIAL_WEIGHTS
from patchloom.platform.compute.workers import Worker
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import locked, sweep_partial, whole_folder
from patchloom.platform.progress import say
from patchloom.platform.recipe.run_recipe import KeepSection
from patchloom.platform.records.run import ProgressLine

CHECKPOINTS = "checkpoints"
CHECKPOINT_CARD, CHECKPOINT_TENSORS = "checkpoint.json", "state.safetensors"
OLD_WORKER_WAIT_S = 60.0  # a worker of a killed session may still be writing


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, from which it continues."""
    complete = sorted((folder / CHECKPOINTS).glob("step-*/checkpoint.json"))
    return complete[-1].parent if complete else None


def whole_checkpoints(folder: Folder) -> list[str]:
    """The names of the complete checkpoints of a run, which may be remote: `checkpoints/step-00001000`, sorted."""
    names = (name.removesuffix("/checkpoint.json") for name in folder.files() if name.endswith("/checkpoint.json"))
    return sorted(name for name in names if name.startswith(f"{CHECKPOINTS}/"))


def without_tensors(name: str) -> bool:
    """Whether to fetch this file of a remote run: not the tensors of checkpoints and initial weights."""
    return not name.startswith((f"{CHECKPOINTS}/", f"{INITIAL_WEIGHTS}/")) or name.endswith(".json")


def without_old_tensors(folder: Folder) -> Callable[[str], bool]:
    """Which files of a remote run a worker fetches: of the tensors, only those that the run continues from."""
    newest = whole_checkpoints(folder)[-1:] or [INITIAL_WEIGHTS]
    return lambda name: without_tensors(name) or name.rsplit("/", 1)[0] in newest


@contextmanager
def worker_lock(worker: Worker, folder: Path) -> Iterator[None]:
    """Lock a run folder for worker 0, and remove files that a killed process left incomplete."""
    if worker.rank > 0:
        yield
        return
    with locked(folder, ".worker.lock", wait_s=OLD_WORKER_WAIT_S):
        sweep_partial(folder)
        sweep_partial(folder / CHECKPOINTS)
        yield


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of a checkpoint, the card first, and its folder if nothing else is in it."""
    for name in (CHECKPOINT_CARD, CHECKPOINT_TENSORS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class Checkpointer:
    """Writes checkpoints in the background, one at a time, while training continues.

    If the disk is full, the checkpoint is skipped with a message; earlier checkpoints are kept.
    """

    def __init__(self, folder: Path, keep: KeepSection) -> None:
        self.folder, self.keep = folder / CHECKPOINTS, keep
        self.failed = 0
        self.written_unix_s: float | None = None  # when the newest checkpoint was complete
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: TrainingState, recipe: str, line: Future[ProgressLine | None] | None) -> None:
        """Copy the state and start to write `checkpoints/step-...`. Waits for the previous checkpoint.

        Args:
            state: the state of the run.
            recipe: name of its recipe.
            line: its newest progress line. The checkpoint is complete after it, so that a run that continues from the
                checkpoint lacks no line. None: there is no line.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, *checkpoint_content(state, recipe), line)

    def wait(self) -> None:
        """Wait until the checkpoint is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(
        self, tensors: dict[str, Tensor], card: CheckpointCard, line: Future[ProgressLine | None] | None
    ) -> None:
        try:
            newest = line.result() if line else None
            card = replace(card, held_out_loss=newest.held_out_loss if newest else None)
            self.folder.mkdir(exist_ok=True)
            with whole_folder(self.folder / f"step-{card.step:08d}") as folder:
                write_checkpoint(folder, tensors, card)
            self.written_unix_s = time.time()
            self._remove_old()
        except (OSError, SafetensorError) as error:
            self.failed += 1
            say(
                f"  the checkpoint of step {card.step:,} was not written ({error}); "
                "training continues, and the next checkpoint is tried: free disk space"
            )

    def _remove_old(self) -> None:
        """Remove the checkpoints that no rule of `train.keep` keeps. One whose card cannot be read is left alone."""
        cards = {}
        for path in sorted(self.folder.glob("step-*/checkpoint.json")):
            with contextlib.suppress(CheckpointError):
                cards[path.parent] = read_checkpoint_card(path.parent)
        folders = list(cards)
        kept = set(folders[-self.keep.last :])
        if self.keep.every_images:
            milestones: dict[int, Path] = {}
            for folder in folders:  # the first at or after each multiple
                milestones.setdefault(cards[folder].images_seen // self.keep.every_images, folder)
            kept |= {folder for number, folder in milestones.items() if number > 0}
        losses = {folder: loss for folder in folders if (loss := cards[folder].held_out_loss) is not None}
        kept |= set(sorted(losses, key=losses.__getitem__)[: self.keep.best])
        for folder in folders:
            if folder not in kept:
                remove_checkpoint(folder)
