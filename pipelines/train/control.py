"""Control of a run: the files by which a command and its workers find each other."""

from functools import partial
from pathlib import Path

from patchloom.pipelines.train.checkpointer import whole_checkpoints
from patchloom.platform.compute.stopping import RunControl
from patchloom.platform.compute.workers import Worker
from patchloom.platform.files.folder import Folder

STOP_FILE = ".stop"  # in the run folder: a request to write a checkpoint, and to stop unless it says GO_ON
GO_ON = "go on"
TRAINING_FILE = ".training"  # in the run folder while its workers train
VOTE_EVERY_STEPS = 8  # how often several workers agree on whether to stop, and on whether a node will be lost


def prepare_control(run: Folder, stop_at: float | None = None) -> RunControl:
    """Remove the requests of an earlier session from a run folder; returns how to control the next one."""
    for name in (STOP_FILE, TRAINING_FILE):
        run.remove(name)
    return RunControl(
        ask=partial(ask_to_stop, run),
        save=partial(ask_for_checkpoint, run.address),
        has_begun=partial(run.has, TRAINING_FILE),
        reset=partial(run.remove, TRAINING_FILE),
        newest_step=partial(newest_step, run),
        stop_at=stop_at,
        run=run,
    )


def show_training(run: Folder) -> None:
    """Show that the workers of a run train now, and will see a request to stop."""
    run.write(TRAINING_FILE, "")


def requested(worker: Worker, run: Path, step: int) -> str | None:
    """What the stop file of any worker asks for: "" to stop, GO_ON for a checkpoint only, None for nothing.

    All workers must call it after each step, and they get the same answer.
    """
    file = run / STOP_FILE
    if worker.count > 1 and step % VOTE_EVERY_STEPS:
        return None
    if not worker.any(file.exists()):
        return None
    if worker.any(file.exists() and file.read_text() != GO_ON):
        return ""
    if worker.rank == 0:  # after the vote: every worker has read it
        file.unlink(missing_ok=True)
    return GO_ON


def ask_to_stop(folder: Folder) -> None:
    """Ask the workers of the run in `folder` to write a checkpoint and stop at their next step."""
    folder.write(STOP_FILE, "")


def ask_for_checkpoint(run: str) -> None:
    """Ask the workers of a run for a checkpoint at their next step, after which they go on.

    Args:
        run: its folder: a path or an address.
    """
    folder = Folder.at(run)
    if not folder.has(STOP_FILE):  # a request to stop is stronger
        folder.write(STOP_FILE, GO_ON)


def newest_step(run: Folder) -> int:
    """The step of the newest complete checkpoint of a run; 0 if there is none."""
    complete = whole_checkpoints(run)
    return int(complete[-1].rsplit("-", 1)[-1]) if complete else 0
