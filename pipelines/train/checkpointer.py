"""Checkpointer: a run's checkpoints, written beside the training, whole or not at all, and kept by rule."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from patchloom.models.cards import CheckpointCard
from patchloom.models.checkpoints import checkpoint_content, read_checkpoint_card, write_checkpoint
from patchloom.models.step import TrainingState
from patchloom.pipelines.train.initial_weights import BEGINNING
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import whole_folder
from patchloom.platform.progress import say
from patchloom.platform.recipe.run_recipe import KeepSection

CHECKPOINTS = "checkpoints"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole: the only authority on where a run goes on."""
    whole = sorted((folder / CHECKPOINTS).glob("step-*/checkpoint.json"))
    return whole[-1].parent if whole else None


def whole_checkpoints(folder: Folder) -> list[str]:
    """The names of a run's whole checkpoints, `checkpoints/step-00001000`, the newest last; also of a remote run."""
    names = (name.removesuffix("/checkpoint.json") for name in folder.files() if name.endswith("/checkpoint.json"))
    return sorted(name for name in names if name.startswith(f"{CHECKPOINTS}/"))


def without_tensors(name: str) -> bool:
    """What a watcher needs of a remote run: all but the tensors of checkpoints and of the weights it began with."""
    return not name.startswith((f"{CHECKPOINTS}/", f"{BEGINNING}/")) or name.endswith(".json")


def without_old_tensors(folder: Folder) -> Callable[[str], bool]:
    """What a worker needs of a remote run: only the newest checkpoint's tensors, else those it begins with."""
    newest = whole_checkpoints(folder)[-1:] or [BEGINNING]
    return lambda name: without_tensors(name) or name.rsplit("/", 1)[0] in newest


class Checkpointer:
    """Copies the state in the step's own time, and writes it while training goes on; one at a time.

    A disk that is full costs a checkpoint and not the run: the ones before stay, and the next is tried.
    """

    def __init__(self, folder: Path, keep: KeepSection) -> None:
        self.folder, self.keep = folder / CHECKPOINTS, keep
        self.failed = 0
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: TrainingState, recipe: str, held_out_loss: float | None) -> None:
        """Begin to write `checkpoints/step-...`; waits only for the one before."""
        self.wait()
        self._pending = self._writer.submit(self._write, *checkpoint_content(state, recipe, held_out_loss))

    def wait(self) -> None:
        """Until what was begun is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, tensors: dict[str, Tensor], card: CheckpointCard) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            with whole_folder(self.folder / f"step-{card.step:08d}") as folder:
                write_checkpoint(folder, tensors, card)
            self._let_go()
        except (OSError, SafetensorError) as error:
            self.failed += 1
            say(
                f"  the checkpoint of step {card.step:,} was not written ({error}); "
                "training goes on, and the next one is tried: free some space"
            )

    def _let_go(self) -> None:
        """Remove the checkpoints that no rule keeps."""
        folders = sorted(path.parent for path in self.folder.glob("step-*/checkpoint.json"))
        cards = {folder: read_checkpoint_card(folder) for folder in folders}
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
                shutil.rmtree(folder)
