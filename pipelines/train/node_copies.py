"""Copies of a remote run: one on the node of the command, and one on each node of its workers."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from patchloom.pipelines.train.checkpointer import without_old_tensors, without_tensors
from patchloom.pipelines.train.control import STOP_FILE
from patchloom.platform.compute.workers import Worker
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.copies import RemoteMirror, Writer, pull_folder, send_unsent, update_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import make_folder
from patchloom.platform.progress import say


@contextmanager
def command_copy(address: Folder, owner: str) -> Iterator[Path]:
    """The run folder, or a local copy of a remote one, updated before and after the block."""
    if not address.is_remote:
        yield make_folder(address.path)
        return
    send_unsent(address, working_copy(address, "worker"), owner)
    if (writer := Writer.of(address)) is not None and writer.host != socket.gethostname():
        say(f"  {address} may lack work that is on {writer.host} in {writer.path}: a worker there sends it first")
    copy = working_copy(address, "driver")
    pull_folder(address, copy, without_tensors)
    yield copy
    pull_folder(address, copy, without_tensors)


@contextmanager
def worker_copy(worker: Worker, run: Folder, owner: str) -> Iterator[Path]:
    """The run folder on this node. Worker 0 sends what it writes to a remote one."""
    if not run.is_remote:
        yield run.path
        return
    here = working_copy(run, "worker")
    (here / STOP_FILE).unlink(missing_ok=True)
    send_unsent(run, here, owner)  # also if this worker is not worker 0 any more
    worker.meet()  # so that all continue from the same checkpoint
    update_copy(run, here, without_old_tensors(run))
    worker.meet()  # again, because worker 0 of the same node writes into the same copy
    with RemoteMirror(here, run, STOP_FILE, owner) if worker.rank == 0 else nullcontext():
        yield here
